"""Reports: histograms in parts, facts and pages of a made output; what models write is text."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.in_browser import look
from support.made_run import MadeRun

from wrpo_ray import cli
from wrpo_ray.data.buckets import Bucket
from wrpo_ray.data.outline import StepOutline, read_outline
from wrpo_ray.errors import UserError
from wrpo_ray.pipeline import outputs as reports
from wrpo_ray.report import compare_runs as comparing
from wrpo_ray.report import page, sample
from wrpo_ray.report.facts import _by_reward, gather
from wrpo_ray.report.histogram import MOST, Histogram, shown
from wrpo_ray.report.live import Reporter
from wrpo_ray.report.plots import Palette, bars, number, svg
from wrpo_ray.report.sample import Distributions
from wrpo_ray.report.view import _places, busy
from wrpo_ray.storage.folder import Folder

HOSTILE = (
    "</script><script>window.hit = 1</script>",
    "<img src=x onerror='window.hit = 2'><!-- <script> ]]> \u2028 {{ 7 * 7 }} $x_y^z$",
    "\"'`&lt;b&gt; </textarea></style></svg>" + "😀",
)
NUMBERS = st.floats(-1e9, 1e9, allow_subnormal=False)


# --- histograms ------------------------------------------------------------------------------


@given(st.lists(st.lists(NUMBERS, max_size=40), min_size=1, max_size=6))
def test_merged_histograms_are_that_of_the_whole(parts):
    whole = Histogram.of(np.array([v for part in parts for v in part]))
    merged = sum((Histogram.of(np.array(part)) for part in parts), Histogram())
    assert (merged.exponent, merged.counts) == (whole.exponent, whole.counts)
    assert (merged.low, merged.high) == (whole.low, whole.high)
    assert merged.total == pytest.approx(whole.total, abs=1e-3)
    assert len(whole.counts) <= MOST
    assert Histogram.read(json.loads(json.dumps(merged.record()))) == merged


def test_a_histogram_counts_by_hand():
    histogram = Histogram.of(np.array([0.0, 1.0, 1.0, np.nan, np.inf]))
    assert (histogram.n, histogram.mean) == (3, pytest.approx(2 / 3))
    assert histogram.exponent == -8  # 1 / 512 of [0, 1] is 2^-9, at which they span 513 bins
    assert histogram.counts == {0: 2 - 1, 256: 2}
    assert histogram.quantile(0.5) == 1.0
    edges, [counts] = shown([Histogram.of(np.array([1.0, 2.0, 2.0, 9.0]))], least=0)
    assert edges.tolist() == list(range(1, 11))
    assert counts.tolist() == [1, 2, 0, 0, 0, 0, 0, 0, 1]


def test_values_far_from_all_others_do_not_squeeze_a_plot():
    values = np.append(np.arange(1000.0), [1e5])
    edges, [counts] = shown([Histogram.of(values)], least=0)
    assert edges[-1] < 2000
    assert counts.sum() == 1001
    assert counts[-1] >= 1


# --- what is read of the rows ----------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> MadeRun:
    run = MadeRun(tmp_path_factory.mktemp("made"))
    run.write()
    return run


def test_what_is_read_is_the_same_each_time_and_bounded(made, monkeypatch):
    store = next(s.folder for s in read_outline(made.root).steps if s.kind == "score")
    whole = sample.answers(made.root / store, made.buckets)
    assert whole.rows == 240 * 2
    assert whole.series["llama"]["reward"].n == 480
    assert sample.answers(made.root / store, made.buckets).record() == whole.record()
    monkeypatch.setattr(sample, "ANSWERS", 100)
    monkeypatch.setattr(sample, "BUCKETS", 2)
    part = sample.answers(made.root / store, made.buckets)
    assert 100 <= part.rows < 200
    assert [b.index for b in sample.spread(64, 8)] == [0, 8, 16, 24, 32, 40, 48, 56]
    assert len(sample.spread(16, 32)) == 16


def test_rows_to_browse_have_the_texts_of_all_candidates(made):
    rows = gather(made.root, read_outline(made.root))["rows"]
    assert len(rows) == sample.ROWS
    assert {row["kind"] for row in rows} == {"pair", "selection"}
    pairs = [row for row in rows if row["kind"] == "pair"]
    assert len({row["id"] for row in rows}) == len(rows)
    for row in pairs:
        assert len(row["candidates"]) == 4 * 2
        assert all(text and reason == "stop" for *_, text, reason in row["candidates"])
        best = max(c[2] for c in row["candidates"] if c[0] != "target-sft")
        assert row["y_ws"]["reward"] == best
        assert row["target_margin"] == pytest.approx(row["y_wt"]["reward"] - row["y_l"]["reward"])


def test_lengths_of_imported_answers_are_in_characters(tmp_path):
    table = pa.table(
        {
            "source": ["a", "b"],
            "reward": [1.0, None],
            "output_tokens": pa.nulls(2, pa.int32()),
            "text": ["four", "fi"],
        }
    )
    Folder(str(tmp_path)).write_table(Bucket(0, 1).shard("x"), table)
    found = sample.answers(Folder(str(tmp_path)), 1)
    assert found.unit == "characters"
    assert (found.series["a"]["length"].mean, found.series["b"]["length"].mean) == (4, 2)
    assert found.series["b"]["reward"].n == 0


# --- the page --------------------------------------------------------------------------------


class Scripts(HTMLParser):
    """The tags of a page, and what stands in its scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script" and self.scripts:
            self.scripts[-1] += data


