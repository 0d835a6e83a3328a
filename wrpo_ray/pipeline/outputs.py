"""Reports and the status of runs, by their outputs or their configs."""

import time
from collections.abc import Sequence
from typing import Any

from wrpo_ray import config as configs
from wrpo_ray.data import outline as outlines
from wrpo_ray.data.outline import Outline
from wrpo_ray.errors import UserError
from wrpo_ray.pipeline.chain import Chain
from wrpo_ray.pipeline.model_sections import pinned
from wrpo_ray.pipeline.runner import outline_of
from wrpo_ray.pipeline.stage_table import STAGES
from wrpo_ray.report import compare_runs as comparing
from wrpo_ray.report.facts import gather
from wrpo_ray.report.status import Status, is_running, reading, screen, status
from wrpo_ray.storage.folder import Folder
from wrpo_ray.text.addresses import redact

SUFFIXES = (".yaml", ".yml")


def find(place: str, overrides: Sequence[str] = ()) -> tuple[Folder, Outline]:
    """The output and the outline of a run, by its output folder or by its config.

    An output has the outline of its last run; of a config it is built anew.

    Raises:
        UserError: no run is there.
    """
    if not place.endswith(SUFFIXES):
        if overrides:
            raise UserError("--set: changes a config; an output is as it was run")
        root = Folder(place).absolute()
        return root, outlines.read_outline(root)
    settings = pinned(configs.load(place, overrides))
    without_target = "pair" if settings.existing else "select"
    chain = Chain(
        settings, STAGES[-1] if settings.target or not settings.has_input else without_target
    )
    chain.build()
    return chain.root, outline_of(chain)


def report(place: str, overrides: Sequence[str] = (), to: str | None = None) -> str:
    """Write the report of a run and return its path.

    Raises:
        UserError: no run is there, or the page cannot be written.
    """
    from wrpo_ray.report import page  # it imports a library of plots

    root, outline = find(place, overrides)
    try:
        if to is None:
            page.write(root, outline, is_running=is_running(root))
            return str(root / page.FILE)
        text = page.render(gather(root, outline))
        _write(to, text)
    except OSError as error:
        raise UserError(f"report: {' '.join(redact(str(error)).split())}") from None
    return str(Folder(to))


def compare(places: Sequence[str], overrides: Sequence[str] = (), to: str | None = None) -> str:
    """The differences between runs as text; also written to the file `to` as a page.

    Raises:
        UserError: there are fewer than two, or no run is there.
    """
    if len(places) < 2:
        raise UserError("report --compare: give two outputs or more")
    found = [gather(*find(place, overrides)) for place in places]
    differences = comparing.compare(found)
    if to is not None:
        _write(to, comparing.html(differences))
    return comparing.text(differences)


def _write(to: str, text: str) -> None:
    Folder(to).write("", text.encode())


def show_status(place: str, overrides: Sequence[str] = (), every: float | None = None) -> None:
    """Print the status of a run; with `every`, each so many seconds until the run ends.

    On a terminal the status is redrawn in place.

    Raises:
        UserError: no run is there, or its files are not as a run writes them.
    """
    from rich.console import Console
    from rich.live import Live

    console = Console()
    found, shown = _status(place, overrides)
    if every is None or not console.is_terminal:
        console.print(shown, soft_wrap=not console.is_terminal)
        while every is not None and found.is_running:
            time.sleep(every)
            found, shown = _status(place, overrides)
            console.print(shown, soft_wrap=True)
        return
    with Live(shown, console=console, auto_refresh=False, screen=False) as live:
        while found.is_running:
            time.sleep(every)
            found, shown = _status(place, overrides)
            live.update(shown, refresh=True)


def _status(place: str, overrides: Sequence[str]) -> tuple[Status, Any]:
    """The status of a run, and its view for a terminal."""
    root, outline = find(place, overrides)
    with reading(root):
        found = status(root, outline)
        return found, screen(found)
