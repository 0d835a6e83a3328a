"""What users write: keys given once, numbers that are numbers, at any depth of any tree."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from support.config_fields import fields

from wrpo_ray import config
from wrpo_ray.cli.entry import main
from wrpo_ray.config.values import as_written
from wrpo_ray.errors import UserError
from wrpo_ray.kubernetes import manifests
from wrpo_ray.runtime import submission as submit
from wrpo_ray.stages.ingest.readers import read_rows
from wrpo_ray.text import documents as reading
from wrpo_ray.text.documents import DuplicateKeyError, PlainNumber

ROOT = Path(__file__).parents[3]

# --- keys given twice ------------------------------------------------------------------------

TWICE = {
    "top": "a: 1\nb: 2\na: 3\n",
    "sections": "wrpo: {beta: 0.5}\nseed: 1\nwrpo: {epochs: 3}\n",
    "nested": "a:\n  b: 1\n  c:\n  - {d: 1}\n  - x: {e: 1, f: 2,\n         e: 3}\n",
    "quoted": "'a': 1\n\"a\": 2\n",
    "numbers": "{1: a,\n 0x1: b}",
    "booleans": "{yes: a,\n true: b}",
    "nulls": "{~: a,\n null: b}",
    "with a merge": "x: &x {a: 1}\ny:\n  <<: *x\n  b: 1\n  b: 2\n",
    "in an anchor": "x: &x\n  a: 1\n  a: 2\ny: *x\n",
    "merges": "x: &x {a: 1}\ny:\n  <<: *x\n  <<: *x\n",
    "in a key": "? {a: 1, b: 2,\n   a: 3}\n: x\n",
    "in a set": "x: !!set\n  ? a\n  ? a\n",
    "in an ordered map": "x: !!omap\n- {a: 1,\n   a: 2}\n",
}


@pytest.mark.parametrize("read", [reading.read_yaml, reading.read_document, reading.read_documents])
@pytest.mark.parametrize("text", TWICE.values(), ids=TWICE)
def test_a_key_given_twice_is_refused_with_both_lines(read, text):
    with pytest.raises(DuplicateKeyError, match=r"is given twice, in (lines \d+ and \d+)"):
        read(text)


def test_the_lines_are_those_of_the_file():
    with pytest.raises(
        DuplicateKeyError, match="'wrpo' is given twice, in lines 1 and 3; keep one"
    ):
        reading.read_yaml(TWICE["sections"])
    with pytest.raises(DuplicateKeyError, match="'e' is given twice, in lines 5 and 6; keep one"):
        reading.read_yaml(TWICE["nested"])
    with pytest.raises(
        DuplicateKeyError, match="'a' is given twice, in line 1; .*'b' .* in line 2"
    ):
        reading.read_yaml("x: {a: 1, a: 1}\ny: {b: 1, b: 1}")


def test_merges_and_anchors_are_as_in_yaml():
    text = (
        "a: &a {x: 1, y: 2}\nb: &b {<<: *a, y: 3}\nc: {<<: [*b, {z: 4}], x: 5}\nd: [*a, *a, *b]\n"
    )
    assert reading.read_yaml(text) == yaml.safe_load(text)
    assert reading.read_document(text) == yaml.safe_load(text)
    assert config.load(ROOT / "jobs" / "demo.yaml").wrpo.schedule == "constant"


def test_a_tree_that_holds_itself_or_is_too_deep():
    assert reading.read_document("&a {b: *a}")["b"]
    with pytest.raises(yaml.YAMLError, match="too deeply"):
        reading.read_yaml("[" * 3000 + "]" * 3000)


@pytest.mark.parametrize(
    "value", ["&a {b: *a}", "&a [*a]", "&a {b: [*a]}", "[" * 200 + "]" * 200], ids=len
)
@pytest.mark.parametrize("place", ["target.engine", "target.actors", "sources", "wrpo.beta"])
def test_a_value_that_holds_itself_is_refused_in_lines(tmp_path, value, place):
    file = tmp_path / "c.yaml"
    file.write_text(text_of("target: {name: t, model: m}"))
    if place == "target.engine" and "&" not in value:
        return  # deep, and taken as it is
    with pytest.raises(UserError) as caught:
        config.load(file, [f"{place}={value}"])
    assert all(line.startswith(f"{file}: ") for line in str(caught.value).splitlines())


def refused(text: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What is said where a product reads the text as such a file."""
    (tmp_path / "jobs").mkdir()
    file = tmp_path / ("jobs/runtime_env.yaml" if place == "runtime_env" else "file.yaml")
    file.write_text(text)
    monkeypatch.chdir(tmp_path)
    calls = {
        "run": lambda: config.load(file),
        "study": lambda: config.load_study(file),
        "serve": lambda: config.read_serving(file),
        "runtime_env": submit._runtime_env,
        "--set": lambda: config.load(ROOT / "jobs" / "demo.yaml", [f"engine={text}"]),
    }
    if place == "manifest":
        (found,) = manifests.read([str(file)])[1]
        return str(found)
    with pytest.raises(UserError) as caught:
        calls[place]()
    return str(caught.value)


