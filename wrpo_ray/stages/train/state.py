"""Training state that any number of workers and any ZeRO stage can load.

It holds the fp32 master weights and Adam's moments of each trainable parameter. DeepSpeed gives a
worker a flat range of them, whose bounds depend on world size and stage. A worker saves the ranges
it owns, with their offset in the parameter; on loading, it reads the ranges it owns from whatever
files have them. Nothing is gathered: a worker holds its own share and a copy of one file of it.

`part-<worker>-<n>.safetensors` has 1-D fp32 tensors `<parameter>|<kind>|<first element>`, all
kinds of a range in one file; `state.json` has the count of Adam's steps and the caller's extras.

A run resumes bit by bit if world size, stage, precision and micro-batches are the same. Not
covered: frozen parameters, which are not saved; gradients within a step; optimizers other than
torch's AdamW (not fused, no amsgrad); optimizer state on NVMe or partly offloaded; fp16 with loss
scaling.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from wrpo_ray.errors import WrpoError
from wrpo_ray.stages.train.memory import FILE_BYTES

INDEX = "state.json"
WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")


def save_state(engine: Any, folder: Path, extra: dict[str, Any]) -> None:
    """Write this worker's part to `folder`, between two optimizer steps; all workers call it.

    Workers may write to different folders: the state is all of their files. `extra` is JSON.
    """
    part_of(engine, extra).write(folder)


Tensors = dict[str, Tensor]


@dataclass
class Part:
    """A worker's part of the state, in files."""

    worker: int
    files: Iterable[Tensors]
    """The tensors of each file, on the CPU."""
    index: str
    """The content of `state.json`; empty for all workers but the first."""

    def write(self, folder: Path) -> None:
        """Write the files; an error leaves some of them."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        for number, tensors in enumerate(self.files):
            save_file(tensors, folder / f"part-{self.worker:05}-{number:05}.safetensors")
        if self.index:
            (folder / INDEX).write_text(self.index)


def part_of(engine: Any, extra: dict[str, Any], into: Tensors | None = None) -> Part:
    """This worker's part of an engine's state between two optimizer steps; all workers call it.

    Without `into` a file's tensors are copied when it is written, which has to be before the next
    step. With it, all are copied at once into its tensors, so that steps may go on meanwhile; those
    that are not there yet are added, page-locked where the engine is on a GPU.
    """
    rank = dist.get_rank()
    index = json.dumps({"adam_steps": _steps(engine), "extra": extra}) if rank == 0 else ""
    files = ({n: t.to("cpu", copy=True) for n, t in file.items()} for file in _files(engine))
    if into is None:
        return Part(rank, files, index)
    copied = [{n: _copied(n, t, into) for n, t in file.items()} for file in _files(engine)]
    if any(tensor.is_pinned() for tensor in into.values()):
        torch.cuda.synchronize()  # the copies are made while this goes on
    return Part(rank, copied, index)


def bytes_of(engine: Any) -> int:
    """Bytes of this worker's part after the first step."""
    weights = sum(own.size for own in _owned(engine))
    return 4 * weights * (1 + len(MOMENTS))  # fp32


def load_state(engine: Any, folder: Path) -> dict[str, Any]:
    """Restore a new engine from the files of all workers; all call it. Returns `extra`.

    Raises:
        WrpoError: a trainable parameter is incomplete or has another size; on all workers.
    """
    index = json.loads((folder / INDEX).read_text())
    saved = _saved(folder)
    _check(engine, saved, folder)
    for own in _ranges(engine):
        _fill(own.of(own.master), own.start, saved[own.name, WEIGHT])
        _load_moments(engine, own, saved, index["adam_steps"])
    _publish(engine)
    extra: dict[str, Any] = index["extra"]
    return extra


# --- the ranges of a worker, in DeepSpeed 0.19.8 --------------------------------------------------


@dataclass(frozen=True)
class Range:
    """A flat range of a parameter, and its place in this worker's fp32 masters."""

    name: str
    start: int
    """Its first element, counted in the flattened parameter."""
    size: int
    master: Tensor
    """The tensor that the optimizer updates, and keeps moments of the same shape for."""
    offset: int
    """The range's first element in `master` and its moments."""

    def of(self, tensor: Tensor) -> Tensor:
        """The range's view (size,) of the master or a moment."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.size)


def _trainable(engine: Any) -> Iterator[tuple[str, Any, int]]:
    """Names, parameters and their whole sizes; tied parameters once."""
    for name, parameter in engine.module.named_parameters():
        size = getattr(parameter, "ds_numel", parameter.numel())
        if parameter.requires_grad and size:
            yield name, parameter, size


def _ranges(engine: Any) -> Iterator[Range]:
    """The ranges whose masters are on this worker; at stage 0 every worker has all of them."""
    stage = engine.zero_optimization_stage()
    for name, parameter, size in _trainable(engine):
        if stage == 0:
            yield Range(name, 0, size, parameter, 0)
        else:
            yield from (_zero3 if stage == 3 else _zero12)(engine, name, parameter)


def _zero12(engine: Any, name: str, parameter: Any) -> Iterator[Range]:
    """The part in this worker's partition, a flat tensor per parameter group, also for bf16."""
    place = parameter._hp_mapping
    if place is not None:
        master = engine.basic_optimizer.param_groups[place.param_group_index]["params"][0]
        part, within = place.lp_fragment_address, place.hp_fragment_address
        yield Range(name, part.start, part.numel, master, within.start)


