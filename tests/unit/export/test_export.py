"""Preference rows as files for others: their forms, their counts, and the card."""

import json
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.json
import pyarrow.parquet as pq
import pytest
import yaml
from support.published import to_published
from support.tiny_models import preference_rows, write_preferences

from wrpo_ray.cli.entry import main
from wrpo_ray.config import Config
from wrpo_ray.data.published import from_published
from wrpo_ray.data.records import PREFERENCE
from wrpo_ray.errors import UserError
from wrpo_ray.export import dataset_files
from wrpo_ray.export.card_parts import CardFacts, CardModel, license_of
from wrpo_ray.export.dataset_card import card, size_category
from wrpo_ray.export.forms import Form
from wrpo_ray.export.preferences import export_preferences
from wrpo_ray.export.statistics import Statistics
from wrpo_ray.pipeline.chain import Chain
from wrpo_ray.stages.ingest.readers import read_rows
from wrpo_ray.storage.folder import Folder

ROWS = preference_rows(60)
ROWS[0]["messages"] = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Why?"},
]


def batch(rows: list[dict]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist(rows, schema=PREFERENCE)


def said(row: dict, *names: str) -> list[dict]:
    return [{"role": "assistant", "content": row[name]["text"]} for name in names]


# --- forms -----------------------------------------------------------------------------------


def test_published_rows_are_those_that_a_record_alone_becomes():
    ours = Form("published").of(batch(ROWS)).to_pylist()
    for row, theirs in zip(ours, map(to_published, ROWS), strict=True):
        prompt = theirs["prompt"]
        assert row == theirs | {"prompt": prompt if isinstance(prompt, list) else [prompt]}


@pytest.mark.parametrize(
    ("pairs", "names"),
    [
        ("target", ["target_chosen"]),
        ("source", ["source_chosen"]),
        ("both", ["source_chosen", "target_chosen"]),
    ],
)
def test_trl_rows(pairs, names):
    form = Form("trl", pairs)
    expected = [
        {"prompt": r["messages"], "chosen": said(r, name), "rejected": said(r, "rejected")}
        for r in ROWS
        for name in names
    ]
    assert form.of(batch(ROWS)).to_pylist() == expected
    assert (
        form.of(batch(ROWS).slice(7, 5)).to_pylist() == expected[7 * len(names) :][: 5 * len(names)]
    )
    assert form.rows_each == len(names)


def test_records_are_all_that_is_known():
    assert Form("records").of(batch(ROWS)).to_pylist() == ROWS


# --- files -----------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path) -> Folder:
    """The rows in 4 buckets, and a bucket without rows."""
    folder = Folder(str(tmp_path / "shards"))
    write_preferences(folder, ROWS)
    folder.write_table("00009-of-00016-x.parquet", pa.Table.from_pylist([], schema=PREFERENCE))
    return folder


def texts(rows) -> list[str]:
    return sorted(row["rejected"][0]["content"] + row["prompt"][-1]["content"] for row in rows)


@pytest.mark.parametrize("size", [1, 2**30])
def test_a_folder_is_read_by_datasets(shards, tmp_path, monkeypatch, size):
    """As many files as there are shards with rows, or one; each row once; the counts are right."""
    from datasets import load_dataset

    monkeypatch.setattr(dataset_files, "FILE_BYTES", size)
    to = Folder(str(tmp_path / "set"))
    statistics = dataset_files.write_folder(shards, to, Form("published"))
    files = to.files("data")
    assert len(files) == (4 if size == 1 else 1)
    assert files[-1] == f"train-{len(files) - 1:05d}-of-{len(files):05d}.parquet"
    loaded = load_dataset(to.path, split="train", cache_dir=str(tmp_path / "cache"))
    assert texts(loaded) == texts(Form("published").of(batch(ROWS)).to_pylist())
    assert statistics.rows == 60
    assert sum(statistics.wins.values()) == 60
    whole = Statistics(statistics.bounds)
    whole.add(batch(ROWS))
    assert whole == statistics


def test_counts_by_hand():
    rows = [
        {
            "messages": [{"role": "user", "content": "abc"}, {"role": "user", "content": "é"}],
            "source_chosen": {"text": "x" * 7, "source": "a", "reward": 1.0},
            "target_chosen": {"text": "x" * 8, "source": "t", "reward": 0.5},
            "rejected": {"text": "", "source": "t", "reward": 0.0},
        }
    ]
    statistics = Statistics((0.0, 1.0))
    statistics.add(batch(rows))
    assert statistics.wins == {"a": 1}
    assert statistics.lengths == {"prompt": {3: 1}, "y_ws": {3: 1}, "y_wt": {4: 1}, "y_l": {0: 1}}
    assert statistics.rewards == {"y_ws": {9: 1}, "y_wt": {5: 1}, "y_l": {0: 1}}


FORMS = [
    Form("published"), *(Form("trl", pairs) for pairs in ("target", "source", "both")),
    Form("records"),
]  # fmt: skip
IMPORTED = [
    row | {"source_margin": None, "target_margin": None}
    | {role: row[role] | dict.fromkeys(("token_ids", "finish_reason", "source", "sample", "reward"))
       for role in ("source_chosen", "target_chosen", "rejected")}
    for row in ROWS
]  # fmt: skip
ALONE = [row for row in ROWS if len(row["messages"]) == 1]
SETS = {
    "single turn": ALONE,
    "conversations": [row for row in ROWS if len(row["messages"]) > 1] * 3,
    "both": ROWS,
    "both, the conversation last": [*ROWS[1:], ROWS[0]],
    "imported": IMPORTED,
    "of endpoints in part": [
        row | {"source_chosen": row["source_chosen"] | {"token_ids": None}} if i < 40 else row
        for i, row in enumerate(ROWS)
    ],
    "with candidates": [
        row | {"candidates": [{"source": "a", "sample": 0, "reward": 0.5}] * (i % 3)}
        for i, row in enumerate(ROWS)
    ],
    "none": [],
}


def kinds(value: object) -> object:
    """The JSON type of a value, without what nulls and empty lists leave open."""
    if isinstance(value, dict):
        return {k: kind for k, v in value.items() if (kind := kinds(v)) not in (None, [], {})}
    if isinstance(value, list):
        merged: list = [kind for v in value if (kind := kinds(v)) is not None]
        return [joined(merged)] if merged else None
    return None if value is None else type(value).__name__


def joined(found: list) -> object:
    """The one type of several values; fails where they have two."""
    if all(isinstance(kind, dict) for kind in found):
        names = dict.fromkeys(name for kind in found for name in kind)
        return {n: joined([kind[n] for kind in found if n in kind]) for n in names}
    if all(isinstance(kind, list) for kind in found):
        return [joined([one for kind in found for one in kind])]
    (only,) = set(map(str, found))
    return only


def as_json(rows: list[dict], form: Form) -> list[dict]:
    """A prompt alone as it was published; token ids that are not known as an empty list."""
    if form.name == "published" and all(len(row["prompt"]) == 1 for row in rows):
        return [row | {"prompt": row["prompt"][0]} for row in rows]
    return [
        row | {n: row[n] | {"token_ids": row[n]["token_ids"] or []} for n in form.answers}
        for row in rows
    ]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("rows", SETS.values(), ids=list(SETS))
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_every_reader_reads_every_file(tmp_path, form, rows, kind):
    """One type a column; pyarrow in small blocks, `datasets`, and our own import read it whole."""
    shards, to = Folder(str(tmp_path / "shards")), Folder(str(tmp_path / f"rows.{kind}"))
    for number in range(0, len(rows), 25):
        part = pa.Table.from_pylist(rows[number : number + 25], schema=PREFERENCE)
        shards.write_table(f"{number:05d}-of-00064-x.parquet", part)
    count = dataset_files.write_file(shards, to, form)
    wanted = form.of(batch(rows)).to_pylist()
    assert count == len(wanted)
    if kind == "jsonl":
        wanted = as_json(wanted, form)
    if kind == "parquet":
        assert pq.read_table(to.path).to_pylist() == wanted
    else:
        read = [json.loads(line) for line in Path(to.path).read_text().splitlines()]
        assert read == wanted
        if read:
            joined(list(map(kinds, read)))
            table = pa.json.read_json(to.path, pa.json.ReadOptions(block_size=2**13))
            assert table.num_rows == len(wanted)
            assert table["prompt" if form.name != "records" else "messages"].null_count == 0
    if form.name == "published":
        known = {row["rejected"]["text"] for row in rows}
        found = [row for _, row in read_rows(to.uri, ["prompt", "chosen", "rejected"])]
        again = [from_published(row) for row in found]
        assert {row["rejected"]["text"] for row in again} == known
        assert [r["messages"] for r in again] == [r["messages"] for r in rows]


def test_a_folder_with_other_files_is_left_alone(shards, tmp_path, monkeypatch):
    to = Folder(str(tmp_path / "set"))
    dataset_files.write_folder(shards, to, Form("trl"))
    dataset_files.write_folder(shards, to, Form("trl", "both"))  # the same files again
    assert sum(pq.read_metadata(f).num_rows for f in Path(to.path).glob("data/*")) == 120
    monkeypatch.setattr(dataset_files, "FILE_BYTES", 1)
    with pytest.raises(UserError, match="holds other files, such as train-00000-of-00001.parquet"):
        dataset_files.write_folder(shards, to, Form("trl"))


def test_trl_trains_on_its_rows(shards, tmp_path):
    """By its own checks, its template code, and a step of its DPO."""
    from datasets import load_dataset
    from support.tiny_models import make_tokenizer, write_model
    from trl import DPOConfig, DPOTrainer
    from trl.data_utils import is_conversational, maybe_apply_chat_template

    to, tokenizer = Folder(str(tmp_path / "set")), make_tokenizer()
    dataset_files.write_folder(shards, to, Form("trl"))
    rows = load_dataset(to.path, split="train", cache_dir=str(tmp_path / "cache"))
    assert all(map(is_conversational, rows))
    (row,) = (r for r in rows if len(r["prompt"]) == 2)
    plain = maybe_apply_chat_template(row, tokenizer)
    assert plain["prompt"] == "<assistant>Be kind.<end><user>Why?<end><assistant>"
    assert plain["rejected"] == ROWS[0]["rejected"]["text"] + "<end>"
    options = {"use_cpu": True, "bf16": False, "report_to": [], "max_steps": 1}
    trainer = DPOTrainer(
        model=str(write_model(tmp_path / "model")),
        args=DPOConfig(output_dir=str(tmp_path / "out"), **options),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    assert len(trainer.train_dataset) == 60
    assert trainer.train().training_loss == pytest.approx(0.6931472, abs=1e-5)


# --- the card --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "word"),
    [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (99_999, "10K<n<100K"),
     (100_000, "100K<n<1M"), (12_000_000, "10M<n<100M"), (10**9, "1B<n<10B")],
)  # fmt: skip
def test_size_categories(rows, word):
    assert size_category(rows) == word


def test_licences_come_from_the_config_or_the_model_card(tmp_path, capsys):
    folder = Folder(str(tmp_path))
    assert license_of("m", None, folder) is None
    assert license_of("m", "mit", folder) == "mit"
    folder.write("README.md", b"---\nlicense: llama3\ntags: [x]\n---\n# M\n")
    assert license_of("m", None, folder) == "llama3"
    assert license_of("m", "llama3", folder) == "llama3"
    assert capsys.readouterr().err == ""
    assert license_of("m", "mit", folder) == "mit"
    assert "the config says licence mit, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("licenses", "one"),
    [(["mit", "mit"], "mit"), (["mit", None], "other"), ([None, None], "unknown"), ([], "unknown"),
     (["mit", "llama3"], "other")],
)  # fmt: skip
def test_the_licence_of_the_whole(licenses, one):
    models = [CardModel("source", f"s{i}", "m", "w", x) for i, x in enumerate(licenses)]
    facts = CardFacts([*models, CardModel("reward", "r", "m", "w", "gpl")], {}, [], [], {})
    text = card(Form(), Statistics(None), facts)
    assert yaml.safe_load(text.split("---")[1])["license"] == one


