"""Log-probs under a split reference: those of a stored one, in parts that nobody makes again.

One worker with real DeepSpeed in this process; `test_train_workers` has three.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_models import write_model
from test_train_faults import WRPO, _on_cpu, create, rows  # noqa: F401 (fixtures)

from wrpo_ray.config import LoraConfig, ReferenceConfig
from wrpo_ray.errors import UserError
from wrpo_ray.stages.train import model, split_reference
from wrpo_ray.stages.train.loop import Trainer
from wrpo_ray.stages.train.rows import Row
from wrpo_ray.stages.train.task import WRPO_ANSWERS
from wrpo_ray.storage.folder import Folder

SPLIT = WRPO.model_copy(update={"reference": ReferenceConfig(mode="split")})
SMALL = SPLIT.model_copy(update={"micro_batch_tokens": 40})
"""Forward passes of 80 tokens, so about two rows."""
pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("base"), tied=True)


@pytest.fixture
def triples(rows, monkeypatch) -> list[Row]:  # noqa: F811
    """Twelve rows in the order of their prompts; a part has about one micro-batch."""
    monkeypatch.setattr(split_reference, "PART", 1)
    return sorted(rows[WRPO_ANSWERS], key=lambda row: row.prompt_id)


@pytest.fixture
def seen(monkeypatch) -> list[int]:
    """Rows of each forward pass of a split reference from now on."""
    found: list[int] = []
    forward = Trainer.logps_without_adapters

    def counted(trainer: Trainer, batch: Any) -> torch.Tensor:
        found.append(len(batch.lengths) // len(WRPO_ANSWERS))
        return forward(trainer, batch)

    monkeypatch.setattr(Trainer, "logps_without_adapters", counted)
    return found


def parts(folder: Path) -> Folder:
    return split_reference.folder_of(Folder(str(folder / "rows")), SMALL)


def bounds(folder: Path) -> list[tuple[int, ...]]:
    names = parts(folder).files()
    return [tuple(map(int, name.removesuffix(".npy").split("-"))) for name in names]


def stored(base: Path, triples: list[Row], config: Any) -> np.ndarray:
    return np.array([row.reference for row in model.Reference(base, config, False)(triples)])


@pytest.mark.parametrize(
    ("change", "close"),
    [
        ({"zero_stage": 3}, 1e-4),
        ({"zero_stage": 0, "packing": False}, 1e-4),
        ({"zero_stage": 3, "lora": LoraConfig(rank=2), "gradient_checkpointing": True}, 1e-4),
        ({"zero_stage": 3, "precision": "bf16", "offload": "all"}, 0.3),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_they_are_those_of_a_stored_reference(tmp_path, base, triples, change, close):
    """Also of rows held out, and for the losses of a whole run."""
    config = SMALL.model_copy(update=change | {"holdout": 0.3})
    want = stored(base, triples, config)
    trainer = create(tmp_path, base, triples, config)
    assert len(trainer.held_rows)
    assert trainer.reference is None
    got = [trainer.rows[i].reference for i in range(len(triples))]
    np.testing.assert_allclose(got, want, rtol=0, atol=close)
    spread = np.abs(want - want.mean(0)).max()
    assert spread > 10 * close  # so that a row's log-probs are no other row's
    trainer.run(0)
    again = create(tmp_path / "again", base, triples, config)
    np.testing.assert_array_equal(again.rows.reference, trainer.rows.reference)


def test_a_killed_run_goes_on_after_its_last_part(tmp_path, base, triples, monkeypatch, seen):
    """A fault in the third part; the two before are neither made nor written again."""
    whole = create(tmp_path / "whole", base, triples, SMALL).rows.reference
    everything = list(seen)
    assert sum(everything) == len(triples)
    assert len(bounds(tmp_path / "whole")) >= 4
    seen.clear()
    write = split_reference._write

    def failing(folder: Folder, name: str, part: np.ndarray) -> None:
        if len(folder.files()) == 2:
            raise OSError("no space")
        write(folder, name, part)

    with monkeypatch.context() as patch:
        patch.setattr(split_reference, "_write", failing)
        with pytest.raises(OSError, match="no space"):
            create(tmp_path / "cut", base, triples, SMALL)
    before = {name: parts(tmp_path / "cut").read(name) for name in parts(tmp_path / "cut").files()}
    assert len(before) == 2
    assert split_reference.rows_done(parts(tmp_path / "cut")) == bounds(tmp_path / "cut")[1][1]
    # log-probs that no model gives show who made them
    first = min(before)
    marked = np.full((bounds(tmp_path / "cut")[0][1], 3), -7.0)
    split_reference._write(parts(tmp_path / "cut"), first, marked)
    seen.clear()
    got = create(tmp_path / "cut", base, triples, SMALL).rows.reference
    assert sum(seen) == len(triples) - bounds(tmp_path / "cut")[1][1]
    np.testing.assert_array_equal(got[: len(marked)], marked)
    np.testing.assert_array_equal(got[len(marked) :], whole[len(marked) :])
    assert bounds(tmp_path / "cut") == bounds(tmp_path / "whole")


def test_other_trainings_on_the_rows_find_them(tmp_path, base, triples, seen):
    """Another beta does; another precision has its own."""
    create(tmp_path, base, triples, SMALL)
    seen.clear()
    create(tmp_path, base, triples, SMALL.model_copy(update={"beta": 2.0}))
    assert seen == []
    create(tmp_path, base, triples, SMALL.model_copy(update={"precision": "bf16"}))
    assert sum(seen) == len(triples)


@pytest.mark.parametrize("data", [b"", b"\x93NUMPY\x01\x00v\x00", b"no array", "short", "wide"])
def test_a_damaged_part_is_made_again(tmp_path, base, triples, seen, data):
    whole = create(tmp_path, base, triples, SMALL).rows.reference
    (first, end), *_ = bounds(tmp_path)[1:]
    name = f"{first:012}-{end:012}.npy"
    arrays = {"short": np.zeros((end - first + 1, 3)), "wide": np.zeros((end - first, 4))}
    if isinstance(data, str):
        split_reference._write(parts(tmp_path), name, arrays[data])
    else:
        parts(tmp_path).write(name, data)
    got = create(tmp_path, base, triples, SMALL).rows.reference
    np.testing.assert_array_equal(got, whole)
    seen.clear()
    np.testing.assert_array_equal(create(tmp_path, base, triples, SMALL).rows.reference, whole)
    assert seen == []


def test_parts_of_other_numbers_of_workers_fit_together(tmp_path):
    """Rows 0 to 11 lie in overlapping files, 14 on in one that does not continue them."""
    values = np.arange(60.0).reshape(20, 3)
    for first, end in ((0, 4), (0, 6), (2, 5), (5, 12), (14, 20)):
        split_reference._write(
            Folder(str(tmp_path)), f"{first:012}-{end:012}.npy", values[first:end]
        )
    got = np.zeros((20, 3))
    assert split_reference._read(Folder(str(tmp_path)), got) == 12
    assert split_reference.rows_done(Folder(str(tmp_path))) == 12
    np.testing.assert_array_equal(got[:12], values[:12])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_log_prob_that_is_not_finite_is_named(tmp_path, base, triples, monkeypatch, value):
    """Its part is not written, those before are."""
    forward, collate, spoilt = Trainer.logps_without_adapters, model.collate, triples[5]
    ids: list[str] = []

    def note(part: list[Row], config: Any) -> Any:
        ids[:] = [row.prompt_id for row in part]
        return collate(part, config)

    def spoil(trainer: Trainer, batch: Any) -> torch.Tensor:
        logps = forward(trainer, batch).reshape(-1, 3)
        if spoilt.prompt_id in ids:
            logps[ids.index(spoilt.prompt_id), 1] = value
        return logps.reshape(-1)

    monkeypatch.setattr(model, "collate", note)
    monkeypatch.setattr(Trainer, "logps_without_adapters", spoil)
    with pytest.raises(UserError) as caught:
        create(tmp_path, base, triples, SMALL)
    what = f"the log-prob of target_chosen under the reference of prompt {spoilt.prompt_id} is"
    assert f"{what} {value}; look at the row" in str(caught.value)
    assert 0 < bounds(tmp_path)[-1][1] <= 5


def test_a_weight_that_is_not_finite_is_named_first(tmp_path, base, triples):
    trainer = create(tmp_path, base, triples, SMALL.model_copy(update={"zero_stage": 0}))
    name, parameter = next(
        (n, p) for n, p in trainer.policy.module.named_parameters() if "layers.0" in n
    )
    parameter.data.view(-1)[-1] = math.inf
    trainer.task.rows.delete("reference-fp32")
    with pytest.raises(UserError, match=f"the weight {name.removeprefix('model.')} is not finite"):
        split_reference.logps_of_all(trainer)
