"""The documents: the site builds, the reference is whole, commands and configs work."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.doc_blocks import (
    LANGUAGES,
    NEEDS,
    PAGES,
    ROOT,
    Block,
    blocks,
    exists,
    is_run,
    messages,
    prose,
    subcommand,
    test_of,
)

from wrpo_ray import cli, config
from wrpo_ray.cli.entry import make_parser
from wrpo_ray.config import Config, Section, ServeConfig
from wrpo_ray.config.reference import config_text, sections
from wrpo_ray.errors import UserError

BASE: dict[str, Any] = {
    "output": "out",
    "prompts": {"path": "p.jsonl"},
    "sources": [{"name": "some", "model": "m"}],
    "target": {"name": "target", "model": "t"},
    "reward": {"model": "r"},
}
"""What a part of a config in a document is merged into."""


# --- the site ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does, where a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    return folder


class _Loaded(HTMLParser):
    """What a page makes a browser load."""

    def __init__(self):
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if given.get("src"):
            self.addresses.append(given["src"])
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload"):
            self.addresses.append(given["href"])


def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(site: Path):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        loaded = _Loaded()
        loaded.feed(page.read_text())
        for address in loaded.addresses:
            assert not re.match(r"([a-z]+:)?//", address), (page, address)
            if page.name != "404.html":  # whose addresses are those of a site at the root
                assert (page.parent / address.partition("?")[0]).exists(), (page, address)


def test_the_site_has_every_field_command_and_file(site: Path):
    text = {
        name: re.sub(r"<[^>]+>", "", (site / f"{name}.html").read_text())
        for name in ("reference/config", "reference/serve", "reference/commands", "architecture")
    }
    for page, root in (("reference/config", Config), ("reference/serve", ServeConfig)):
        for section in sections(root).values():
            assert all(field.key in text[page] for field in section.fields)
    for name, parser in _commands(make_parser()):
        assert name in text["reference/commands"]
        options = _options(parser) - {"--help"}
        assert all(option in text["reference/commands"] for option in options)
    for folder in ("wrpo_ray", "tests", "benchmarks"):
        for file in (ROOT / folder).rglob("*.py"):
            name = file.parent.name if file.name == "__init__.py" else file.name
            assert name in text["architecture"]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere_in_the_repository(page: str):
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import hooks
    finally:
        sys.path.remove(str(ROOT / "docs"))
    for link, path in hooks.links(page):
        assert (ROOT / path).exists(), f"{page}: {link}"


# --- the reference -------------------------------------------------------------------------------


def _below(kind: type[Section]) -> Iterator[type[Section]]:
    """Every section in the tree of one, by its annotations."""
    yield kind
    for field in kind.model_fields.values():
        for section in _sections_in(field.annotation):
            yield from _below(section)


def _sections_in(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _sections_in(inner)


@pytest.mark.parametrize("root", [Config, ServeConfig])
def test_every_field_has_its_line_with_type_default_and_text(root: type[Section]):
    known = sections(root)
    kinds = set(_below(root))
    assert {kind.__name__ for kind in kinds} == set(known)
    for kind in kinds:
        lines = {line.key: line for line in known[kind.__name__].fields}
        assert known[kind.__name__].text
        assert set(lines) == {f.alias or n for n, f in kind.model_fields.items()}
        for line in lines.values():
            assert line.text, f"{kind.__name__}.{line.key} has no docstring"
            assert line.kind != "any value", f"{kind.__name__}.{line.key} has no type in words"
            assert line.default


def test_a_field_without_a_docstring_has_no_text():
    class Bare(Section):
        """A section."""

        told: int = 1
        """Some number."""
        untold: int = 2

    told, untold = sections(Bare)["Bare"].fields
    assert (told.text, untold.text) == ("Some number.", "")


def test_bounds_defaults_and_placement_are_told():
    lines = {line.key: line for line in sections(Config)["SamplingConfig"].fields}
    assert lines["top_p"].bounds == "above 0, at most 1"
    assert (lines["samples"].kind, lines["samples"].default) == ("whole number", "5")
    evaluate = {line.key: line for line in sections(Config)["EvaluateConfig"].fields}
    assert evaluate["sampling"].default == "{samples: 1, temperature: 0.0, top_p: 1.0}"
    train = {line.key: line for line in sections(Config)["SftConfig"].fields}
    assert (train["workers"].decides, train["epochs"].decides) == (False, True)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("", "output: text, required"),
        ("wrpo.alpha", "end: number, at least 0, at most 1, default 0.1"),
        ("wrpo.beta", "wrpo.beta: number, above 0, default 0.01"),
        ("sources.actors", "max*: whole number, at least 1, default 1"),
        ("evaluate.prompts.columns", "prompt: text, default prompt"),
        ("serve.models.adapters", "serve.models.adapters: name: text, default {}"),
    ],
)
def test_wrpo_config_tells_of_a_section_or_a_field(path: str, line: str):
    assert line in config_text(path).splitlines()


@pytest.mark.parametrize(
    ("path", "reason"),
    [("wrpo.betta", "did you mean 'beta'?"), ("seed.x", "seed has no fields below it")],
)
def test_wrpo_config_names_the_nearest_field(path: str, reason: str):
    with pytest.raises(UserError, match=re.escape(reason)):
        config_text(path)


# --- commands ------------------------------------------------------------------------------------


def _commands(
    parser: argparse.ArgumentParser, name: str = "wrpo"
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, below in action.choices.items():
                yield from _commands(below, f"{name} {word}")


def _options(parser: argparse.ArgumentParser) -> set[str]:
    options = {option for action in parser._actions for option in action.option_strings}
    return options - {"-h", "--version"}


def test_every_argument_says_what_it_is():
    for name, parser in _commands(make_parser()):
        for action in parser._actions:
            known = isinstance(action, argparse._SubParsersAction) or action.help or action.choices
            assert known, f"{name}: {action.dest}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_text_have_the_options_that_they_name(page: str):
    for code in re.findall(r"`wrpo ([^`]+)`", prose(page)):
        words = [word.strip("[].,") for word in code.split()]
        parser = subcommand(make_parser(), words)
        for option in (word.partition("=")[0] for word in words if word.startswith("--")):
            assert option in _options(parser), f"{page}: wrpo {code}: {option}"


@pytest.mark.parametrize("page", PAGES)
def test_fields_that_are_named_exist(page: str):
    """`wrpo.beta` and `--set wrpo.beta=...` in text and blocks."""
    text = (ROOT / page).read_text()
    named = [*re.findall(r"`([a-z_]+(?:\.[a-z_0-9]+)+)(?:: [^`]*)?`", text)]
    named += re.findall(r"--set[ =](?!a\.b)([a-z_.0-9]+)=", text)
    for path in (name for name in named if not name.endswith((".html", ".json", ".md"))):  # files
        if path.split(".")[0] in {f.alias or n for n, f in Config.model_fields.items()}:
            config_text(re.sub(r"\.\d+\b", "", path))


# --- blocks --------------------------------------------------------------------------------------


@pytest.fixture
def place(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the repository's files that commands name; the commands' imports are undone."""
    for name in ("jobs", "benchmarks", "cluster", ".venv"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "zoo").symlink_to(zoo)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(sys, "modules", sys.modules)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.parametrize("page", [page for page in PAGES if list(blocks(page))])
