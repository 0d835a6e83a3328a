"""Whether SFT runs beside the sources, by the decision of the run itself (`pipeline.branches`)."""

from collections.abc import Mapping, Sequence

from wrpo_ray.pipeline.branches import SELECT, Branches, Early, Phase, split
from wrpo_ray.pipeline.chain import Chain
from wrpo_ray.planning.work import Beside, Work, phases, pools
from wrpo_ray.runtime.context import Run


def beside_of(chain: Chain, works: Sequence[Work], gpus: int | None) -> Beside | None:
    """The stages of a built chain that run side by side on a cluster; None if none do.

    Where the sources' engines take all GPUs, SFT begins when the first ones end: then nothing is
    counted as side by side.
    """
    run, early = Run(chain.root, chain.config.storage.buckets), Early.of(chain.stages)
    if not early:
        return None
    all_phases = [Phase(stage.name, phase) for stage in chain.stages for phase in stage.phases]
    _, sources, target, _ = split(all_phases)
    branches = Branches.of(run, early, sources, target)
    names, others = ({phase.stage for phase in part} for part in (sources, target))
    held, wanted = (_most_gpus([w for w in works if w.stage in part]) for part in (names, others))

    def room(need: Mapping[str, float]) -> bool:
        return gpus is None or max(need.get("GPU", 0.0), held + wanted) <= gpus

    if not branches.are_worth_it(run, room):
        return None
    awaited = names - {SELECT} if branches.awaited else ()
    return Beside(names, others, dict.fromkeys(awaited, early.select.prompts.share))


def _most_gpus(works: Sequence[Work]) -> float:
    """GPUs of all engines of the phase that has the most."""
    left = [w for w in works if w.actor_seconds]
    return max((sum(w.gpus * w.engines for w in pools(p)) for p in phases(left)), default=0.0)