@pytest.mark.parametrize("place", ["run", "study", "serve", "runtime_env", "manifest", "--set"])
def test_every_file_of_yaml_is_read_so(place, tmp_path, monkeypatch):
    told = refused("a: {b: 1,\n b: 2}\n", place, tmp_path, monkeypatch)
    assert "the key 'b' is given twice, in lines 1 and 2" in told
    assert len(told.splitlines()) == 1


def test_nothing_else_reads_yaml():
    """A new reader of YAML has to be this one."""
    call = re.compile(r"yaml\.\w*load\w*|yaml\.(compose|parse)")
    files = [f for f in (ROOT / "wrpo_ray").rglob("*.py") if call.search(f.read_text())]
    assert [f.name for f in files] == ["documents.py"]


def test_a_row_with_a_key_twice_is_a_failed_row(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a", "prompt": "b"}\n{"prompt": [{"role": "user", "role": "x"}]}\n')
    rows = [row for _, row in read_rows(str(file), ["prompt"])]
    told = ["the key 'prompt' is given twice", "the key 'role' is given twice"]
    assert list(map(str, rows)) == told
    assert all(isinstance(row, ValueError) for row in rows)


@pytest.mark.parametrize("deep", ['{"a": 1, "a": 2}', '[{"b": [{"a": 1, "a": 2}]}]'])
def test_a_key_twice_in_what_is_not_read_does_no_harm(tmp_path, deep):
    file = tmp_path / "p.jsonl"
    file.write_text(f'{{"prompt": "x", "meta": {deep}}}')
    assert [row["prompt"] for _, row in read_rows(str(file), ["prompt"])] == ["x"]
    told = [str(row) for _, row in read_rows(str(file), ["prompt", "meta"])]
    assert told == ["the key 'a' is given twice"]
    with pytest.raises(DuplicateKeyError):
        reading.read_json(file.read_text())


# --- numbers ---------------------------------------------------------------------------------

NO_NUMBERS = [True, False, "1", "0.5", "3e-7", "1.0e-3", "1_0", " 1", "inf", "nan", ""]
NOT_FINITE = [float("inf"), float("-inf"), float("nan")]
NUMERIC = [f for f in fields() if f.kinds & {int, float} and not f.kinds & {str, bool}]
MIXED = [f for f in fields() if f.kinds & {Any} or {float, str} <= f.kinds]


def test_the_fields_are_those_of_all_three_trees():
    names = set(map(str, NUMERIC))
    assert len(names) > 90
    assert {
        "WrpoConfig.beta",
        "ServeConfig.queue",
        "StudyConfig.seeds",
        "PricesConfig.pools",
    } < names
    assert {"WrpoConfig.workers", "Actors.resources", "PartConfig.weight"} < names
    assert {"EndpointConfig.extra", "ModelConfig.chat_template_args"} < set(map(str, MIXED))


@pytest.mark.parametrize("field", NUMERIC, ids=str)
def test_a_number_is_a_finite_number(field):
    for value in NO_NUMBERS + NOT_FINITE:
        told = field.problems(value)[0]
        assert told.startswith(field.name)
        assert f"(got {value!r}" in told
    assert "write it without quotes" in field.problems("0.5")[0]
    for value in (1, 1.0, PlainNumber("1e0")):  # it may still be out of bounds
        assert not any("valid" in told or "finite" in told for told in field.problems(value))


@pytest.mark.parametrize("field", MIXED, ids=str)
def test_a_number_among_other_values_is_finite(field):
    for value in NOT_FINITE:
        for given in (value, {"a": [value]} if Any in field.kinds else value):
            (told,) = field.problems(given)
            assert "has to be finite" in told
    for value in ("x", "1", 1, 0.5, True, None):
        assert not field.problems(value)


def text_of(value: str) -> str:
    given = "output: o\nprompts: {path: p}\nsources: [{name: a, model: m}]\nreward: {model: r}\n"
    return given + value


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("3e-7", 3e-7),
        ("3E-7", 3e-7),
        ("1.5e-3", 1.5e-3),
        (".5e-3", 5e-4),
        ("1e-3", 1e-3),
        ("1", 1.0),
    ],
)
def test_numbers_as_people_write_them(tmp_path, written, read):
    """YAML 1.1 takes those without a point, or without a sign in the exponent, for text."""
    file = tmp_path / "c.yaml"
    file.write_text(
        text_of(f"wrpo: {{learning_rate: {written}}}\nprices: {{pools: {{a: {written}}}}}")
    )
    assert config.load(file).wrpo.learning_rate == read
    assert config.load(file).prices.pools == {"a": read}
    file.write_text(text_of("target: {name: t, model: m}\nevaluate: {prompts: {path: p}}"))
    assert config.load(file, [f"wrpo.learning_rate={written}"]).wrpo.learning_rate == read
    study = tmp_path / "s.yaml"
    study.write_text(
        f"output: o\ncases: {{c: {{config: c.yaml}}}}\n"
        f"variants: {{v: {{set: {{wrpo.learning_rate: {written}}}}}}}"
    )
    found = config.study_config(config.load_study(study), "c", "v")
    assert found.wrpo.learning_rate == read