def test_every_block_is_run_or_tested_or_says_what_it_needs(page: str, place: Path, capfd: Any):
    told = None
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block.place}: name one of {sorted(LANGUAGES)}"
        assert block.needs in {None, *NEEDS}, block.place
        if block.tested:
            assert exists(block.tested), f"{block.place}: {block.tested}"
        if block.saved_as:
            Path(block.saved_as).parent.mkdir(parents=True, exist_ok=True)
            Path(block.saved_as).write_text(block.text)
        try:
            _ = capfd.readouterr()
            CHECKS[block.language](block)
            if block.language == "text" and told is not None:
                _check_output(block, told)
            told = capfd.readouterr().out if block.is_run else None
        except (UserError, SystemExit, yaml.YAMLError) as error:
            pytest.fail(f"{block.place}: {error} {capfd.readouterr().err}")


def _check_commands(block: Block) -> None:
    for words in block.commands():
        command = " ".join(words)
        inner = words[words.index("--") + 1 :] if "--" in words else words
        if inner[0] == "wrpo" and "--version" not in words:
            make_parser().parse_args(inner[1:])
        _check_names(words, block.place)
        if block.needs or block.tested:
            continue
        if is_run(command):
            _run(words, block.place)
            continue
        node = test_of(command)
        assert node, f"{block.place}: `{command}` is neither run nor tested, nor says what it needs"
        assert exists(node), f"{block.place}: {node}"