@pytest.fixture
def run(tmp_path) -> Config:
    """A run whose steps up to the preference rows are as if done."""
    models = [{"name": n, "model": str(tmp_path / n)} for n in ("other", "t")]
    for model, terms in zip(models, ("mit", "llama3"), strict=True):
        folder = Folder(model["model"])
        folder.write_json("config.json", {})
        folder.write("README.md", f"---\nlicense: {terms}\n---\n".encode())
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}')
    config = Config(
        output=str(tmp_path / "out"),
        prompts={"path": str(tmp_path / "p.jsonl")},
        sources=models[:1],
        target=models[1],
        reward={"function": "wrpo_ray.zoo.skills:verify"},
    )
    chain = Chain(config, "pair")
    steps = [step for stage in chain.build() for step in stage.steps]
    write_preferences(chain.root / steps[-1].folder, ROWS)
    for step in steps:
        counts = {"rows": 60, "failed": 2} | ({"dropped.too_few": 3} if step.name == "pair" else {})
        step.finish(chain.root, counts, time.time())
    return config


def test_the_card_tells_what_the_rows_are(run, tmp_path):
    from huggingface_hub import DatasetCard

    to = tmp_path / "set"
    assert export_preferences(run, str(to), Form("trl", "both")) == 120
    loaded = DatasetCard.load(to / "README.md")
    data = loaded.data.to_dict()
    assert data["license"] == "other"
    assert data["size_categories"] == "n<1K"
    assert data["configs"][0]["data_files"] == [{"split": "train", "path": "data/train-*"}]
    for part in (
        "120 rows for preference training",
        "| source | other | other | ",
        "| target | t | t | ",
        "| pair | 60 | 2 | too_few 3 |",
        "under different licences",
        "Each of 60 prompts has 2 rows.",
        "temperature: 0.8",
        "| wrpo-ray | ",
    ):
        assert part in loaded.text, part
    assert str(tmp_path) not in loaded.content


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_one_file_from_the_command_line(run, tmp_path, capsys, kind):
    path, to = tmp_path / "c.yaml", tmp_path / f"rows.{kind}"
    path.write_text(yaml.safe_dump(run.model_dump(mode="json", exclude_unset=True)))
    assert main(["export", str(path), "--to", str(to)]) == 0
    assert capsys.readouterr().out == f"60 preference rows in {to}\n"
    if kind == "jsonl":
        rows = [json.loads(line) for line in to.read_text().splitlines()]
        key = lambda row: row["prompt_id"]  # noqa: E731
        whole = Form("published").of(batch(ROWS)).to_pylist()  # one has two messages
        assert sorted(rows, key=key) == sorted(whole, key=key)
    else:
        assert pq.read_metadata(to).num_rows == 60
    assert main(["export", str(path), "--to", str(to), "--pairs", "both"]) == 2
    assert main(["export", str(path), "--to", str(tmp_path / "no" / "x.jsonl")]) == 2
    assert "there is no folder" in capsys.readouterr().err
