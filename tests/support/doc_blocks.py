"""Fenced blocks of the documents: their commands, and how each is known to work."""

from __future__ import annotations

import argparse
import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    str(p.relative_to(ROOT))
    for p in [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "benchmarks").glob("*.md"),
    ]
)
LANGUAGES = {"sh", "yaml", "python", "text"}
NEEDS = {"cluster", "cloud", "GPU", "network"}
"""What `<!-- needs: ... -->` before a block may say: then its commands are parsed, not run."""
RUN = (
    r"wrpo (fuse|\w+) \S+ .*--dry-run",
    r"wrpo plan ",
    r"wrpo failures (?!.*--retry)",
    r"wrpo config\b",
    r"wrpo cluster check cluster/launcher.yaml",
    r"wrpo --version",
    r"wrpo serve --new-key",
    r"head ",
    r"tail ",
)
"""Commands that `test_docs.py` runs where they stand."""
UNIT = "tests/unit/{}.py::test_{}"
RAY, E2E = (f"tests/{kind}/test_{{}}.py::test_{{}}" for kind in ("ray", "e2e"))
FUSE = E2E.format("fuse", "summary_tells_every_step_and_compares_every_model")
TESTED = {
    r"make demo": FUSE,  # its second line; the first is tested by test_zoo.py
    r"make (check|test|lint|docs|soak|format)": "Makefile",
    r"\. \.venv/bin/activate": "Makefile",
    r"wrpo zoo \S+( --recipe distant)?": "tests/unit/zoo/test_zoo.py",
    r"wrpo zoo \S+ --recipe smollm2": "tests/unit/zoo/test_smollm2.py",
    r"wrpo study \S+": E2E.format("studies", "variants_share_what_they_have_in_common"),
    r"python benchmarks/study\.py \S+": UNIT.format(
        "pipeline/test_study", "the_shipped_study_names_configs_that_are_whole"
    ),
    r"wrpo fuse \S+\.yaml( --set wrpo\.[\w.]+=\S+)*": FUSE,
    r"wrpo fuse \S+ (--set \S+ )*--until \w+": E2E.format("import", "real_responses"),
    r"wrpo failures \S+ --retry": RAY.format("failures", "failed_scores_are_told_and_tried_again"),
    r"wrpo export \S+ --to \S+( --format (trl|records))?( --pairs both)?": E2E.format(
        "object_store", "export_into_an_object_store"
    ),
    r"wrpo report (--compare )?\S+( \S+)*": UNIT.format(
        "report/test_report", "the_command_makes_pages"
    ),
    r"wrpo status \S+ --watch": UNIT.format(
        "report/test_status", "the_command_tells_of_an_ended_run"
    ),
    r"wrpo export \S+ --to \S+ --format model": UNIT.format("export/test_export_model", "the_card"),
    r"wrpo export \S+ --to \S+ --format model --gguf": UNIT.format(
        "export/test_gguf_model", "the_command_writes_it_beside_the_model"
    ),
    r"wrpo serve (--config \S+|\S+=\S+)( \S+=\S+)*": E2E.format(
        "serving", "the_openai_client_gets_answers_whole_and_streamed"
    ),
    r"wrpo submit \S+ --address \S+ --set output=\S+": E2E.format(
        "submit", "a_stopped_job_is_submitted_again_and_goes_on"
    ),
    r"export RAY_API_SERVER_ADDRESS=\S+": E2E.format("submit", "ray_job_submit"),
    r"ray job submit .* -- wrpo fuse .*": E2E.format("submit", "ray_job_submit"),
    r"python -m pytest .*": "Makefile",
    r"pre-commit install": ".pre-commit-config.yaml",
}
"""By command: the test that runs the like of it, or the file that says what it does."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    lead: str
    """The paragraph before it."""
    needs: str | None = None
    tested: str | None = None

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def saved_as(self) -> str | None:
        """The file that the reader is told to save it as."""
        found = re.search(r"[Ss]ave this as `([\w./-]+)`", self.lead)
        return found[1] if found else None

    @property
    def is_run(self) -> bool:
        """Whether all its commands are run where they stand."""
        if self.language != "sh" or self.needs or self.tested:
            return False
        return all(is_run(" ".join(words)) for words in self.commands())

    def commands(self) -> Iterator[list[str]]:
        """Words of each simple command, without the variables that are set for it."""
        for line in self.text.replace("\\\n", " ").splitlines():
            words: list[str] = []
            for word in [*shlex.split(line, comments=True), ";"]:
                if word not in (";", "&&", "|", "&"):
                    words.append(word)
                elif words:
                    yield _without_settings(words)
                    words = []


def _without_settings(words: list[str]) -> list[str]:
    while len(words) > 1 and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    return words


def blocks(page: str) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    start, before = None, 0
    for number, line in enumerate(lines):
        if not re.match(r"\s*```", line):
            continue
        if start is None:
            start = number
            continue
        above = "\n".join(lines[before:start]).strip()
        notes = dict(re.findall(r"^<!-- (needs|tested): (.+) -->$", _last(above), flags=re.M))
        text = "\n".join(lines[start + 1 : number])
        language = lines[start].strip().removeprefix("```")
        lead = above.removesuffix(_last(above)) if notes else above
        yield Block(page, start + 1, language, text, _paragraph(lead), **notes)
        start, before = None, number + 1
    assert start is None, f"{page}:{start}: the block does not end"


def _last(text: str) -> str:
    return text.rpartition("\n")[2]


def _paragraph(text: str) -> str:
    return text.strip().rpartition("\n\n")[2]


def prose(page: str) -> str:
    """A page's text outside its blocks."""
    return re.sub(r"^\s*```.*?^\s*```$", "", (ROOT / page).read_text(), flags=re.M | re.S)


def is_run(command: str) -> bool:
    return any(re.match(pattern, command) for pattern in RUN)


def test_of(command: str) -> str | None:
    """What `TESTED` says of a command."""
    return next((t for pattern, t in TESTED.items() if re.fullmatch(pattern, command)), None)


test_of.__test__ = False  # pytest would take it for a test


def exists(node: str) -> bool:
    """Whether a file, or a test in it, is there."""
    file, _, name = node.partition("::")
    if not (ROOT / file).is_file():
        return False
    tree = ast.parse((ROOT / file).read_text()) if name else None
    found = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)} if tree else {""}
    return name in found


def subcommand(parser: argparse.ArgumentParser, words: list[str]) -> argparse.ArgumentParser:
    """The parser of the command that the words begin with."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            if not words or words[0].startswith("-"):
                return parser
            assert words[0] in action.choices, f"wrpo has no command {words[0]}"
            return subcommand(action.choices[words[0]], words[1:])
    return parser


def messages(folder: Path) -> set[str]:
    """Every text in the code, with … for what is put into it."""
    found = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [n.value if isinstance(n, ast.Constant) else "…" for n in node.values]
                found.add("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found