def _zero3(engine: Any, name: str, parameter: Any) -> Iterator[Range]:
    """This worker's equal part of a parameter, without the padding at its end."""
    zero = engine.optimizer
    group, offset, padded = zero.grad_position[zero.get_param_id(parameter)]
    start = padded * dist.get_rank(parameter.ds_process_group)
    size = min(padded, parameter.ds_numel - start)
    if size > 0:
        yield Range(name, start, size, zero.fp32_partitioned_groups_flat[group], offset)


def _publish(engine: Any) -> None:
    """Copy the master weights to the weights of the forward pass."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage in (1, 2):
        zero.update_lp_params()
    elif stage == 3:
        zero.checkpoint_event_prologue()  # drops the small parameters that stay gathered
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        zero.checkpoint_event_epilogue()  # gathers them anew


# --- saving -----------------------------------------------------------------------------------


def _files(engine: Any) -> Iterator[Tensors]:
    """Views of this worker's tensors, one file's at a time."""
    tensors: Tensors = {}
    for own in _owned(engine):
        tensors |= _tensors(engine, own)
        if sum(tensor.nbytes for tensor in tensors.values()) >= FILE_BYTES:
            yield tensors
            tensors = {}
    if tensors:
        yield tensors


def _owned(engine: Any) -> Iterator[Range]:
    """The ranges that this worker saves."""
    is_shared = engine.zero_optimization_stage() == 0
    return (_share(own) if is_shared else own for own in _ranges(engine))


def _copied(name: str, tensor: Tensor, into: Tensors) -> Tensor:
    if name not in into:
        into[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return into[name].copy_(tensor, non_blocking=True)


def _share(whole: Range) -> Range:
    """This worker's equal part of a range that all workers hold."""
    rank, workers = dist.get_rank(), dist.get_world_size()
    first, end = whole.size * rank // workers, whole.size * (rank + 1) // workers
    return replace(whole, start=first, size=end - first, offset=first)


def _tensors(engine: Any, own: Range) -> Tensors:
    state = engine.basic_optimizer.state.get(own.master, {})
    kinds = {WEIGHT: own.master} | {kind: state[kind] for kind in MOMENTS if kind in state}
    return {
        f"{own.name}|{kind}|{own.start}": own.of(tensor)
        for kind, tensor in kinds.items()
        if own.size
    }


def _steps(engine: Any) -> int:
    states = engine.basic_optimizer.state.values()
    return max((int(state["step"]) for state in states if "step" in state), default=0)


# --- loading ----------------------------------------------------------------------------------


class Piece(NamedTuple):
    """A saved tensor: `size` elements of a parameter, from `start` on."""

    start: int
    size: int
    path: Path
    key: str


Saved = dict[tuple[str, str], list[Piece]]
"""The pieces of each (parameter, kind), in the order of their starts."""


def _saved(folder: Path) -> Saved:
    from safetensors import safe_open

    saved: Saved = defaultdict(list)
    for path in folder.glob("part-*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                name, kind, start = key.rsplit("|", 2)
                (size,) = file.get_slice(key).get_shape()
                saved[name, kind].append(Piece(int(start), size, path, key))
    return {key: sorted(pieces) for key, pieces in saved.items()}


def _check(engine: Any, saved: Saved, folder: Path) -> None:
    """Check names and sizes alone, so that all workers raise the same error."""
    for name, _, size in _trainable(engine):
        end = 0
        for piece in saved.get((name, WEIGHT), []):
            if piece.start <= end:
                end = max(end, piece.start + piece.size)
        if end != size:
            told = f"checkpoint {folder}: {name} has {end} of {size} elements"
            raise WrpoError(f"{told}; delete the step's checkpoints to start it anew")


def _load_moments(engine: Any, own: Range, saved: Saved, steps: int) -> None:
    """Fill the range's moments; a parameter without an optimizer step keeps none, or zeros."""
    for kind in MOMENTS:
        if (own.name, kind) in saved:
            state = engine.basic_optimizer.state[own.master]
            if kind not in state:
                state[kind] = torch.zeros_like(own.master)
            state["step"] = torch.tensor(float(steps), device=own.master.device)
            _fill(own.of(state[kind]), own.start, saved[own.name, kind])


def _fill(into: Tensor, start: int, pieces: list[Piece]) -> None:
    """Copy a parameter's elements from `start` on into the 1-D `into`."""
    from safetensors import safe_open

    for piece in pieces:
        first = max(start, piece.start)
        end = min(start + into.numel(), piece.start + piece.size)
        if first < end:
            with safe_open(piece.path, framework="pt") as file:
                part = file.get_slice(piece.key)[first - piece.start : end - piece.start]
            into[first - start : end - start].copy_(part)