def _check_names(words: list[str], where: str) -> None:
    """Targets of make, and files of the repository, are there."""
    if words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        assert all(f"\n{t}:" in (ROOT / "Makefile").read_text() for t in targets), where
    for word in words:
        if word.startswith(("jobs/", "cluster/", "benchmarks/", "tests/", "requirements")):
            assert (ROOT / word).exists(), f"{where}: {word}"


def _run(words: list[str], where: str) -> None:
    if words[0] != "wrpo":
        subprocess.run(" ".join(words), shell=True, check=True)
        return
    if "--version" in words:
        with pytest.raises(SystemExit, match="0"):
            cli.main(words[1:])
        return
    assert cli.main(words[1:]) == 0, where


def _check_config(block: Block) -> None:
    tree = yaml.safe_load(block.text)
    assert isinstance(tree, dict), block.place
    if block.needs:
        return
    if block.text.startswith("# a config of wrpo serve"):
        config.serving(tree)
    else:
        file = Path("block.yaml")
        file.write_text(block.text if _is_whole(tree) else yaml.safe_dump(_merged(tree)))
        config.load(file)


def _is_whole(tree: dict[str, Any]) -> bool:
    has_input = any(key in tree for key in ("prompts", "import"))
    return "output" in tree and (has_input or "models" in tree.get("evaluate", {}))


def _merged(tree: dict[str, Any]) -> dict[str, Any]:
    without = ("prompts", "sources") if "import" in tree else ()
    return {key: value for key, value in BASE.items() if key not in without} | tree


def _check_output(block: Block, told: str) -> None:
    """What is shown below commands that were run is in what they print, but for `...`."""
    for line in filter(str.strip, block.text.splitlines()):
        pattern = ".*".join(map(re.escape, line.split("...")))
        assert re.search(pattern, told), f"{block.place}: {line!r} is not in {told}"


def _check_text(block: Block) -> None:
    """What is shown as output holds no commands."""
    for line in block.text.splitlines():
        assert not re.match(r"\s*(\$|wrpo (?!is)|make |ray |kubectl )", line), block.place


CHECKS = {
    "sh": _check_commands,
    "yaml": _check_config,
    "python": lambda block: compile(block.text, block.place, "exec"),
    "text": _check_text,
}


# --- what is quoted ------------------------------------------------------------------------------


def test_every_message_of_troubleshooting_is_in_the_code():
    page = (ROOT / "docs" / "guides" / "troubleshooting.md").read_text()
    quoted = [a or b for a, b in re.findall(r"^- (?:``(.+?)``|`([^`]+)`) —", page, flags=re.M)]
    assert len(quoted) == len(re.findall(r"^- ", page, flags=re.M)) > 80
    code = messages(ROOT / "wrpo_ray") | {(ROOT / "Makefile").read_text()}
    absent = [q for q in quoted if not any(q.strip() in text for text in code)]
    assert not absent


def test_the_papers_table_is_that_of_the_code():
    paper = json.loads((ROOT / "wrpo_ray" / "report" / "paper.json").read_text())
    page = (ROOT / "docs" / "guides" / "paper.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    table = {row[0]: row[1:] for row in rows}
    for name, (*percent, rating) in paper["rows"].items():
        assert table[name] == [*(f"{value:.1f}" for value in percent), f"{rating:.2f}"]
