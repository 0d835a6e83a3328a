"""The public Python API: an instant import, documented names, and the notebook."""

from __future__ import annotations

import doctest
import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

import wrpo_ray

ROOT = Path(__file__).parents[3]
NOTEBOOK = ROOT / "docs" / "notebooks" / "pairs-to-training.ipynb"
PUBLIC = sorted(wrpo_ray._MODULES)


def test_the_import_loads_nothing_but_the_package_itself() -> None:
    script = (
        "import sys; before = set(sys.modules); import wrpo_ray; "
        "new = {n.partition('.')[0] for n in set(sys.modules) - before}; "
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    command = [sys.executable, "-S", "-c", script]  # -S: site-packages may import on their own
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['wrpo_ray']"


def test_all_lists_the_public_names() -> None:
    assert sorted(wrpo_ray.__all__) == sorted(["__version__", *PUBLIC])
    assert dir(wrpo_ray) == sorted(wrpo_ray.__all__)


def test_no_public_name_is_hidden_by_a_module_of_the_package() -> None:
    modules = {path.stem for path in (ROOT / "wrpo_ray").iterdir()}
    assert not modules & set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_name_has_a_docstring_with_an_example_that_holds(name) -> None:
    value = getattr(wrpo_ray, name)
    module = importlib.import_module(f"wrpo_ray.{wrpo_ray._MODULES[name]}")
    assert value is getattr(module, name)
    names = vars(module) | {public: getattr(wrpo_ray, public) for public in PUBLIC}
    (test,) = doctest.DocTestFinder(recurse=False).find(value, name, globs=names)
    assert test.examples, f"{name}: its docstring has no example"
    assert doctest.DocTestRunner(verbose=False).run(test).failed == 0


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        wrpo_ray.nothing  # noqa: B018


def test_the_notebook_runs_and_its_first_loss_is_ln_2(monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, 4)
    folder = {"metadata": {"path": str(ROOT)}}
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources=folder
    ).execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    assert any("image/png" in out.get("data", {}) for out in outputs)
    (losses,) = (
        out["data"] for out in outputs if "loss" in out.get("data", {}).get("text/plain", "")
    )
    first = losses["text/plain"].splitlines()[1].split()
    assert float(first[2]) == pytest.approx(math.log(2), abs=1e-3)


def test_the_notebook_in_the_repository_shows_its_picture() -> None:
    notebook = json.loads(NOTEBOOK.read_text())
    shown = [out for cell in notebook["cells"] for out in cell.get("outputs", ())]
    assert any("image/png" in out.get("data", {}) for out in shown)
    assert not any(out["output_type"] == "error" for out in shown)
