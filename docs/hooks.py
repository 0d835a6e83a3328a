"""Hooks of `mkdocs build`: add pages from outside docs/, and generated reference.

Links in the sources work in the repository. In the site, a link to a file outside docs/ points to a
copy of the file, and a link to a folder becomes text.
"""

from __future__ import annotations

import argparse
import ast
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from wrpo_ray.cli.entry import make_parser
from wrpo_ray.config import Config, ServeConfig
from wrpo_ray.config.reference import config_markdown, escaped

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/RESULTS.md": "benchmarks/results.md",
    "benchmarks/SIMULATION.md": "benchmarks/simulation.md",
}
"""Pages outside docs/: {path in the repository: path in the site}."""
LINK = re.compile(r"(!?)\[([^\]\n]*(?:\n[^\]\n]+)?)\]\(([^()\s]+)\)")
MARKER = re.compile(r"<!-- generated: (\w+) -->")


# --- events of MkDocs --------------------------------------------------------------------------


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from outside docs/, and every file that a page links to."""
    for source, target in PAGES.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    for page in pages():
        for _, path in links(page):
            name = site_path(path)
            if name.startswith("files/") and (ROOT / path).is_file() and name not in files.src_uris:
                files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Insert generated parts, and convert links of the repository to links of the site."""
    source = {target: path for path, target in PAGES.items()}.get(page.file.src_uri)
    source = source or f"docs/{page.file.src_uri}"
    return MARKER.sub(lambda found: GENERATED[found[1]](), site_links(markdown, source))


# --- links -------------------------------------------------------------------------------------


def pages() -> list[str]:
    """Paths of all pages in the repository."""
    return [*PAGES, *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]


def links(page: str) -> Iterator[tuple[str, str]]:
    """(link, path in the repository) of each link to a file in a page."""
    for found in LINK.finditer((ROOT / page).read_text(encoding="utf-8")):
        if path := repository_path(found[3], page):
            yield found[3], path


def repository_path(link: str, page: str) -> str | None:
    """The path that a link points to, without anchor; None for a URL or an anchor of the page."""
    path = link.partition("#")[0]
    if not path or re.match(r"[a-z]+:", link):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), path))


def site_path(path: str) -> str:
    """The path in the site of a file of the repository."""
    if path in PAGES:
        return PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}"


def site_links(markdown: str, page: str) -> str:
    """The text of a page with links of the site."""
    here = posixpath.dirname(site_path(page)) or "."

    def change(found: re.Match[str]) -> str:
        image, text, link = found.groups()
        path = repository_path(link, page)
        if path is None:
            return found[0]
        if (ROOT / path).is_dir():
            return "" if image else text
        _, mark, anchor = link.partition("#")
        return f"{image}[{text}]({posixpath.relpath(site_path(path), here)}{mark}{anchor})"

    return LINK.sub(change, markdown)


# --- generated parts -----------------------------------------------------------------------------


def commands() -> str:
    """The reference of every command, from the parser."""
    return "\n\n".join(_command("wrpo", make_parser()))


def _command(name: str, parser: argparse.ArgumentParser, text: str = "") -> Iterator[str]:
    if text:
        yield f"## {name}"
        yield f"{text[0].upper()}{escaped(text[1:])}."
        usage = parser.format_usage().removeprefix("usage: ").replace("[-h] ", "")
        yield f"```text\n{' '.join(usage.split())}\n```"
        yield "\n".join(_arguments(parser))
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            texts = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for word, command in action.choices.items():
                yield from _command(f"{name} {word}", command, texts[word])


def _arguments(parser: argparse.ArgumentParser) -> Iterator[str]:
    left_out = (argparse._HelpAction, argparse._SubParsersAction)
    actions = [a for a in parser._actions if not isinstance(a, left_out)]
    if actions:
        yield "| argument | description |\n| --- | --- |"
    for action in actions:
        option = action.option_strings[-1:]
        choices = f"{{{','.join(map(str, action.choices))}}}" if action.choices else None
        value = [str(action.metavar or choices or action.dest.upper())] * (action.nargs != 0)
        yield f"| `{' '.join([*option, *value])}` | {escaped(action.help or '')} |"


def tree(root: str) -> str:
    """The tree of a folder's files, each with the first line of its docstring."""
    lines, folder = [], ROOT
    for file in sorted((ROOT / root).rglob("*.py"), key=_order):
        text = (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0]
        depth = len(file.relative_to(ROOT).parts) - 1
        is_first, folder = file.parent != folder, file.parent
        if is_first:
            about = text if file.name == "__init__.py" else ""
            lines.append(f"{'  ' * (depth - 1) + folder.name + '/':32} {about}".rstrip())
        if file.name != "__init__.py":
            lines.append(f"{'  ' * depth + file.name:32} {text}")
    return "```text\n" + "\n".join(lines) + "\n```"


def _order(file: Path) -> list[tuple[bool, str]]:
    """Sort key: a folder, then its files, then its subfolders."""
    *folders, name = file.parts
    return [*((True, folder) for folder in folders), (False, name.replace("__init__", ""))]


GENERATED: dict[str, Callable[[], str]] = {
    "config": lambda: config_markdown(Config),
    "serve": lambda: config_markdown(ServeConfig, "serve."),
    "commands": commands,
    "tests": lambda: tree("tests"),
    "benchmarks": lambda: tree("benchmarks"),
}
"""Text for a marker `<!-- generated: NAME -->` in a page."""
ARCHITECTURE = ROOT / "docs" / "architecture.md"
TREE = re.compile(r"(?<=<!-- tree -->\n).*?(?=<!-- end of tree -->)", re.DOTALL)


def with_tree(page: str) -> str:
    """The architecture page with the present tree of the package, for those who read the file."""
    return TREE.sub(lambda _: tree("wrpo_ray") + "\n", page)


if __name__ == "__main__":
    ARCHITECTURE.write_text(with_tree(ARCHITECTURE.read_text()))
