"""Reads and writes chain.json, the outline of a run in its output: its steps and its config.

It names the steps with their folders, so that reports and `wrpo status` need neither the config
file nor the models. It holds the config without credentials.
"""

from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from wrpo_ray.errors import UserError
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import read_manifest

FILE = "chain.json"
PLAN = "plan.json"
"""File with {key of a step: its expected cost}, written before the run."""
FORMAT = 1
Row = dict[str, Any]


@dataclass(frozen=True)
class StepOutline:
    """A step of the chain."""

    stage: str
    name: str
    key: str
    folder: str
    manifest: str
    kind: str
    """generate, score, train, prepare, select, pair, ..."""
    source: str = ""
    """The model whose answers the step generates or scores; empty for other steps."""
    prompts: str = ""
    """Key of the step that holds the prompts."""
    splits: tuple[str, ...] = ()
    groups: tuple[str, ...] | None = None
    """Groups of the prompts; null: all."""
    other_groups: bool = False
    """Whether it is the prompts of all groups but those, and of no group."""
    samples: int | None = None
    stores: tuple[str, ...] = ()
    """Folders with the scored answers to choose y_ws (select), y_wt and y_l (pair) from."""
    outcome: str = ""
    """Of a step that scores: `reward`, or `verdict` of a verifier; empty for other steps."""
    note: str = ""
    """What a reader of the results has to know of the step; empty for most."""

    def failures(self, root: Folder) -> Folder:
        """The folder with its failed rows."""
        return root / self.folder / "failures" / self.key

    def is_done(self, root: Folder) -> bool:
        """Whether the step is finished."""
        return (root / self.folder).exists(self.manifest)

    def read_manifest(self, root: Folder) -> Row:
        """The manifest of the finished step."""
        return read_manifest(root / self.folder, self.manifest)


@dataclass(frozen=True)
class Outline:
    """The steps of a run, with its config and models."""

    until: str
    buckets: int
    config: Row
    models: Row
    """{name: address}"""
    steps: tuple[StepOutline, ...]

    def record(self) -> Row:
        """The content of `chain.json`."""
        return {"format": FORMAT} | asdict(self)

    @property
    def sources(self) -> list[str]:
        """Names of the source models."""
        return [model["name"] for model in self.config.get("sources") or ()]

    @property
    def target(self) -> str:
        """Name of the target, or of the model whose answers are imported as its own, or empty."""
        own, imported = (self.config.get(name) or {} for name in ("target", "import"))
        return own.get("name") or imported.get("target") or ""

    def write(self, root: Folder) -> None:
        """Write `chain.json`, unless it has this content."""
        record = self.record()
        if not root.holds_json(FILE, _plain(record)):
            root.write_json(FILE, record)


def read_outline(root: Folder) -> Outline:
    """The outline of an output.

    Raises:
        UserError: there is none, or it is damaged or of another version.
    """
    kinds = {"steps": list, "buckets": int, "config": dict, "models": dict, "until": str}
    try:
        record = root.read_record(FILE, **kinds)
    except FileNotFoundError:
        raise UserError(
            f"{root}: no run is there (no {FILE}); give the `output` of a run, or its config"
        ) from None
    try:
        steps = TypeAdapter(tuple[StepOutline, ...]).validate_python(record["steps"])
    except ValidationError:
        raise UserError(
            f"{root}/{FILE}: its `steps` are none of this version; the run's command writes it anew"
        ) from None
    kept = {name: record[name] for name in ("until", "buckets", "config", "models")}
    return Outline(**kept, steps=steps)


def _plain(value: Any) -> Any:
    """The value with lists in place of tuples, as JSON returns them."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value
