"""The output of a fusion run, written quickly and without running anything, for any number of rows.

It has what a run of three sources leaves: records in their schemas, manifests, ledger, metrics,
tables. Texts may be hostile (`texts`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from wrpo_ray.data import records
from wrpo_ray.data.buckets import Bucket, buckets
from wrpo_ray.data.failures import write_failures
from wrpo_ray.data.outline import Outline, StepOutline
from wrpo_ray.storage.folder import Folder

SENTENCE = "the a model learns from answers that others give and rewards say which is better"
WORDS = SENTENCE.split()
FINISHED = "2026-01-02T03:{:02}:00Z"
MODELS = ("target", "target-sft", "target-dpo", "fused")


@dataclass
class MadeRun:
    """Where and what to write."""

    folder: Path
    rows: int = 240
    """Prompts with a pair; half as many have none."""
    buckets: int = 8
    sources: Sequence[str] = ("llama", "qwen", "gemma")
    samples: int = 2
    texts: Sequence[str] = ()
    """What stands in prompts and answers, else some words."""
    seed: int = 0
    margin: float = 0.0
    """What training gains beside the usual."""

    def __post_init__(self) -> None:
        self.root = Folder(str(self.folder))
        self.random = np.random.default_rng(self.seed)
        self.steps: list[StepOutline] = []
        self.turn = 0

    def write(self) -> Outline:
        """All of it; returns the outline."""
        each = -(-self.rows // self.buckets)
        prompts, stores = self._step("prompts", "prompts", "ingestprompts"), []
        kept = {"prompts": prompts.key, "samples": self.samples, "splits": ("preference",)}
        for name in self.sources:
            self._step("generate", f"generate-{name}", "generate", source=name, **kept)
        for name in self.sources:
            step = self._step("score", f"score-reward-{name}", "score", source=name, **kept)
            stores.append(step.folder)
        name = "target-sft"
        self._step("sample", f"generate-{name}", "generate", source=name, **kept)
        step = self._step("sample", f"score-reward-{name}", "score", source=name, **kept)
        stores.append(step.folder)
        for bucket in buckets(self.buckets):
            self._shards(bucket, self._table(bucket, each), stores, each)
        wins = {f"wins.{n}": self.rows // (i + 1) for i, n in enumerate(self.sources)}
        counts = {"rows": sum(wins.values()), "ties": 7, "answers.empty.qwen": 3}
        self._step("select", "select", "select", stores=stores[:-1], counts=wins | counts)
        counts = {"rows": each * self.buckets, "prompts": self.rows, "dropped.equal_reward": 11}
        self._step("pair", "pair", "pair", stores=stores, counts=counts)
        self._train("sft", "sft", 60)
        self._train("train", "wrpo", 900)
        self._evaluation()
        self._failures(stores[0])
        self._ledger(stores)
        outline = Outline("evaluate", self.buckets, self._config(), {}, tuple(self.steps))
        outline.write(self.root)
        return outline

    # --- steps

    def _step(self, stage: str, name: str, kind: str, **about: Any) -> StepOutline:
        key, counts = records.digest([name, stage], 12), about.pop("counts", {"rows": self.rows})
        stores = tuple(about.pop("stores", ()))
        folder = f"{name}-{key}"
        if kind == "score":
            stores = (folder,)
        step = StepOutline(stage, name, key, folder, "manifest.json", kind, stores=stores, **about)
        self.steps.append(step)
        record = {
            "step": name, "key": key, "config": {}, "inputs": [], "counts": counts,
            "seconds": 30.5, "finished": FINISHED.format(len(self.steps)),
            "versions": {"python": "3.11"},
        }  # fmt: skip
        (self.root / folder).write_json("manifest.json", record)
        return step

    def _text(self, count: int) -> list[str]:
        if self.texts:
            self.turn += 1
            return [self.texts[(i + self.turn) % len(self.texts)] for i in range(count)]
        picks = self.random.integers(0, len(WORDS), (min(count, 512), 12))
        texts = [" ".join(WORDS[i] for i in row) for row in picks]
        return [texts[i % len(texts)] for i in range(count)]

    def _table(self, bucket: Bucket, each: int) -> pa.Table:
        """PREFERENCE records of a bucket, sorted."""
        ids = [f"{k * self.buckets + bucket.index:08x}{k:024x}" for k in range(each)]
        names = (*self.sources, "target-sft")
        rewards = self.random.normal(0, 1, (each, len(names), self.samples))
        best = rewards[:, :-1].reshape(each, -1).argmax(1)
        own = rewards[:, -1]
        top = rewards[:, :-1].reshape(each, -1).max(1)
        picked = [
            (np.array(self.sources)[best // self.samples], best % self.samples, top),
            (np.full(each, "target-sft"), own.argmax(1), own.max(1)),
            (np.full(each, "target-sft"), own.argmin(1), own.min(1)),
        ]
        count = len(names) * self.samples
        scores = {
            "source": np.tile(np.repeat(names, self.samples), each),
            "sample": np.tile(np.arange(self.samples, dtype=np.int32), each * len(names)),
            "reward": rewards.ravel(),
        }
        offsets = pa.array(np.arange(0, each * count + 1, count, dtype=np.int32))
        structs = pa.StructArray.from_arrays(
            [pa.array(v) for v in scores.values()], fields=list(records.CANDIDATES.value_type)
        )
        candidates = pa.ListArray.from_arrays(offsets, structs, type=records.CANDIDATES)
        columns = {
            "prompt_id": pa.array(ids),
            "messages": pa.array(
                [[{"role": "user", "content": t}] for t in self._text(each)], records.MESSAGES
            ),
            **{
                role: self._answers(*answer)
                for role, answer in zip(
                    ("source_chosen", "target_chosen", "rejected"), picked, strict=True
                )
            },
            "source_margin": pa.array(top - own.max(1)),
            "target_margin": pa.array(own.max(1) - own.min(1)),
            "candidates": candidates,
        }
        return pa.table(columns, schema=records.PREFERENCE)

    def _answers(self, sources: Any, samples: Any, rewards: Any) -> pa.StructArray:
        texts = self._text(len(sources))
        parts = {
            "text": pa.array(texts),
            "token_ids": _tokens([len(t.split()) for t in texts]),
            "finish_reason": pa.array(["stop"] * len(texts)),
            "source": pa.array(sources, pa.string()),
            "sample": pa.array(samples, pa.int32()),
            "reward": pa.array(rewards, pa.float64()),
        }
        return pa.StructArray.from_arrays(list(parts.values()), fields=list(records.ANSWER))

    def _shards(self, bucket: Bucket, table: pa.Table, stores: list[str], each: int) -> None:
        """Prompts, preference rows, selection rows (half as many more), and scored answers."""
        pair = f"pair-{records.digest(['pair', 'pair'], 12)}"
        (self.root / pair).write_table(bucket.shard("all"), table)
        select = f"select-{records.digest(['select', 'select'], 12)}"
        chosen = table.select(["prompt_id", "messages", "source_chosen", "candidates"])
        split = pa.array(["preference"] * len(table))
        selection = chosen.add_column(2, "split", split).cast(records.SELECTION)
        more = selection.slice(0, each // 2)
        others = [f"{bucket.index:08x}f{k:023x}" for k in range(len(more))]
        more = more.set_column(0, "prompt_id", pa.array(others, pa.string()))
        more = more.set_column(2, "split", pa.array(["sft"] * len(more)))
        both = pa.concat_tables([selection, more.cast(records.SELECTION)])
        (self.root / select).write_table(bucket.shard("all"), both)
        unknown = pa.nulls(len(both), pa.string())
        prompts = [*both.select(["prompt_id", "messages", "split"]).columns, unknown, unknown]
        folder = self.root / f"prompts-{records.digest(['prompts', 'prompts'], 12)}"
        folder.write_table(bucket.shard("all"), pa.table(prompts, schema=records.PROMPT))
        for number, store in enumerate(stores):
            name = (*self.sources, "target-sft")[number]
            self._store(bucket, table, store, name, number)

    def _store(self, bucket: Bucket, table: pa.Table, store: str, name: str, number: int) -> None:
        count = len(table) * self.samples
        flat = table["candidates"].combine_chunks().flatten().field("reward").to_numpy()
        grid = flat.reshape(len(table), -1, self.samples)[:, number].ravel()
        ids = np.repeat(table["prompt_id"].to_numpy(), self.samples)
        texts = self._text(count)
        columns: dict[str, Any] = dict.fromkeys(records.SCORED.names)
        columns |= {
            "prompt_id": ids, "source": [name] * count, "text": texts,
            "sample": np.tile(np.arange(self.samples), len(table)),
            "finish_reason": ["stop"] * count, "prompt_tokens": np.full(count, 12),
            "output_tokens": self.random.integers(3, 60, count), "reward": grid,
        }  # fmt: skip
        arrays = [
            pa.array(columns[f.name], f.type) if columns[f.name] is not None
            else pa.nulls(count, f.type)
            for f in records.SCORED
        ]  # fmt: skip
        scored = pa.Table.from_arrays(arrays, schema=records.SCORED)
        (self.root / store).write_table(bucket.shard("all"), scored)

    # --- files

    def _train(self, stage: str, name: str, steps: int) -> None:
        step = self._step(stage, name, "train", counts={"rows": self.rows, "steps": steps})
        lines = []
        for i in range(steps):
            gain = (1 + self.margin) * (1 - math.exp(-4 * i / steps))
            noise = self.random.normal(0, 0.05, 8).tolist()
            record = {
                "step": i, "steps": steps, "rows": 16, "loss": 0.693 - 0.4 * gain + noise[0],
                "lr": 1e-4, "grad_norm": 1 + abs(noise[1]), "tokens": 4000,
                "tokens_per_s": 900 + 100 * noise[2],
            }  # fmt: skip
            if name != "sft":
                record |= {
                    "alpha": 0.1 * i / steps, "rewards/source_chosen": 0.4 * gain + noise[3],
                    "rewards/target_chosen": 0.5 * gain + noise[4],
                    "rewards/rejected": -0.6 * gain + noise[5],
                    "rewards/margins": 1.1 * gain + noise[6],
                    "rewards/accuracies": min(1, 0.5 + 0.4 * gain + noise[7]),
                }  # fmt: skip
            lines.append(json.dumps(record) + "\n")
        (self.root / step.folder).write("metrics.jsonl", "".join(lines).encode())

    def _evaluation(self) -> None:
        step = self._step("evaluate", "evaluate", "evaluate")
        models = (*self.sources, *MODELS)
        groups = ["easy", "hard", "all"]
        table: dict[str, Any] = {"groups": groups}
        for measure, scale in (("accuracy", 1.0), ("reward", 3.0)):
            means = {m: scale * (0.3 + 0.05 * i) for i, m in enumerate(models)}
            table[measure] = {
                "models": {m: dict.fromkeys(groups, _estimate(v)) for m, v in means.items()},
                "contrasts": {"fused - target": _estimate(means["fused"] - means["target"])},
            }
        (self.root / step.folder).write_json("table.json", table)

    def _failures(self, store: str) -> None:
        step = next(s for s in self.steps if s.folder == store)
        error = ValueError(self.texts[0] if self.texts else "the answer is longer than the reward")
        row = records.failure("score", error, prompt_id="0" * 32, source="llama", sample=1)
        write_failures(step.failures(self.root), Bucket(0, self.buckets), [row], "all")

    def _ledger(self, stores: list[str]) -> None:
        spent = {"rows": self.rows, "prompt_tokens": 900, "output_tokens": 5000}
        spent |= {"actor_seconds": 7200.0, "gpu_seconds": 7200.0}
        generated = [s.folder for s in self.steps if s.kind == "generate"]
        steps = {folder: {"pool": "x"} | spent for folder in [*generated, *stores]}
        self.root.write_json("ledger.json", {"seconds": 9000.0, "open": False, "steps": steps})
        plan = {"rows": self.rows, "output_tokens": 4500, "gpu_hours": 1.8, "money": 3.6}
        self.root.write_json("plan.json", {s.key: plan | {"seconds": 28.0} for s in self.steps})

    def _config(self) -> dict[str, Any]:
        return {
            "output": str(self.folder), "seed": self.seed,
            "sources": [{"name": n, "model": f"models/{n}"} for n in self.sources],
            "target": {"name": "target", "model": "models/target"},
            "reward": {"name": "reward"}, "prices": {"gpu_hour": 2.0},
            "split": {"sft": 0.0}, "wrpo": {"beta": 0.01 * (self.seed + 1)},
        }  # fmt: skip


def _tokens(lengths: list[int]) -> pa.ListArray:
    """Lists of so many ones."""
    offsets = np.append(0, np.cumsum(lengths)).astype(np.int32)
    ones = pa.array(np.ones(offsets[-1], np.int32))
    return pa.ListArray.from_arrays(pa.array(offsets), ones, type=records.TOKENS)


def _estimate(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.02, "high": mean + 0.02, "n": 500}