def test_the_page_has_all_sections_and_loads_nothing(made):
    assert page.write(made.root, read_outline(made.root))
    text = (Path(made.folder) / page.FILE).read_text()
    for name in ("chain", "wins", "rewards", "margins", "training", "evaluation", "failures"):
        assert f'<section id="{name}"' in text
    found = Scripts(text)
    ids = [a["id"] for _, a in found.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert not [t for t, a in found.tags if a.get("src") or a.get("href", "#")[0] not in "#d"]
    assert "http://" not in re.sub(r"http://www.w3.org", "", text)
    plots = [a for t, a in found.tags if t == "svg"]
    assert len(plots) >= 10
    assert all(a["role"] == "img" and a["aria-labelledby"] for a in plots)
    assert "var(--fused)" in text
    assert "#0a00" not in text
    data = json.loads(found.scripts[0])
    assert len(data["rows"]) == sample.ROWS
    assert set(data["colors"]) == {"llama", "qwen", "gemma", "target-sft"}


def test_a_page_is_not_written_again_when_nothing_changed(made):
    page.write(made.root, read_outline(made.root))
    before = (Path(made.folder) / page.FILE).stat().st_mtime_ns
    assert not page.write(made.root, read_outline(made.root))
    assert (Path(made.folder) / page.FILE).stat().st_mtime_ns == before
    metrics = next(Path(made.folder).glob("wrpo-*/metrics.jsonl"))
    last = metrics.read_text().splitlines()[-1]
    metrics.write_text(metrics.read_text() + last.replace('"step": 899', '"step": 900') + "\n{")
    assert page.write(made.root, read_outline(made.root))


def test_what_models_wrote_is_only_text(tmp_path):
    run = MadeRun(tmp_path, rows=40, buckets=2, sources=(HOSTILE[0], "b"), texts=HOSTILE)
    run.write()
    page.write(run.root, read_outline(run.root))
    text = (tmp_path / page.FILE).read_text()
    found = Scripts(text)
    assert [t for t, _ in found.tags].count("script") == 2  # rows, and the page's own
    assert "window.hit" not in found.scripts[1]
    assert not [t for t, _ in found.tags if t in ("img", "b", "textarea")]
    assert not [a for _, a in found.tags if any(name.startswith("on") for name in a)]
    rows = json.loads(found.scripts[0])["rows"]
    said = {row["y_ws"]["text"] for row in rows}
    assert said <= set(HOSTILE)
    assert len(said) > 1
    assert "<" not in found.scripts[0]
    assert "\u2028" not in found.scripts[0]
    assert "49" not in [row["messages"][0]["content"] for row in rows]


def test_a_title_of_a_plot_is_escaped():
    drawn = svg(bars(["<a>&$x$"], [1.0], ["s0"], str), "p", "<b>", "</desc><script>")
    assert "<a>" not in drawn
    assert "<b>" not in drawn
    assert "<script>" not in drawn
    assert "&lt;a&gt;&amp;$x$" in drawn


def test_rows_are_as_many_as_fit_and_long_texts_are_cut(made):
    rows = gather(made.root, read_outline(made.root))["rows"]
    long = [row | {"y_ws": row["y_ws"] | {"text": "x" * 10**6}} for row in rows]
    kept = page.fitting(long, 500_000)
    assert 0 < len(kept) < len(rows)
    assert "996,000 more characters" in kept[0]["y_ws"]["text"]
    assert len(page.embedded(kept).encode()) < 510_000


@pytest.mark.soak
def test_a_million_rows_make_a_page_below_five_megabytes(tmp_path, browser):
    run = MadeRun(tmp_path / "a-million-rows", rows=1_000_000, buckets=64)
    outline = run.write()
    assert page.write(run.root, outline)
    look(browser, run.folder / page.FILE, "report-million", "main", "#rewards", "#rows")
    facts = gather(run.root, outline)
    assert facts["counts"]["pair"]["rows"] == 1_000_000
    assert len(facts["rows"]) == sample.ROWS
    read_rows = facts["distributions"]["pairs"]["rows"]
    assert sample.PAIRS <= read_rows < 2 * sample.PAIRS
    answers = facts["distributions"]["answers"]["rows"]
    assert answers < 2 * 4 * sample.ANSWERS


def test_each_model_has_one_colour():
    colors = Palette(("a", "b"), "t", ("z",))
    assert [colors[n] for n in ("a", "b", "z", "t", "fused")] == [
        "s0",
        "s1",
        "s2",
        "target",
        "fused",
    ]


def test_numbers_are_short():
    told = {0: "0", 12345: "12,345", 1.25: "1.25", -0.5: "−0.5", 0.0031234: "0.00312"}
    assert {v: number(v) for v in told} == told
    assert [number(v) for v in (4.5e-7, 1234.5, None, float("nan"))] == [
        "4.5e−07",
        "1,234",
        "–",
        "–",
    ]


def test_time_at_work_counts_side_by_side_once():
    assert busy([(0, 10), (2, 5), (8, 12), (20, 21)]) == 13
    assert busy([]) == 0
    # bars: the ten idle seconds are cut out of a span of 13
    lefts = [left for left, _ in _places([(0, 10), (2, 5), (8, 12), (20, 21)])]
    assert lefts == [0, pytest.approx(15.38), pytest.approx(61.54), pytest.approx(92.31)]


# --- outlines, runs compared, the reporter ---------------------------------------------------


def test_no_run_is_told_with_the_remedy(tmp_path):
    with pytest.raises(UserError, match=r"no run is there \(no chain.json\); give the `output`"):
        reports.report(str(tmp_path))
    with pytest.raises(UserError, match="give two outputs or more"):
        reports.compare([str(tmp_path)])


def test_the_command_makes_pages(made, tmp_path, capsys):
    page_, other = tmp_path / "report.html", tmp_path / "compare.html"
    assert cli.main(["report", str(made.folder), "--to", str(page_)]) == 0
    assert str(page_) in capsys.readouterr().out
    runs = [str(made.folder)] * 2
    assert cli.main(["report", "--compare", *runs, "--to", str(other)]) == 0
    assert all(p.read_text().startswith("<!doctype html>") for p in (page_, other))


def test_runs_compared(made, tmp_path):
    other = MadeRun(tmp_path / "other", seed=1, margin=0.5, sources=("llama", "qwen", "gemma"))
    other.write()
    page_ = tmp_path / "compare.html"
    told = reports.compare([str(made.folder), str(other.folder)], to=str(page_))
    lines = {line.split("  ")[0].strip(): line for line in told.splitlines()}
    assert re.search(r"wrpo\.beta +0\.01 +0\.02 +≠", lines["wrpo.beta"])
    assert "target.model" not in lines  # what is equal in the config is left out
    assert lines["wrpo: rewards/margins at the end"].endswith("≠")
    assert not lines["accuracy of fused"].endswith("≠")
    assert "wrpo.beta" in page_.read_text()
    same = comparing.compare([gather(made.root, read_outline(made.root))] * 2)
    assert "Config" not in same.tables


def test_a_report_that_fails_is_told_and_stops_nothing(capsys):
    made = []

    def make(is_running: bool) -> None:
        made.append(is_running)
        raise ValueError("no room on the disk")

    reporter = Reporter(make, every=0.01)
    with reporter:
        reporter.tell()
        while not made:
            pass
    reporter.finish()
    assert made[0]
    assert made[-1] is False
    assert "report: not written: ValueError: no room on the disk" in capsys.readouterr().err


def test_a_reporter_makes_no_report_while_nothing_is_told():
    made = []
    reporter = Reporter(made.append, every=0.01)
    with reporter:
        pass
    assert made == []
    reporter.finish()
    assert made == [False]


def test_lengths_in_characters_and_in_tokens_are_not_added():
    """Answers of a recorded source have no token counts, those of a model beside it have."""
    parts = []
    for name, unit in (("recorded", "characters"), ("live", "tokens")):
        part = sample.Distributions(rows=2, unit=unit)
        part.add(name, "length", pa.array([10, 20]))
        part.add(name, "reward", pa.array([0.5, 1.0]))
        parts.append(part)
    for first, second in (parts, parts[::-1]):
        both = sample.Distributions() + first + second
        assert both.unit == "tokens"
        assert {name: sorted(m) for name, m in both.series.items()} == {
            "recorded": ["reward"],
            "live": ["length", "reward"],
        }
    alone = sample.Distributions() + parts[0] + sample.Distributions()
    assert (alone.unit, sorted(alone.series["recorded"])) == ("characters", ["length", "reward"])


def test_rewards_by_group_are_shown_apart_and_lengths_together():
    """Means of rewards on different scales tell nothing; the model's colour stays its own."""
    step = StepOutline("score", "score-maths-a-b", "k", "f", "m", "score", source="a-b")
    found = Distributions(3)
    found.add("a-b", "reward", pa.array([0.0, 1.0, 1.0]))
    found.add("a-b", "length", pa.array([4.0]))
    taken = _by_reward(step, found)
    assert {name: held["reward"].n for name, held in taken.items()} == {"maths · a-b": 3}
    assert list(found.series["a-b"]) == ["length"]
