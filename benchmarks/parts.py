"""What `data.py` measures, and how it is told: tables, a section, rows of results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import results
from workload import SAMPLES, ContenderRun, Measured

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """A kind of work, and who does it."""

    name: str
    """Of its results' names, the first part."""
    unit: str
    """What is made, such as `token`."""
    count: Callable[[Results], int]
    """How many units there are."""
    check: Callable[[Results, Results], str]
    """Makes sure that ours and a peer's results are the same, and tells how far."""
    contenders: Sequence[Callable[..., ContenderRun]]
    """In the order in which they run; one is `ours`."""
    titles: Mapping[str, str]
    """Of the contenders in tables, in their order."""
    targets: Mapping[str, float]
    """By peer: what our speed has to be at least, as a part of the peer's."""
    packages: Sequence[str]
    """Whose versions are told."""
    text: str
    """The section of RESULTS.md, to be formatted."""


@dataclass(frozen=True)
class Measurements:
    """What the contenders took."""

    part: Part
    measured: Mapping[str, Measured]
    work: Any
    weights: int
    load: float
    """Of the machine in the minute before."""

    def wall(self, name: str) -> float:
        """Milliseconds a unit."""
        return 1e3 * self.measured[name].seconds / self._made(name)

    def cpu(self, name: str) -> float:
        """CPU milliseconds a unit."""
        return 1e3 * self.measured[name].cpu / self._made(name)

    @property
    def _machine(self) -> str:
        return results.machine(gpu=getattr(self.work, "on_gpu", False))

    def _made(self, name: str) -> int:
        return self.part.count(self.measured[name].results)

    def write(self, folder: Path) -> None:
        """Into RESULTS.md and results.json."""
        results.save(folder, f"{self.part.name}.", self.rows(), self.text())

    def rows(self) -> list[results.Row]:
        """Named figures; `ratio` is peer / ours, so above 1 ours is better."""
        part = self.part
        about = {"machine": self._machine, "versions": results.versions(*part.packages)}
        rows = []
        for peer in part.targets:
            wall, cpu = f"{part.name}.vs_{peer}", f"{part.name}.cpu.vs_{peer}"
            walls, cpus = ((of("ours"), of(peer)) for of in (self.wall, self.cpu))
            rows.append(results.row(wall, *walls, f"ms/{part.unit}", about))
            rows.append(results.row(cpu, *cpus, f"CPU ms/{part.unit}", about))
        return rows

    def text(self) -> str:
        """The section of RESULTS.md."""
        versions = results.versions(*self.part.packages)
        return self.part.text.format(
            **vars(self.work),
            targets=self._targets(),
            table=self._table(),
            units=self._made("ours"),
            samples=SAMPLES,
            weights=self.weights / 1e6,
            machine=self._machine,
            load=self.load,
            versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        )

    def _targets(self) -> str:
        lines = ["| our speed / the peer's | at least | measured | |", "| --- | --- | --- | --- |"]
        for peer, least in self.part.targets.items():
            ratio = self.wall(peer) / self.wall("ours")
            met = "met" if ratio >= least else "missed"
            lines.append(f"| {self.part.titles[peer]} | {least:.2f} | {ratio:.3f} | {met} |")
        return "\n".join(lines)

    def _table(self) -> str:
        unit = self.part.unit
        head = ["", f"{unit}s/s", "ours / this", f"CPU ms/{unit}", "this / ours", "s", "with start"]
        lines = [head, ["---"] * len(head)]
        for name, title in self.part.titles.items():
            wall, cpu, m = self.wall(name), self.cpu(name), self.measured[name]
            figures = [f"{1e3 / wall:#.4g}", f"{wall / self.wall('ours'):.3f}"]
            figures += [f"{cpu:#.4g}", f"{cpu / self.cpu('ours'):.3f}"]
            lines.append([title, *figures, f"{m.seconds:.1f}", f"{m.whole:.0f}"])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
