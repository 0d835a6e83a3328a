"""Where benchmarks write: rows of results.json and sections of RESULTS.md, each its own."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def row(name: str, ours: float, peer: float, unit: str, about: Row) -> Row:
    """A named figure; `ratio` is peer / ours, so above 1 ours is better."""
    figures = {"ours": round(ours, 4), "peer": round(peer, 4), "ratio": round(peer / ours, 3)}
    return {"name": name, **figures, "unit": unit, **about}


def save(folder: Path, prefix: str | tuple[str, ...], rows: Sequence[Row], section: str) -> None:
    """Replace the rows whose names start with `prefix` (one of them), and the section so headed.

    A section begins with its heading, `# ...`, and goes to the next one; others stay.
    """
    save_rows(folder, prefix, rows)
    path = folder / "RESULTS.md"
    sections = re.split(r"^(?=# )", path.read_text() if path.exists() else "", flags=re.MULTILINE)
    headings = [text.partition("\n")[0] for text in sections]
    heading = section.partition("\n")[0]
    place = headings.index(heading) if heading in headings else len(sections)
    sections[place : place + 1] = [section]
    path.write_text("\n\n".join(text.strip() for text in sections if text.strip()) + "\n")


def save_rows(folder: Path, prefix: str | tuple[str, ...], rows: Sequence[Row]) -> None:
    """Replace the rows whose names start with `prefix`, or one of them; others stay."""
    path = folder / "results.json"
    kept = json.loads(path.read_text()) if path.exists() else []
    kept = [known for known in kept if not known["name"].startswith(prefix)]
    path.write_text(json.dumps([*kept, *rows], indent=1) + "\n")


def machine(*, gpu: bool = False) -> str:
    """The kind of machine, without its name; with the card that torch sees if `gpu`."""
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    told = f"{_cpu()}, {os.cpu_count()} cores, {gigabytes:.0f} GB"
    if not gpu:
        return told
    import torch

    return f"{torch.cuda.get_device_name()}, {told}"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def versions(*packages: str) -> dict[str, str]:
    """Of Python and of what was compared."""
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