@pytest.mark.parametrize(
    "written", ["true", "yes", ".inf", "-.inf", ".nan", "1e999", "'3e-7'", '"1"']
)
@pytest.mark.parametrize(
    "place", ["wrpo.beta", "seed", "actors", "prices.pools.a", "wrpo.zero_stage"]
)
def test_what_is_no_number_is_refused_in_one_line(tmp_path, capsys, written, place):
    place = "sources.0.actors.num_cpus" if place == "actors" else place
    file = tmp_path / "c.yaml"
    file.write_text(text_of("prices: {pools: {}}"))
    assert main(["fuse", str(file), "--dry-run", "--set", f"{place}={written}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{place}: input should be" in line


def test_text_that_reads_like_a_number_stays_text(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        text_of("target: {name: t, model: m, revision: 12e4, chat_template_args: {a: 1e3}}")
    )
    target = config.load(file).target
    assert (target.revision, target.chat_template_args) == ("12e4", {"a": "1e3"})
    assert type(target.revision) is str
    file.write_text(text_of("target: {name: t, model: m, engine: {a: [3e-7, {b: 1e3}], c: '1e3'}}"))
    assert config.load(file).target.engine == {"a": [3e-7, {"b": 1000.0}], "c": "1e3"}


@pytest.mark.parametrize("option", [["--fail-below", "nan"], ["--fail-below", "inf"]])
def test_numbers_of_options_are_finite(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", "c.yaml", *option])
    assert "invalid" in capsys.readouterr().err


@pytest.mark.parametrize("written", ["off", "Off", "'off'", "report"])
def test_a_word_that_yaml_reads_as_a_truth_value_is_the_word(written, tmp_path):
    """In the file and by --set, where it is among a field's words."""
    tree = yaml.safe_load((ROOT / "jobs" / "demo.yaml").read_text())
    tree.pop("pair", None)
    file = tmp_path / "c.yaml"
    file.write_text(f"{yaml.safe_dump(tree)}\npair: {{contamination: {{action: {written}}}}}\n")
    for loaded in (
        config.load(file),
        config.load(ROOT / "jobs" / "demo.yaml", [f"pair.contamination.action={written}"]),
    ):
        assert loaded.pair.contamination.action == written.strip("'").lower()


@pytest.mark.parametrize(
    ("value", "annotation", "read"),
    [
        (False, Literal["drop", "off"], "off"),
        (True, Literal["on", "x"] | None, "on"),
        (False, Annotated[Literal["no", "x"], 1], "no"),
        (True, Literal["yes"], "yes"),
        (True, Literal["drop", "off"], True),
        (False, Literal["no", "off"], False),
        (False, Literal["off"] | bool, False),
        (False, Literal["drop"], False),
        (False, str, False),
        (False, tuple[Literal["off"], ...], False),
    ],
)
def test_a_truth_value_is_a_word_where_only_one_can_be_meant(value, annotation, read):
    assert as_written(value, annotation) is read
