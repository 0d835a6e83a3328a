"""The judged part of the evaluation: answers to benchmarks and pairs, judgments, and the table.

Phases: first answers of all models, second turns, mixtures, scores, judgments, continued
judgments, verdicts, the table. Every call of a model is part of a `Generate` job: the questions to
the judge are prompts like others, asked exactly once and resumed like others.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from wrpo_ray.config import EvaluateConfig, ModelConfig, SamplingConfig
from wrpo_ray.data.samples import Prompts, Samples
from wrpo_ray.errors import UserError
from wrpo_ray.pipeline.model_jobs import by_reward
from wrpo_ray.runtime.job import Job
from wrpo_ray.stages.evaluate.answers import Answers
from wrpo_ray.stages.evaluate.benchmarks import TEMPERATURES, ReadBenchmark, read_judging, split_of
from wrpo_ray.stages.evaluate.comparison import Compare, RewardPair
from wrpo_ray.stages.evaluate.protocols import PAIR, Judging, PairJudging, judging_sampling
from wrpo_ray.stages.evaluate.questions import Continued, Mixture, Questions, SecondTurn
from wrpo_ray.stages.evaluate.verdicts import Game, Verdicts
from wrpo_ray.stages.generate.stage import Generate
from wrpo_ray.stages.score.stage import Score
from wrpo_ray.storage.folder import Folder
from wrpo_ray.text.files import read_text

BEST, MIXTURE = "best-of-sources", "mixture"
MT_BENCH = "mt_bench"
Phase = list[Any]  # of jobs; typed when the phases are handed out


@dataclass
class Evaluation:
    """Builds the phases; `generate` and `scores` make the chain's jobs."""

    config: EvaluateConfig
    models: Sequence[ModelConfig]
    sources: tuple[str, ...]
    own: Prompts | None
    """The held-out prompts."""
    generate: Callable[[ModelConfig, Prompts, SamplingConfig], Generate]
    scores: Callable[..., tuple[Score, ...]]

    def __post_init__(self) -> None:
        self.turns: list[Phase] = [[], []]
        self.mixing: Phase = []
        self.scoring: Phase = []
        self.judging: list[Phase] = [[], []]
        self.verdicts: list[Verdicts] = []

    def check_names(self) -> None:
        """Check that all models that the config names are there.

        Raises:
            UserError: one is not.
        """
        names = [m.name for m in self.models]
        config = self.config
        known = [*names, *self._baselines]
        mixing = config.baselines.mixture
        asked = {
            "judged": config.judged,
            "pairwise.pairs": sum(self._pairs, ()),
            "baselines.mixture": (mixing,) if mixing else (),
        }
        for key, given in asked.items():
            for name in given:
                if name not in (names if key == "baselines.mixture" else known):
                    raise UserError(
                        f"evaluate.{key}: there is no model {name!r}; there are {', '.join(known)}"
                    )

    @property
    def _baselines(self) -> list[str]:
        chosen = self.config.baselines
        return [BEST] * chosen.best_of_sources + [MIXTURE] * bool(chosen.mixture)

    @property
    def _pairs(self) -> tuple[tuple[str, str], ...]:
        return self.config.pairwise.pairs if self.config.pairwise else ()

    # --- benchmarks

    @cached_property
    def benchmarks(self) -> dict[str, ReadBenchmark]:
        """The jobs that read the questions, by name of the benchmark."""
        return {name: ReadBenchmark.of(name, folder) for name, folder in self._folders.items()}

    @cached_property
    def _folders(self) -> dict[str, Folder]:
        given = self.config.benchmarks
        sections = {name: getattr(given, name) for name in type(given).model_fields}
        return {name: Folder(s.path).absolute() for name, s in sections.items() if s}

    def _prompts(self, name: str) -> Prompts:
        return Prompts(self.benchmarks[name].step, (split_of(0),))

    def _sampling(self, name: str) -> SamplingConfig:
        sampling: SamplingConfig = getattr(self.config.benchmarks, name).sampling
        return sampling

    def first_answers(self, model: ModelConfig) -> list[Generate]:
        """A model's answers to the benchmarks that depend on no other answer."""
        jobs = []
        baselines = [name for name in self._baselines if self._is_judged(name)]
        is_source = model.name in self.sources and bool(baselines)
        if not (is_source or self._is_judged(model.name)):
            return []
        for name in self._folders:
            if name != MT_BENCH:
                jobs.append(self.generate(model, self._prompts(name), self._sampling(name)))
            elif self._is_judged(model.name):
                jobs += self._turn(model, self._of_temperatures(Prompts))
        return jobs

    def _is_judged(self, name: str) -> bool:
        return not self.config.judged or name in self.config.judged

    def _of_temperatures(self, kind: Callable[..., Prompts], *more: Any) -> list[Prompts]:
        step, found = self.benchmarks[MT_BENCH].step, sorted({0.7, *TEMPERATURES.values()})
        return [kind(step, (split_of(t),), *more) for t in found]

    def _turn(self, model: ModelConfig, prompts: list[Prompts]) -> list[Generate]:
        longest = getattr(self.config.benchmarks, MT_BENCH).max_tokens
        return [
            self.generate(
                model,
                p,
                judging_sampling(longest, temperature=float(p.splits[0].removeprefix("t"))),
            )
            for p in prompts
        ]

    # --- phases

    def phases(self) -> list[tuple[Job, ...]]:
        """All phases after the questions are read."""
        own = self._answers(self.own, self.config.sampling) if self.own and self._pairs else {}
        for name in self._folders:
            judging = read_judging(name, self._folders[name])
            if name == MT_BENCH:
                self._mt_bench(judging)
            else:
                answers = self._answers(self._prompts(name), self._sampling(name))
                for one in answers.values():
                    if self._is_judged(one.name):
                        prompts = self._prompts(name)
                        self._judge(judging, prompts, dict.fromkeys(judging.positions, (one,)))
        pairs = list(self._pairwise(own))
        return [phase for phase in map(_once, self._in_order(pairs)) if phase]

    def _in_order(self, pairs: list[RewardPair]) -> list[Phase]:
        by_model = [sorted(turn, key=lambda job: job.model.name) for turn in self.turns]
        scoring = map(list, by_reward(self.scoring))
        phases: list[Phase] = [*by_model, self.mixing, *scoring, *self.judging, self.verdicts]
        if self.verdicts or pairs:
            judge = self.config.judge.name if self.config.judge else None
            reference = self._folders.get("alpaca_eval")
            arena = self.config.benchmarks.arena_hard
            by_style = arena is not None and arena.style_control
            found = tuple(self.verdicts), tuple(pairs)
            phases.append([Compare(*found, judge, reference, by_style)])
        return phases

    def _answers(self, prompts: Prompts, sampling: SamplingConfig) -> dict[str, Answers]:
        """One answer to each prompt by every model, and by the baselines made of several models."""
        found: dict[str, Answers] = {}
        rewarded: list[Samples] = []
        baselines = [b for b in self._baselines if self._is_wanted(b, prompts)]
        for model in self.models:
            is_part = bool(baselines) and model.name in self.sources
            if not (is_part or self._is_wanted(model.name, prompts)):
                continue
            job = self.generate(model, prompts, sampling)
            self.turns[0].append(job)
            found[model.name] = Answers(model.name, (job.samples,))
        if BEST in baselines:
            for model in (m for m in self.models if m.name in self.sources):
                samples = found[model.name].samples[0]
                if prompts == self.own:
                    samples = replace(samples, prompts=samples.prompts.of_groups(model.groups))
                rewarded += self._rewards(samples)
            found[BEST] = Answers(BEST, tuple(rewarded), best=True)
        if MIXTURE in baselines:
            found[MIXTURE] = self._mixture(prompts, sampling, [found[s] for s in self.sources])
        return found

    def _is_wanted(self, name: str, prompts: Prompts) -> bool:
        return name in sum(self._pairs, ()) if prompts == self.own else self._is_judged(name)

    def _mixture(
        self, prompts: Prompts, sampling: SamplingConfig, sources: list[Answers]
    ) -> Answers:
        model = next(m for m in self.models if m.name == self.config.baselines.mixture)
        asked = Mixture(prompts.step, prompts.splits, tuple(sources))
        job = self.generate(model, asked, sampling)
        self.mixing.append(job)
        return Answers(MIXTURE, (_of(job, prompts),), parts=tuple(sources))

    # --- judging

    def _mt_bench(self, judging: Judging) -> None:
        prompts = self._of_temperatures(Prompts)
        splits = tuple(split for p in prompts for split in p.splits)
        every = Prompts(self.benchmarks[MT_BENCH].step, splits)
        for model in self.models:
            if not self._is_judged(model.name):
                continue
            jobs = self._turn(model, prompts)
            first = Answers(model.name, tuple(job.samples for job in jobs))
            later = self._turn(model, self._of_temperatures(SecondTurn, (first,)))
            given = zip(later, prompts, strict=True)
            second = Answers(model.name, tuple(_of(job, p) for job, p in given))
            self.turns[0] += jobs
            self.turns[1] += later
            self._judge(judging, every, {1: (first,), 2: (first, second)})

    def _judge(
        self,
        judging: Judging,
        prompts: Prompts,
        answers: dict[int, tuple[Answers, ...]],
        against: str | None = None,
    ) -> None:
        judge, games = self.config.judge, []
        assert judge is not None
        for position, given in answers.items():
            asked = Questions(prompts.step, prompts.splits, given, judging, position)
            job = self.generate(judge, asked, judging.sampling)
            self.judging[0].append(job)
            game = Game(asked, _of(job, prompts))
            if judging.asks_again:
                parts = (prompts.step, prompts.splits, given, judging, position)
                again = self.generate(judge, Continued(*parts, game.judgments), judging.sampling)
                self.judging[1].append(again)
                game = replace(game, continued=_of(again, prompts))
            games.append(game)
        model = answers[1][0].name
        self.verdicts.append(Verdicts(judging, model, against, judge.name, tuple(games)))

    def _pairwise(self, own: dict[str, Answers]) -> Iterator[RewardPair]:
        config = self.config.pairwise
        if config is None or self.own is None:
            return
        judging = PairJudging(_template(config.template), config.max_tokens)
        for a, b in self._pairs:
            if config.by == "judge":
                given = own[a], own[b]
                self._judge(judging, self.own, dict.fromkeys(judging.positions, given), b)
            else:
                rewards = self._rewarded(own[a]), self._rewarded(own[b])
                yield RewardPair(a, b, rewards, self.own, config.margin)

    def _rewarded(self, answers: Answers) -> tuple[Samples, ...]:
        if answers.best:
            return answers.samples
        return self._rewards(answers.samples[0])

    def _rewards(self, samples: Samples) -> tuple[Samples, ...]:
        """The answers with their rewards, by the jobs that score them."""
        of_benchmark = self.own is None or samples.prompts.step != self.own.step
        jobs = self.scores(samples, of_benchmark=of_benchmark)
        self.scoring += jobs
        return tuple(job.samples for job in jobs)


def _of(job: Generate, prompts: Prompts) -> Samples:
    """A job's answers to derived prompts, looked up by the original prompts."""
    return replace(job.samples, prompts=prompts)


def _once(phase: Phase) -> tuple[Job, ...]:
    return tuple({job.step.key: job for job in phase}.values())


def _template(path: str | None) -> str:
    return PAIR if path is None else read_text(path, "evaluate.pairwise.template")
