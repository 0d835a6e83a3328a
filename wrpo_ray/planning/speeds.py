"""Rates of engines and workers: given, measured in the output, or guessed by a model's size."""

from collections.abc import Mapping
from functools import partial

from wrpo_ray.config import Actors, Config, ModelConfig
from wrpo_ray.pipeline.held_out import DPO, FUSED, SFT
from wrpo_ray.planning import rates
from wrpo_ray.planning.measured import GIVEN, GUESS, MEASURED, Measured, geometric_mean
from wrpo_ray.planning.spread import SURE, Spread
from wrpo_ray.runtime.job import Job, JobKind
from wrpo_ray.runtime.ledger import Usage
from wrpo_ray.stages.generate.stage import Generate, at_once
from wrpo_ray.stages.train.stage import Train
from wrpo_ray.storage.folder import Folder

Origin = tuple[float, str]
"""A number, and where it comes from."""
SPREAD = {GIVEN: SURE, MEASURED: Spread.both(1.3), GUESS: Spread.both(2)}
"""Of rates, by their origin."""
CPU, PACED = Spread(2, 3), Spread.both(2)
"""Of guesses on CPUs, which are seldom twice as quick as the one that the guesses are set by, and
often shared; and of guesses by what was measured of other work on the same CPUs."""


class Speeds:
    """The speeds of a config's actors and workers."""

    def __init__(
        self, config: Config, root: Folder, jobs: Mapping[str, Job], measured: Measured
    ) -> None:
        self.config, self.root, self.measured = config, root, measured
        self.jobs = [job for job in jobs.values() if isinstance(job, Generate)]
        self._paces: dict[str, float | None] = {}

    def answer_seconds(self, model: ModelConfig, size: float, wanted: Usage) -> Origin:
        """Actor-seconds of answers: by the rate that is given, or by the guess times the pace."""
        for name in self._names(model.name):
            if given := self.config.plan.rates.get(name):
                return wanted.output_tokens / given, GIVEN
        own = filter(None, (self._pace(name) for name in self._names(model.name)))
        guess = self._guess(model, size, wanted)
        if (pace := next(own, None)) is not None:
            return guess * pace, MEASURED
        return guess * self._other_pace(model), GUESS

    def _guess(self, model: ModelConfig, size: float, wanted: Usage) -> float:
        """Actor-seconds of answers, by the size of the model and how full its engines are."""
        if model.endpoint:
            return wanted.output_tokens / (model.endpoint.concurrency * rates.STREAM)
        buckets = self.config.storage.buckets
        bucket, each = wanted.rows / buckets, buckets / min(model.actors.max, buckets)
        full = at_once(model, bucket, each, weights=rates.BYTES * size)
        power = self.power(of_engine(model))
        return power.answer_seconds(size, wanted.prompt_tokens, wanted.output_tokens, full)

    def _pace(self, name: str) -> float | None:
        """How much longer a model took than guessed, if it has answered."""
        if name not in self._paces:
            job = next((j for j in self.jobs if j.model.name == name), None)
            guess = job and partial(self._guess, job.model, self.size(name, job.folder))
            self._paces[name] = self.measured.pace(name, job.kind, guess) if job and guess else None
        return self._paces[name]

    def _other_pace(self, model: ModelConfig) -> float:
        """The pace of other models on the same kind of hardware; 1 if none has answered."""
        if model.endpoint:
            return 1.0
        alike = {
            job.model.name
            for job in self.jobs
            if not job.model.endpoint and on_gpu(job.model) == on_gpu(model)
        }
        return geometric_mean(list(filter(None, map(self._pace, sorted(alike)))))

    def train_guess(self, job: Train) -> float:
        """Tokens/s of a worker, by the size of the model."""
        config = job.config
        actors = Actors(max=config.workers, num_cpus=config.num_cpus, num_gpus=config.num_gpus)
        size = self.size(job.step.name, job.base)
        return self.power(actors).training_rate(size, checkpointing=config.gradient_checkpointing)

    def compute_speed(self, actors: Actors) -> float:
        """How much faster than guessed trainings and forward passes are here.

        By the trainings in the output; where there are none, on CPUs by the engines, which are on
        the same cores.
        """
        found = [told.rate / self.train_guess(job) for job, told in self.measured.trained]
        if not found and not actors.num_gpus and self.cpu_pace:
            return 1 / self.cpu_pace
        return geometric_mean(found)

    @property
    def cpu_pace(self) -> float | None:
        """How much longer engines on CPUs took for answers than guessed; None if there are none."""
        here = {j.model.name for j in self.jobs if not (j.model.endpoint or on_gpu(j.model))}
        paces = list(filter(None, map(self._pace, sorted(here))))
        return geometric_mean(paces) if paces else None

    def spread(self, origin: str, actors: Actors) -> Spread:
        """How far a rate may be off; guesses on CPUs less once something has been measured."""
        if origin == GUESS and not actors.num_gpus:
            is_known = self.cpu_pace or self.measured.trained
            return PACED if is_known else CPU
        return SPREAD[origin]

    def rate(self, pool: str, measured: float | None, guess: float) -> Origin:
        """Tokens or rows that an actor makes in a second: given, measured or guessed."""
        given = [self.config.plan.rates.get(name) for name in self._names(pool)]
        choices = [(n, GIVEN) for n in given if n] + ([(measured, MEASURED)] if measured else [])
        return (*choices, (guess, GUESS))[0]

    def start(self, pool: str, kind: JobKind, alike: JobKind | None = None) -> float | None:
        """Mean seconds of a start: of the pool, else of its sizes, else of any of kind `alike`."""
        target, found = self.config.target, self.measured
        same = (target.name, SFT, DPO, FUSED) if target and pool in (SFT, DPO, FUSED) else ()
        of_any = found.start(kind=alike) if alike else None
        return found.start((pool,), kind=kind) or found.start(same, kind=kind) or of_any

    def _names(self, pool: str) -> tuple[str, ...]:
        """Names under which a rate may be given: a trained model is as fast as the target."""
        target = self.config.target
        return (pool, target.name) if target and pool in (SFT, DPO, FUSED) else (pool,)

    def size(self, name: str, folder: Folder) -> float:
        """Parameters that each token uses."""
        name, folder = self.model(name, folder)
        return self.config.plan.parameters.get(name) or rates.parameters(folder, name)

    def model(self, name: str, folder: Folder) -> tuple[str, Folder]:
        """Name and folder of a model of the same sizes: for a trained one the target."""
        target = self.config.target
        if target and folder.is_within(self.root):
            return target.name, Folder(target.model).absolute()
        return name, folder

    def power(self, actors: Actors) -> rates.Power:
        """Compute resources of an actor, to guess by."""
        return rates.Power(actors.num_gpus, actors.cpus, self.config.plan.gpu_tflops)


def of_engine(model: ModelConfig) -> Actors:
    """The pool with the GPUs of all parts of an engine."""
    gpus = model.actors.num_gpus * model.parts
    return model.actors.model_copy(update={"num_gpus": gpus})


def on_gpu(model: ModelConfig) -> bool:
    """Whether a model's engines are on GPUs."""
    return model.actors.num_gpus > 0
