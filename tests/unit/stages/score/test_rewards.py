"""Rewards: classifiers in any batch, functions, mixtures; and what a scoring actor commits."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.tiny_models import WORDS, make_model, make_tokenizer, write_model
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    LlamaForSequenceClassification,
)

from wrpo_ray.config import Config, PartConfig, RewardConfig, load
from wrpo_ray.data import records
from wrpo_ray.data.buckets import Bucket, read_bucket, write_shard
from wrpo_ray.data.finished import marks
from wrpo_ray.data.samples import Prompts, Samples
from wrpo_ray.errors import UserError
from wrpo_ray.pipeline import chain, runner
from wrpo_ray.runtime.context import Run
from wrpo_ray.runtime.ready_queue import ReadyQueue
from wrpo_ray.stages.score.base import Item, MissingReferenceError, NotFiniteError
from wrpo_ray.stages.score.check import check_reward_folder
from wrpo_ray.stages.score.reward_models import check_reward_model, load_classifier
from wrpo_ray.stages.score.rewards import load_reward
from wrpo_ray.stages.score.stage import Score, Scorer
from wrpo_ray.storage.fingerprints import model_fingerprint
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

BUCKET = Bucket(0, 1)
ROW = {"job": 0, "bucket": 0}


def item(words: int, answer: int, reference: str | None = None) -> Item:
    return Item(
        [{"role": "user", "content": " ".join(f"w{i % 40}" for i in range(words))}],
        " ".join(["w3"] * answer),
        reference,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny classifier with one label."""
    folder = tmp_path_factory.mktemp("reward")
    config = make_model().config
    config.num_labels = 1
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


# --- classifiers -------------------------------------------------------------------------------


def test_rewards_do_not_depend_on_the_batch(folder):
    """Batches of mixed lengths, padded on the right, give what each answer gets alone."""
    items = [item(2, n) for n in (9, 1, 5, 30, 2, 200)]
    alone, together = (
        load_reward(RewardConfig(model="m", max_length=100, batch_size=size), [folder])
        for size in (1, 4)
    )
    one, all_ = alone.score(items), together.score(items)
    assert all_[:5] == pytest.approx(one[:5], abs=1e-5)
    assert len(set(one[:5])) == 5
    assert "above 100" in str(all_[5])


def test_the_prompt_can_be_cut_at_its_beginning_but_the_answer_never(folder):
    given = RewardConfig(model="m", max_length=40, overflow="cut_prompt")
    reward = load_classifier(given, folder, on_gpu=False)
    whole = load_classifier(RewardConfig(model="m", max_length=100), folder, on_gpu=False)
    long = item(30, 5)
    ids = whole.encode(long)
    assert len(ids) > 40
    assert reward.encode(long) == ids[-40:]
    assert reward.encode(item(2, 5)) == whole.encode(item(2, 5))
    (score,) = reward.score([item(2, 30)])
    assert "leaves the prompt no room" in str(score)


def test_a_models_own_context_bounds_the_length(folder):
    reward = load_classifier(RewardConfig(model="m", max_length=4096), folder, on_gpu=False)
    (score,) = reward.score([item(2, 200)])
    assert "above 128" in str(score)


ENCODER = {"architectures": ["BertForSequenceClassification"], "model_type": "bert"}


@pytest.mark.parametrize(
    ("change", "part", "told"),
    [
        ({}, {}, None),
        ({"id2label": {"0": "a", "1": "b"}}, {}, "it has 2 labels"),
        ({"id2label": None}, {}, "it has 2 labels"),
        ({"id2label": None, "num_labels": 1}, {}, None),
        ({"pad_token_id": None}, {}, None),
        ({"pad_token_id": -1}, {}, None),
        (ENCODER | {"pad_token_id": None}, {}, "no pad_token_id"),
        (ENCODER | {"pad_token_id": -1}, {}, "no pad_token_id"),
        (ENCODER | {"pad_token_id": 0}, {}, None),
        ({"pad_token_id": None, "text_config": {"pad_token_id": 0}}, {}, None),
        ({"pad_token_id": None}, {"engine": "vllm"}, None),
        ({"architectures": ["LlamaForCausalLM"]}, {}, "LlamaForCausalLM, which gives no reward"),
        ({"architectures": ["INFORMForSequenceClassifier"]}, {}, "gives no reward"),
        ({"architectures": None}, {}, "none, which gives no reward"),
        ({"architectures": ["LlamaForRewardModelWithGating"], "id2label": None}, {}, None),
        (
            {"architectures": ["LlamaForRewardModelWithGating"]},
            {"engine": "vllm"},
            "not run on vLLM",
        ),
    ],
)
def test_what_a_folder_holds_is_seen_before_any_work(folder, change, part, told):
    config = json.loads((folder / "config.json").read_text()) | change
    given = RewardConfig(model="m", **part)
    if told is None:
        check_reward_model(config, given)
    else:
        with pytest.raises(UserError, match=told):
            check_reward_model(config, given)


