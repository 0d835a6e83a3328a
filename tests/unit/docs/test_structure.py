"""Limits of the code's structure, and the tree in the documentation."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / "wrpo_ray").rglob("*.py"))
LONGEST_MODULE, LONGEST_FUNCTION = 400, 50


def functions(file: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All functions and methods of a file."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_modules_and_functions_are_short(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= LONGEST_MODULE
    lengths = {f.name: (f.end_lineno or 0) - f.lineno + 1 for f in functions(file)}
    assert {name: n for name, n in lengths.items() if n > LONGEST_FUNCTION} == {}


def test_docstrings_say_what_something_is_and_do_not_begin_with_what() -> None:
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    found = []
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, kinds) and (ast.get_docstring(node) or "").startswith("What "):
                found.append(f"{file.relative_to(ROOT)}: {ast.get_docstring(node)}")
    assert found == []


def test_the_tree_in_the_documentation_is_the_tree_of_the_package(monkeypatch) -> None:
    """`python docs/hooks.py` writes it."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "docs"), *sys.path])
    import hooks

    page = hooks.ARCHITECTURE.read_text()
    assert hooks.with_tree(page) == page


def test_no_two_files_of_tests_have_one_name() -> None:
    """pytest imports them by their names alone, and refuses the second of a name."""
    names = Counter(file.name for file in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, number in names.items() if number > 1] == []
