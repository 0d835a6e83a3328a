"""Fixtures of several unit tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.shared_data import DATA


@pytest.fixture
def shared() -> Path:
    """The folder of real data; a test that needs it is skipped without."""
    if not DATA.is_dir():
        pytest.skip("no real data beside the repository, nor named by WRPO_TEST_DATA")
    return DATA


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> Callable[[torch.dtype], None]:
    """Makes transformers compute in float64 throughout: norms and softmaxes are cast to fp32."""

    def widen(dtype: torch.dtype) -> None:
        if dtype == torch.float64:
            monkeypatch.setattr(torch, "float32", torch.float64)
            monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)

    return widen


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one worker, with one thread; DeepSpeed takes one group a process."""
    torch.set_num_threads(1)
    store = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
