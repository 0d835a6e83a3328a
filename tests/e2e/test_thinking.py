"""A run whose source and target think: real engines write markers, which no answer shows.

A letter's token of the zoo's models becomes the closing marker, so that their answers have
reasoning up to that letter, and the others never end it. The token that begins an answer becomes
the opening one: their templates open the reasoning, and they read what they were trained on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from support.harness import Wrpo, failures
from test_serving import messages, serving

from wrpo_ray.llm.chat import end_ids, prompt_ids
from wrpo_ray.llm.rendering import load_tokenizer
from wrpo_ray.stages.train.rows import PreparedRows

OPEN, CLOSE = "<think>", "</think>"


def thinking(model: Path, folder: Path) -> str:
    """A copy of a zoo model whose prompts end with one marker, and whose `p` is the other."""
    shutil.copytree(model, folder)
    tree = json.loads((folder / "tokenizer.json").read_text())
    template = (folder / "chat_template.jinja").read_text()
    begins = template.rpartition("{{- '")[2].partition("'")[0]
    vocabulary = tree["model"]["vocab"]
    for token, marker in ((begins, OPEN), ("p", CLOSE)):
        vocabulary[marker] = vocabulary.pop(token)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    others = [added for added in tree["added_tokens"] if added["content"] != begins]
    markers = [{"id": vocabulary[marker], "content": marker} | flags for marker in (OPEN, CLOSE)]
    tree["added_tokens"] = others + markers
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["extra_special_tokens"].remove(begins)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    template = template.replace(begins, "", 1)  # of a message, which brings its own marker
    (folder / "chat_template.jinja").write_text(template.replace(begins, OPEN))
    return str(folder)


def shifts(zoo: Path) -> list[dict[str, Any]]:
    """Prompts to shift a word by a letter: `o` becomes `p`, which none of them has."""
    rows = [json.loads(line) for line in (zoo / "prompts.jsonl").read_text().splitlines()]
    found = [row for row in rows if row["skill"] == "shift" and "p" not in row["prompt"]]
    return [row for row in found if "p" in row["reference"]][:60] + found[:10]


def table(output: Path, step: str) -> list[dict[str, Any]]:
    files = sorted(output.glob(f"{step}-????????????/*/[!.]*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    assert rows, step
    return rows


def test_reasoning_is_kept_or_left_out_from_the_engine_to_the_training_row(
    demo: Callable[..., Wrpo], zoo: Path, tmp_path: Path
):
    source = thinking(zoo / "sources" / "gemma2-chars", tmp_path / "source")
    target = thinking(zoo / "target", tmp_path / "target")
    output, prompts = tmp_path / "out", tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in shifts(zoo)))
    wrpo = demo(
        output,
        prompts={"path": str(prompts)},
        sources=[
            {"name": "aloud", "model": source, "reasoning": "keep"},
            {"name": "quiet", "model": source, "reasoning": "strip"},
        ],
        target={"name": "target", "model": target, "reasoning": "keep"},
        reward={"function": "support.grades:checksum"},
        answers={"empty": "keep", "cut_off": "keep"},
        storage={"buckets": 2},
        evaluate=None,
    )
    result = wrpo.here("fuse")
    assert result.returncode == 0, result.stderr
    assert failures(output) == []
    tokenizer = load_tokenizer(Path(target))
    _check_answers(output, end_ids(tokenizer, Path(target)))
    chosen = _check_pairs(output)
    assert {row["source"] for row in chosen} == {"aloud", "quiet"}
    _check_training(output, tokenizer)


def _check_answers(output: Path, ends: frozenset[int]) -> None:
    """Every answer has its reasoning apart, and every reward is that of the answer alone."""
    from support.grades import checksum

    states = set()
    for name in ("aloud", "quiet", "target-sft"):
        for row in table(output, f"score-reward-{name}"):
            states.add((name, row["reasoning_state"]))
            assert row["reasoning"].startswith(OPEN)
            assert row["reward"] == checksum([], row["text"], None)
            if row["reasoning_state"] == "unfinished":
                assert row["text"] == ""
                assert CLOSE not in row["reasoning"]
            else:
                assert row["reasoning"].count(CLOSE) == 1
            if name == "target-sft" and row["finish_reason"] == "stop":
                assert row["token_ids"][-1] in ends
    kept, stripped = ("aloud", "kept"), ("quiet", "stripped")
    assert {kept, stripped, ("target-sft", "kept"), ("aloud", "unfinished")} <= states
    assert not {("aloud", "stripped"), ("quiet", "kept")} & states


def _check_pairs(output: Path) -> list[dict[str, Any]]:
    """Return y_ws of all rows, after a look at what each may hold."""
    rows = table(output, "pair")
    for row in rows:
        for name in ("source_chosen", "target_chosen", "rejected"):
            text, source = row[name]["text"], row[name]["source"]
            assert text.startswith(OPEN) is (source != "quiet"), (name, text)
            assert source == "quiet" or CLOSE in text
    selected = table(output, "select")
    return [row["source_chosen"] for row in selected]


def _check_training(output: Path, tokenizer: Any) -> None:
    """Prompt ids are those of the engine, and answers follow the prompt's opening marker."""
    (folder,) = output.glob("rows-wrpo-????????????")
    prepared = PreparedRows(folder)
    pairs = {row["prompt_id"]: row for row in table(output, "pair")}
    assert len(prepared) == len(pairs)
    for index in range(len(prepared)):
        row = prepared[index]
        pair = pairs[row.prompt_id]
        assert row.prompt.tolist() == prompt_ids(tokenizer, pair["messages"])
        assert tokenizer.decode(row.prompt).endswith(OPEN)
        names = ("source_chosen", "target_chosen", "rejected")
        for ids, name in zip(row.answers, names, strict=True):
            text = pair[name]["text"]
            whole = OPEN + tokenizer.decode(ids, skip_special_tokens=True)
            quiet = f"{OPEN}\n{CLOSE}\n\n{text}"
            expected = text if text.startswith(OPEN) else quiet
            assert whole == expected
            if pair[name]["source"] == "target-sft":
                assert ids.tolist() == pair[name]["token_ids"]


def test_a_served_model_gives_its_reasoning_in_a_field_of_its_own(zoo: Path, tmp_path: Path):
    """Whole and streamed alike, and a history with it is taken."""
    model = thinking(zoo / "target", tmp_path / "target")
    asked = [row["prompt"] for row in shifts(zoo)[:12]]
    with serving(zoo, models=[{"name": "target", "model": model, "reasoning": "strip"}]) as server:
        client = server.client()
        found = [_both(client, messages(prompt)) for prompt in asked]
        history = [
            {"role": "user", "content": asked[0]},
            {"role": "assistant", "content": "b", "reasoning_content": "a"},
            {"role": "user", "content": asked[1]},
        ]
        assert _both(client, history)
    assert any(content for _, content in found), found
    assert any(content is None for _, content in found), found
    assert all(reasoning is not None for reasoning, _ in found)


def _both(client: Any, chat: list[Any]) -> tuple[str, str | None]:
    """The reasoning and the content of a greedy answer, which a stream gives too."""
    call = {"model": "target", "messages": chat, "temperature": 0, "max_tokens": 24}
    whole = client.chat.completions.create(**call).choices[0].message
    deltas = [part.choices[0].delta for part in client.chat.completions.create(**call, stream=True)]
    content = "".join(delta.content or "" for delta in deltas)
    reasoning = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert (whole.reasoning_content, whole.content) == (reasoning, content or None)
    assert CLOSE not in reasoning
    assert OPEN not in content
    return reasoning, whole.content
