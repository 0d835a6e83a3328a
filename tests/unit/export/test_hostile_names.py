"""Names that came from a file, through every output: cards, tables, logs, errors, the status."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from support.hostile import NAMES

from wrpo_ray.cli.exits import fail
from wrpo_ray.data.outline import Outline, StepOutline
from wrpo_ray.data.records import failure
from wrpo_ray.export import dataset_card, model_card
from wrpo_ray.export.card_parts import CardFacts, CardModel, license_of
from wrpo_ray.export.forms import Form
from wrpo_ray.export.model_card import ModelCardFacts
from wrpo_ray.export.statistics import Statistics
from wrpo_ray.report import benchmark_table
from wrpo_ray.report.page import template
from wrpo_ray.report.status import screen, status
from wrpo_ray.report.text import failures_text, summary_text
from wrpo_ray.runtime.progress import log
from wrpo_ray.storage.folder import Folder
from wrpo_ray.text.display import one_line

STEERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800]")
ESTIMATE = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 3}
SURROGATE = "\ud800"
"""No file in UTF-8 holds it."""


def facts(name: str) -> CardFacts:
    models = [CardModel(role, name, name, name, name) for role in ("source", "target", "reward")]
    steps = [{"step": name, "counts": {"rows": 1, f"dropped.{name}": 2}}]
    failed = [{"step": name, "error": name, "rows": 1, "message": name}]
    return CardFacts(models, {"sampling": {name: name}}, steps, failed, {name: name})


def of_data(name: str) -> str:
    counted = Statistics(None, rows=3, wins=Counter({name: 3}))
    return dataset_card.card(Form(), counted, facts(name))


def of_model(name: str) -> str:
    base = CardModel("target", name, name, name, name)
    held_out = {"accuracy": {"models": {"fused": {"all": ESTIMATE}, name: {"all": ESTIMATE}},
                             "contrasts": {name: ESTIMATE}}}  # fmt: skip
    made = ModelCardFacts(name, base, None, {"sft": {name: name}}, held_out)
    return model_card.card(made, facts(name))


def comparison(name: str) -> dict[str, Any]:
    pair = dict.fromkeys(("win", "tie", "loss", "win_rate", "length_controlled"), ESTIMATE)
    return {"judge": name, "benchmarks": {},
            "pairs": [pair | {"a": name, "b": name, "by": name, "failed": 0}]}  # fmt: skip


def compared(name: str) -> str:
    return benchmark_table.markdown(comparison(name))


@pytest.mark.parametrize("made", [of_data, of_model, compared])
def test_a_page_in_markdown_has_the_same_parts_whatever_a_name_is(made: Callable[[str], str]):
    """No heading, link, picture, HTML, cell or block more than with a plain name."""
    parser = MarkdownIt("gfm-like", {"html": True, "linkify": False})

    def parts(name: str) -> list[str]:
        body = made(name).split("\n---\n", 1)[-1]
        assert not STEERS.search(body)
        tokens = parser.parse(body)
        inner = [child.type for token in tokens for child in token.children or ()]
        kept = [kind for kind in inner if kind not in ("text", "text_special", "softbreak")]
        return [token.type for token in tokens] + kept

    plain = parts("plain")
    for name in NAMES:
        if name != SURROGATE:
            assert parts(name) == plain, name


def test_a_licence_in_the_metadata_of_a_card_is_one_value(tmp_path):
    for name in NAMES:
        if name != SURROGATE:
            front = of_data(name).split("\n---\n", 1)[0].removeprefix("---\n")
            assert yaml.safe_load(front)["license"] == name
        (tmp_path / "config.json").write_text(json.dumps({"license": name}))
        assert license_of("m", None, Folder(str(tmp_path))) == one_line(name)


def test_a_page_in_html_has_no_tag_of_a_name():
    for name in NAMES:
        page = benchmark_table.html(comparison(name))
        assert "<script" not in page
        assert "<img" not in page
    assert template("report.html").environment.autoescape is True


def summaries(name: str) -> list[str]:
    models = {name: {"all": ESTIMATE, name: ESTIMATE}}
    accuracy = {"models": models, "contrasts": {name: ESTIMATE}}
    held_out = {"groups": ["all", name], "accuracy": accuracy}
    step = {"stage": name, "step": "select", "state": "done", "rows_out": 1,
            "counts": {"rows": 1, "ties": 0, f"wins.{name}": 1}}  # fmt: skip
    summary = {"steps": [step], "evaluation": held_out, "output": "out"}
    failed = [{"step": name, "error": name, "rows": 1, "attempts": 1, "where": name,
               "prompt_id": name, "message": name, "folder": "x"}]  # fmt: skip
    return [
        summary_text(summary),
        failures_text(failed),
        benchmark_table.comparison_text(comparison(name)),
    ]


def test_tables_have_the_same_lines_whatever_a_name_is():
    plain = [text.count("\n") for text in summaries("plain")]
    for name in NAMES:
        found = summaries(name)
        assert [text.count("\n") for text in found] == plain, name
        assert not any(STEERS.search(text) for text in found)


def test_logs_and_errors_are_lines_whatever_a_name_is(capsys):
    for name in NAMES:
        log(f"{name}: read")
        fail(f"model {name}: no", 2)
        told = capsys.readouterr().err
        assert not STEERS.search(told), name
        own = sum(line.startswith("wrpo: error: ") for line in told.splitlines())
        assert own == name.count("\n") + 1  # none looks as if it were another's


def test_the_status_of_a_strangers_run(tmp_path):
    """Its names are neither codes nor markup, which rich would also obey."""
    from rich.console import Console

    for name in [*NAMES, "[red]", "[/]", "[link=http://evil]x[/link]"]:
        steps = (StepOutline(name, name, "k", "folder", "manifest", "select"),)
        found = status(Folder(str(tmp_path)), Outline("select", 4, {}, {}, steps))
        shown = io.StringIO()
        Console(file=shown, width=200).print(screen(found))
        assert not STEERS.search(shown.getvalue()), name
        assert shown.getvalue().count("\n") == 9
        assert "[" not in name or "[" in shown.getvalue()


def test_a_failed_row_keeps_no_secret_of_an_address():
    """Such as a proxy's of the environment, which a library quotes."""
    row = failure("generate", OSError("cannot connect to proxy http://me:Xyzzy@proxy:3128/"))
    assert "Xyzzy" not in row["message"]
    assert "proxy" in row["message"]
