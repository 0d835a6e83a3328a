"""Names that outputs hold: they stay although classes, modules and comments change."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import pytest

import wrpo_ray
from wrpo_ray.config import CodeConfig, RewardConfig
from wrpo_ray.data.records import error_name
from wrpo_ray.pipeline.identities import scorer_fingerprint
from wrpo_ray.stages.score.base import Item
from wrpo_ray.stages.score.verifiers import VERSIONS, load_verifier
from wrpo_ray.storage.fingerprints import digest

RECORDED = {
    *("AccessError", "AnswerTimeoutError", "BadReferenceError", "BadTestsError"),
    *("ConnectionFaultError", "ContentFilterError", "CutAnswerError", "EndpointError"),
    *("ListOfTestsError", "MalformedAnswerError", "MissingReferenceError", "ModelRefusalError"),
    *("NoAnswerError", "NoChoiceError", "NoRatingError", "NoTextError", "NoTurnError"),
    *("NoVerdictError", "NotFiniteError", "NotJudgedError", "PromptTooLongError"),
    *("RateLimitedError", "RefusedError", "RowError", "SandboxError", "ServerFaultError"),
    *("SpelledTokenError", "TemplateError", "TokenizeError", "TooLong", "TooLongError"),
    *("ToolCallError", "UnknownEndError", "UnusableAnswerError", "WrongChoiceError"),
    "WrongShapeError",
}
"""The project's own errors that failure rows may name. A class that is renamed states the name that
it had as `recorded_as`."""
CHECKED = {
    "exact": [("  Paris.\n", "PARIS"), ("Paris, France", "Paris"), ("ﬁne", "fine"), ("1.0", "1")],
    "number": [("so $1,234.50", "1234.5"), ("x = -7", "7"), ("\\frac{1}{2}", "0.5"), ("no", "3")],
}


def own_errors() -> dict[str, type[Exception]]:
    """The package's error classes by the name that failure rows hold."""
    found: dict[str, type[Exception]] = {}
    for module in pkgutil.walk_packages(wrpo_ray.__path__, "wrpo_ray."):
        if module.name.endswith("__main__"):
            continue
        for value in vars(importlib.import_module(module.name)).values():
            is_error = isinstance(value, type) and issubclass(value, Exception)
            if is_error and value.__module__.startswith("wrpo_ray."):
                found[getattr(value, "recorded_as", value.__name__)] = value
    return found


def test_errors_keep_the_names_that_failure_rows_hold() -> None:
    assert own_errors().keys() >= RECORDED


def test_a_renamed_error_is_recorded_by_the_name_that_it_had() -> None:
    class NewError(ValueError):
        recorded_as = "OldError"

    assert error_name(NewError()) == "OldError"
    assert error_name(KeyError()) == "KeyError"


@pytest.mark.parametrize("name", ["exact", "number"])
def test_a_verifier_of_a_version_finds_the_same_right(name) -> None:
    """Where this fails, change the version in `VERSIONS`, and record anew."""
    pairs = [Item([{"role": "user", "content": "q"}], *pair) for pair in CHECKED[name]]
    outcomes = load_verifier(name, CodeConfig()).score(pairs)
    assert (VERSIONS[name], outcomes) == ("2", [1.0, 0.0, 1.0, 0.0])


def module_of(folder: Path, text: str) -> str:
    (folder / "mine.py").write_text(text)
    return "mine:reward"


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    importlib.sys.modules.pop("mine", None)


def key(folder: Path, text: str) -> str:
    importlib.sys.modules.pop("mine", None)
    importlib.invalidate_caches()
    return scorer_fingerprint(RewardConfig(function=module_of(folder, text)))


BODY = "def reward(messages, response, reference):\n    return 1.0\n"


def test_a_function_without_a_version_is_known_by_its_source(in_folder) -> None:
    assert key(in_folder, BODY) != key(in_folder, BODY + "# a comment\n")


def test_a_function_with_a_version_is_known_by_it_alone(in_folder) -> None:
    one, two = (BODY + f"reward.version = {v!r}\n" for v in ("1", "2"))
    assert key(in_folder, one) == key(in_folder, one + "# a comment\n") != key(in_folder, two)
    assert key(in_folder, one) == digest(["mine:reward", "1"], 16)
