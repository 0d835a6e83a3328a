"""Arena-Hard v0.1: win rates against a baseline, by Bradley-Terry (arXiv 2406.11939).

Pure functions, equal to the official code of v0.1; version 2 computes differently. Two games a
question: in the first the baseline's answer is shown as A, in the second the model's. Each model is
compared with the baseline alone, so its win rate depends on its own games. Its interval does not
quite: the official bootstrap draws from the battles of the whole board at once, in its order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression

from wrpo_ray.errors import UserError

LABEL = re.compile(r"\[\[([AB<>=]+)\]\]")
VERDICTS = {"A>>B": (3, 1.0), "A>B": (1, 1.0), "A=B": (1, 0.5), "B>A": (1, 0.0), "B>>A": (3, 0.0)}
"""Verdict: (battles that it counts for, A's share of each)."""

ROUNDS, SEED = 100, 42
INTERVAL = (2.5, 97.5)
LOG_BASE = math.log(10)
"""Ratings are in units of 400 Elo points: at a difference of 1 the odds are 10 to 1."""

CODE = re.compile(r"```([^`]*)```")
HEADERS = re.compile(r"^#{1,6}\s", re.MULTILINE)
LISTS = (re.compile(r"^\s*\d+\.\s", re.MULTILINE), re.compile(r"^\s*[-*+]\s", re.MULTILINE))
BOLDS = (re.compile(r"\*\*[^*\n]+\*\*"), re.compile(r"__[^_\n]+__"))


WORDS = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Style:
    """What style control looks at in an answer."""

    tokens: int
    headers: int
    lists: int
    """Items, numbered or not."""
    bolds: int


@dataclass(frozen=True)
class Games:
    """The judge's verdicts on one question; None where it gave none."""

    first: str | None
    """The baseline is A."""
    second: str | None
    """The model is A."""
    baseline: Style | None = None
    model: Style | None = None
    """Of both answers, for style control."""


@dataclass(frozen=True)
class ArenaHard:
    """Win rate against the baseline and its 95 % interval, in percent."""

    win_rate: float
    low: float
    high: float
    judged: int
    """Games with a verdict."""
    failed: int
    """Games without one; the other game of the question counts."""


def parse_verdict(judgment: str) -> str | None:
    """The one verdict in a judgment; None where there is none, or where two contradict."""
    labels = set(LABEL.findall(judgment))
    return labels.pop() if len(labels) == 1 and labels <= VERDICTS.keys() else None


def is_unfinished(judgment: str) -> bool:
    """Whether the judge is asked, once, to go on: there is no label at all."""
    return not LABEL.search(judgment)


def style_of(answer: str, tokens: int) -> Style:
    """The style of an answer of some tokens (the official code counts with gpt-4o's tokenizer).

    Markdown inside code blocks does not count.
    """
    for block in CODE.findall(answer):
        answer = answer.replace(block, "")
    return Style(
        tokens,
        len(HEADERS.findall(answer)),
        sum(len(pattern.findall(answer)) for pattern in LISTS),
        sum(len(pattern.findall(answer)) for pattern in BOLDS),
    )


def length_of(answer: str) -> int:
    """An answer's words and signs, for style control.

    The official code counts tokens of gpt-4o, whose vocabulary is not here. What is used is the
    difference of both answers relative to their sum, for which the unit hardly matters.
    """
    return len(WORDS.findall(answer))


def arena_hard(
    board: Mapping[str, Sequence[Games]], *, style_control: bool = False
) -> dict[str, ArenaHard]:
    """The figures of all models of a board.

    Args:
        board: each model's games, in the order of the questions.
        style_control: take out what length and markdown win. As in the official code, a model is
            rated at the board's mean difference in style: of a board of one model, its own.

    Returns:
        The figures, by model; NaN for a model without a verdict.

    Raises:
        UserError: style control, and an answer's style is not known.
    """
    counts = {name: _counts(games) for name, games in board.items()}
    rated = {name: games for name, games in board.items() if counts[name][0]}
    figures = dict.fromkeys(board, (math.nan,) * 3)
    if rated:
        ratings = _ratings(_battles(rated, style_control), style_control)  # (3, models)
        rates = 100 / (1 + 10**-ratings)
        figures |= {name: tuple(rates[:, i].tolist()) for i, name in enumerate(rated)}
    return {name: ArenaHard(*figures[name], *counts[name]) for name in board}


def _counts(questions: Sequence[Games]) -> tuple[int, int]:
    """Games judged and failed."""
    judged = sum(v in VERDICTS for games in questions for v in (games.first, games.second))
    return judged, 2 * len(questions) - judged


def _ratings(battles: _Battles, style_control: bool) -> np.ndarray:
    """(3, models): each model's rating with the baseline's at 0, and its interval."""
    rng = np.random.RandomState(SEED)  # what pandas' `sample` and numpy's `choice` draw with
    n = len(battles.shares)
    drawn = [
        _fit(battles, np.bincount(rng.choice(n, n), minlength=n), style_control)
        for _ in range(ROUNDS)
    ]
    # A model none of whose battles is drawn has no rating in that round.
    interval = np.nanpercentile(drawn, INTERVAL, axis=0)
    return np.vstack([_fit(battles, np.ones(n), style_control), interval])


@dataclass(frozen=True)
class _Battles:
    """Battles of the baseline against a model, as a logistic regression sees them.

    N battles, U different rows of features: several battles of a question share one.
    """

    features: np.ndarray  # (U, 1 + models + styles)
    rows: np.ndarray  # (N,) index into features
    shares: np.ndarray  # (N,) the baseline's share
    models: int


def _battles(board: Mapping[str, Sequence[Games]], style_control: bool) -> _Battles:
    models: list[int] = []
    shares: list[float] = []
    styles: list[np.ndarray] = []
    for m, (name, questions) in enumerate(board.items()):
        for games in questions:
            for verdict, baseline_is_a in ((games.first, True), (games.second, False)):
                count, share = VERDICTS.get(verdict or "", (0, 0.0))
                models += [m] * count
                shares += [share if baseline_is_a else 1 - share] * count
                if style_control and count:
                    styles += [_difference(name, games)] * count
    versus = np.zeros((len(models), 1 + len(board)))
    versus[:, 0] = LOG_BASE
    versus[np.arange(len(models)), 1 + np.array(models, int)] = -LOG_BASE
    features = np.column_stack([versus, _standard(np.array(styles))]) if styles else versus
    unique, rows = np.unique(features, axis=0, return_inverse=True)
    return _Battles(unique, rows, np.array(shares), len(board))


def _difference(name: str, games: Games) -> np.ndarray:  # (4,)
    """How the styles of both answers differ, each part relative to their sum and one."""
    if games.baseline is None or games.model is None:
        raise UserError(f"style control needs the styles of both answers; {name} lacks one")
    a, b = (np.array(astuple(style), float) for style in (games.baseline, games.model))
    difference: np.ndarray = (a - b) / (a + b + 1)
    return difference


def _standard(styles: np.ndarray) -> np.ndarray:
    """Each column with mean 0 and standard deviation 1; one that never varies as 0."""
    spread = styles.std(axis=0)
    standard: np.ndarray = (styles - styles.mean(axis=0)) / np.where(spread > 0, spread, np.inf)
    return standard


def _fit(battles: _Battles, counts: np.ndarray, style_control: bool) -> np.ndarray:  # (models,)
    """Ratings less the baseline's, of battles that occur `counts` times; NaN of no battle.

    Each battle is two rows of the regression: won and won, lost and lost, or, of a tie, one each.
    With style control the official code regularizes, without it does not.
    """
    won = np.bincount(battles.rows, 2 * counts * battles.shares, len(battles.features))
    lost = np.bincount(battles.rows, 2 * counts * (1 - battles.shares), len(battles.features))
    penalty = {} if style_control else {"C": np.inf, "tol": 1e-8}
    fitted = LogisticRegression(fit_intercept=False, **penalty).fit(
        np.tile(battles.features, (2, 1)),
        np.repeat([1, 0], len(battles.features)),
        sample_weight=np.concatenate([won, lost]),
    )
    models = slice(1, 1 + battles.models)
    drawn = (won + lost) @ (battles.features[:, models] != 0) > 0
    return np.where(drawn, fitted.coef_[0][models] - fitted.coef_[0][0], np.nan)