def test_a_model_whose_head_is_missing_is_refused(folder, tmp_path):
    """transformers would make one up."""
    write_model(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UserError, match=r"LlamaForSequenceClassification: score.weight is missing"):
        load_classifier(RewardConfig(model="m"), tmp_path, on_gpu=False)


# --- where a reward is read --------------------------------------------------------------------

VOCABULARY = 6 + len(WORDS)


def with_pad(folder: Path, to: Path, pad: int | None) -> Path:
    """A copy of the classifier that pads with another token."""
    shutil.copytree(folder, to, dirs_exist_ok=True)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | {"pad_token_id": pad}))
    return to


def test_whatever_token_pads_the_reward_is_read_at_the_last_one(folder, tmp_path):
    """All tokens as the padding, and for each rows that end with each token, some of them twice."""
    rows = [[7, 8, *[9] * (end % 5), *[end] * (1 + end % 3)] for end in range(VOCABULARY)]
    plain = LlamaForSequenceClassification.from_pretrained(folder)
    states = [plain.model(torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
    wanted = [plain.score(state).item() for state in states]
    cases = 0
    for pad in (None, -1, *range(VOCABULARY)):
        copy = with_pad(folder, tmp_path, pad)
        reward = load_classifier(RewardConfig(model="m"), copy, on_gpu=False)
        found = reward.rewards([[row] for row in rows])
        assert found == pytest.approx(wanted, abs=1e-5)
        cases += len(found)
    assert cases == (VOCABULARY + 2) * VOCABULARY == 2208


@pytest.mark.parametrize("pad", [None, -1])
def test_a_decoder_without_padding_passes_the_check(folder, tmp_path, pad):
    copy = Folder(str(with_pad(folder, tmp_path, pad)))
    check_reward_folder(copy, RewardConfig(model="m"), "reward")


@pytest.mark.parametrize("pad", [VOCABULARY, 10**6])
def test_padding_outside_of_the_embedding_is_told(folder, tmp_path, pad):
    with pytest.raises(UserError, match=f"pad_token_id {pad}|makes no model"):
        check_reward_folder(
            Folder(str(with_pad(folder, tmp_path, pad))), RewardConfig(model="m"), "reward"
        )


FAMILIES = {
    "llama": {"num_key_value_heads": 1},
    "qwen2": {"num_key_value_heads": 1},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 16},
    "mistral": {"num_key_value_heads": 1},
    "gemma2": {"num_key_value_heads": 1, "head_dim": 16},
    "phi3": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "gpt_neox": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "n_head": 2},
    "falcon": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_decoders_of_any_family_are_read_as_transformers_reads_them(family, tmp_path):
    """Where the padding is in no row, so that transformers is right."""
    shape = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }  # fmt: skip
    config = AutoConfig.for_model(
        family, vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=1,
        num_labels=1, **shape | FAMILIES[family],
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    rows = [[7, 8, 9], [5, 1], [9, 9, 9, 9, 30, 1]]
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    wanted = [plain(torch.tensor([row])).logits.item() for row in rows]
    reward = load_classifier(RewardConfig(model="m"), tmp_path, on_gpu=False)
    assert reward.decoder is not None
    assert reward.rewards([[row] for row in rows]) == pytest.approx(wanted, abs=1e-5)
    assert len(set(wanted)) == 3


def test_scores_that_were_read_at_another_token_are_made_anew(folder, tmp_path):
    """A token that only pads keeps its key; one that a conversation can end with has another."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "w1"}\n')
    write_model(tmp_path / "source")

    def keys(pad: int, **part: Any) -> tuple[str, str]:
        model = with_pad(folder, tmp_path / "reward", pad)
        config = Config(
            output=str(tmp_path / "out"),
            prompts={"path": str(prompts)},
            sources=[{"name": "a", "model": str(tmp_path / "source")}],
            reward={"model": str(model)} | part,
        )
        (score,) = chain.Chain(config, "score").build()[-1].phases[0]
        return score.fingerprint, model_fingerprint(Folder(str(model)))

    kept = [pad for pad in range(VOCABULARY) if len(set(keys(pad))) == 1]
    tokens = make_tokenizer().convert_ids_to_tokens(kept)
    assert tokens == ["<pad>", "<unk>"]
    assert len(set(keys(1, engine="vllm"))) == 1


# --- functions and mixtures --------------------------------------------------------------------


def length(messages, response: str, reference: str | None) -> float:
    """A reward for tests: the words; three are an error, four are infinite."""
    words = len(response.split())
    if words == 3:
        raise ZeroDivisionError("three")
    return float("inf") if words == 4 else words


FUNCTION = f"{__name__}:length"


def test_what_a_function_raises_is_the_rows_error():
    scores = load_reward(RewardConfig(function=FUNCTION), [None]).score(
        [item(1, n) for n in (1, 3, 4)]
    )
    assert scores[0] == 1.0
    assert [type(s) for s in scores[1:]] == [ZeroDivisionError, NotFiniteError]


def test_a_mixture_is_the_weighted_sum_and_fails_with_any_part(folder):
    """2 x words - 0.5 x (is it right) + 0.25 x the classifier's reward, by hand."""
    config = RewardConfig.model_validate(
        {
            "mixture": [
                {"weight": 2, "function": FUNCTION},
                {"weight": -0.5, "verifier": "exact"},
                {"weight": 0.25, "model": "m", "max_length": 60},
            ]
        }
    )
    items = [item(1, 1, "w3"), item(1, 2, "no"), item(1, 3, "w3"), item(1, 2), item(1, 90, "w3")]
    scores = load_reward(config, [None, None, folder]).score(items)
    judged = load_reward(RewardConfig(model="m"), [folder]).score(items[:2])
    assert scores[0] == pytest.approx(2 * 1 - 0.5 * 1 + 0.25 * judged[0], abs=1e-6)
    assert scores[1] == pytest.approx(2 * 2 - 0.5 * 0 + 0.25 * judged[1], abs=1e-6)
    assert [type(s) for s in scores[2:4]] == [ZeroDivisionError, MissingReferenceError]
    assert "above 60" in str(scores[4])


# --- the config --------------------------------------------------------------------------------

JUDGE = {"model": "j", "endpoint": {"url": "http://h/v1"}}


@pytest.mark.parametrize(
    ("reward", "told"),
    [
        ({}, "give exactly one of `model`, `function`, `verifier`, `judge`, `mixture`"),
        ({"model": "m", "verifier": "exact"}, "give exactly one of"),
        ({"function": "a:b", "batch_size": 2}, "batch_size belongs to `model`"),
        ({"model": "m", "code": {"timeout": 1}}, "code belongs to `verifier`"),
        ({"mixture": [{"weight": 1, "model": "m", "judge": JUDGE}]}, "give exactly one of"),
        ({"mixture": [{"model": "m"}]}, "weight: missing"),
        ({"mixture": [{"weight": 1, "mixture": []}]}, "unknown key"),
        ({"mixture": [{"weight": float("inf"), "verifier": "exact"}]}, "finite"),
        ({"judge": JUDGE, "actors": {"max": 2}}, "asked by one actor"),
        (
            {"mixture": [{"weight": 1, "judge": JUDGE}], "actors": {"max": 2}},
            "asked by one actor",
        ),
        ({"verifier": "number"}, "set prompts.columns.reference"),
        ({"mixture": [{"weight": 1, "verifier": "code"}]}, "set prompts.columns.reference"),
    ],
)
def test_a_reward_is_one_thing_with_its_own_settings(tmp_path, reward, told):
    tree = {
        "output": "out",
        "prompts": {"path": "p"},
        "sources": [{"name": "a", "model": "m"}],
        "reward": reward,
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=told):
        load(path)


def scored_step(tmp_path: Path, reward: dict[str, Any]) -> Step:
    """The scoring step of a config with this reward."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a", "reference": "b"}\n')
    if not (tmp_path / "source").is_dir():
        write_model(tmp_path / "source")
    tree = {
        "output": str(tmp_path / "out"),
        "prompts": {"path": str(tmp_path / "prompts.jsonl"), "columns": {"reference": "reference"}},
        "sources": [{"name": "a", "model": str(tmp_path / "source")}],
        "reward": reward,
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return next(step for stage, step, _ in runner.plan(load(path), "score") if stage == "score")


def test_the_store_is_known_by_all_that_decides_a_score(folder, tmp_path):
    template = tmp_path / "judge.jinja"
    template.write_text("{{ answer }} [[5]]?")
    judge = JUDGE | {"template": str(template)}
    part = {"weight": 1, "verifier": "exact"}
    kinds: list[dict[str, Any]] = [
        {"model": str(folder)},
        {"model": str(folder), "engine": "vllm"},
        {"model": str(folder), "overflow": "cut_prompt"},
        {"function": FUNCTION},
        {"verifier": "exact"},
        {"verifier": "number"},
        {"judge": JUDGE},
        {"judge": judge},
        {"judge": JUDGE | {"best": 5}},
        {"judge": JUDGE | {"model": "k"}},
        {"mixture": [part, {"weight": 1, "model": str(folder)}]},
        {"mixture": [part, {"weight": 2, "model": str(folder)}]},
    ]
    keys = [scored_step(tmp_path, kind).folder for kind in kinds]
    assert len(set(keys)) == len(keys)
    assert [scored_step(tmp_path, kind).folder for kind in kinds] == keys
    template.write_text("{{ answer }} [[6]]?")
    assert scored_step(tmp_path, {"judge": judge}).folder != keys[7]


def test_where_and_how_fast_it_scores_is_not_part_of_the_store(folder, tmp_path):
    (tmp_path / "moved").symlink_to(folder)
    one = {"mixture": [{"weight": 1, "model": str(folder), "batch_size": 4}]}
    other = {"mixture": [{"weight": 1, "model": str(tmp_path / "moved")}], "actors": {"max": 3}}
    assert scored_step(tmp_path, one).key == scored_step(tmp_path, other).key
    one = {"judge": JUDGE}
    other = {"judge": JUDGE | {"endpoint": {"url": "http://h/v1", "concurrency": 2}}}
    assert scored_step(tmp_path, one).key == scored_step(tmp_path, other).key


def test_what_cannot_work_is_told_before_any_work(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    endpoint = {"url": "http://h/v1", "key_env": "NO_SUCH_KEY"}
    for reward, told in (
        ({"model": str(tmp_path / "source")}, "LlamaForCausalLM, which gives no reward"),
        ({"mixture": [{"weight": 1, "model": str(tmp_path / "no")}]}, "no such model folder"),
        ({"judge": JUDGE | {"endpoint": endpoint}}, "reward.judge.endpoint: .*NO_SUCH_KEY"),
        ({"judge": JUDGE | {"template": "no.jinja"}}, "no.jinja: cannot be read"),
    ):
        with pytest.raises(UserError, match=told):
            scored_step(tmp_path, reward)


# --- the actor ---------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(Folder(str(tmp_path)), buckets=1)


def answers(run: Run, count: int) -> Samples:
    """One answer of 0, 1, 2... words to each of some prompts, committed."""
    step, source = Step("prompts"), Step("generate-a")
    prompts, rows = [], []
    for n in range(count):
        key = {"prompt_id": records.digest(n)}
        turns = [{"role": "user", "content": str(n)}]
        prompts.append(key | {"split": "sft", "messages": turns, "reference": "x " * n})
        rows.append(key | {"source": "a", "sample": 0, "text": "x " * n})
    write_shard(run.root / step.folder, BUCKET, records.PROMPT, prompts, "all")
    write_shard(run.root / source.folder, BUCKET, records.RESPONSE, rows, "all")
    return Samples(source, Prompts(step, ("sft",)), None)


def rewards(run: Run, job: Score) -> list[float]:
    table = job.samples.read(run.root, BUCKET, records.SCORED)
    return sorted(table["reward"].to_pylist())


def test_scoring_passes_over_what_is_scored_and_keeps_what_fails(run):
    job = Score(answers(run, 6), RewardConfig(function=FUNCTION), (None,), ("function",))
    counts = Scorer(run, [job])(ROW)
    assert (counts["rows"], counts["new"], counts["failed"]) == (4, 4, 2)
    again = Scorer(run, [job])(ROW)
    assert (again["rows"], again["new"], again["failed"]) == (4, 0, 2)
    assert rewards(run, job) == [0, 1, 2, 5]
    kept = read_bucket(job.step.failures(run.root), BUCKET, records.FAILURE).to_pylist()
    assert {r["error"] for r in kept} == {"ZeroDivisionError", "NotFiniteError"}


def test_a_bucket_is_whole_only_if_its_answers_are(run):
    """Where answers are missing yet, a mark would hide the later ones."""
    job = Score(answers(run, 3), RewardConfig(function=FUNCTION), (None,), ("function",))
    store = job.samples.folder(run.root)
    actor = Scorer(run, [job])
    actor.reward = Dying(0)
    assert actor(ROW | {"is_whole": False})["rows"] == 3
    assert marks(store, job.step.key, 1, 3) == {}
    actor(ROW | {"is_whole": True})
    assert list(marks(store, job.step.key, 1, 3)) == [0]
    queue = ReadyQueue([job.answers.step])
    queue.passed_over.add((0, 5))
    for bucket in (4, 5):
        queue.add(job.answers.step, bucket, is_whole=bucket == 5)
    assert list(queue.take()) == [{"job": 0, "bucket": 4, "is_whole": False}]


class Dying:
    """Scores 1.0, and dies at a call."""

    def __init__(self, dies_at: int):
        self.asked: list[str] = []
        self.calls, self.dies_at = 0, dies_at

    def score(self, items: list[Item]) -> list[float | Exception]:
        self.calls += 1
        if self.calls == self.dies_at:
            raise RuntimeError("out of memory")
        self.asked += [i.text for i in items]
        return [1.0] * len(items)


def test_a_crash_loses_only_the_answers_in_hand(run, monkeypatch):
    """100 answers, 32 at once: two are kept when the third fails, and no answer is scored twice."""
    monkeypatch.setattr("wrpo_ray.stages.score.stage.BATCHES", 1)
    job = Score(answers(run, 100), RewardConfig(function=FUNCTION), (None,), ("function",))
    actor = Scorer(run, [job])
    actor.reward = first = Dying(3)
    with pytest.raises(RuntimeError):
        actor(ROW)
    assert len(rewards(run, job)) == 64
    actor.reward = second = Dying(0)
    counts = actor(ROW)
    assert (counts["rows"], counts["new"]) == (100, 36)
    assert sorted(first.asked + second.asked, key=len) == ["x " * n for n in range(100)]


def test_verifiers_and_mixtures_score_buckets_too(run):
    samples = answers(run, 3)
    mixture = RewardConfig(
        mixture=(PartConfig(weight=2, verifier="exact"), PartConfig(weight=1, function=FUNCTION))
    )
    job = Score(samples, mixture, (None, None), ("exact", "function"))
    counts = Scorer(run, [job])(ROW)
    assert (counts["new"], counts["failed"]) == (2, 1)  # the empty reference
    assert rewards(run, job) == [3, 4]
    kept = read_bucket(job.step.failures(run.root), BUCKET, records.FAILURE).to_pylist()
    assert [r["error"] for r in kept] == ["MissingReferenceError"]


def test_a_bucket_tells_who_answers_best_once_all_sources_are_scored(run):
    """Rewards 0, 1, 2 of one source against 2, 1, 0 of the other: the tie counts for both."""
    first, other = answers(run, 3), Step("generate-b")
    rows = [
        {"prompt_id": records.digest(n), "source": "b", "sample": 0, "text": "x " * (2 - n)}
        for n in range(3)
    ]
    write_shard(run.root / other.folder, BUCKET, records.RESPONSE, rows, "all")
    jobs = [
        Score(asked, RewardConfig(function=FUNCTION), (None,), ("function",))
        for asked in (first, Samples(other, first.prompts, None))
    ]
    actor = Scorer(run, jobs)
    told = [actor(ROW), actor(ROW | {"job": 1}), actor(ROW)]
    assert [json.loads(t["wins"]) for t in told] == [[], [2, 2], []]
    assert [t["score_sum"] for t in told] == [3.0, 3.0, 0.0]


def test_a_part_and_then_the_whole_score_each_answer_once(run):
    """Of 100 answers, whose prompts are of two splits; the part has another key in one store."""
    sft = answers(run, 60)
    step, source = sft.prompts.step, sft.step
    others = [{"prompt_id": records.digest(n), "split": "preference"} for n in range(60, 100)]
    write_shard(run.root / step.folder, BUCKET, records.PROMPT, others, "others")
    own = {"source": "a", "sample": 0, "text": "x"}
    rows = [{"prompt_id": row["prompt_id"]} | own for row in others]
    write_shard(run.root / source.folder, BUCKET, records.RESPONSE, rows, "others")
    all_answers = replace(sft, prompts=Prompts(step, ("sft", "preference")))
    whole = Score(all_answers, RewardConfig(function=FUNCTION), (None,), ("function",))
    part = whole.part(sft)
    assert part.step.folder == whole.step.folder
    assert part.step.key != whole.step.key
    actor = Scorer(run, [part, whole])
    actor.reward = first = Dying(0)
    assert actor(ROW)["new"] == len(first.asked) == 60
    actor.reward = second = Dying(0)
    counts = actor(ROW | {"job": 1})
    assert (counts["rows"], counts["new"]) == (100, 40)
    assert set(second.asked) == {"x"}
    assert rewards(run, whole) == [1.0] * 100
    assert rewards(run, part) == [1.0] * 60
