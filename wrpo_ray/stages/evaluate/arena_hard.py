"""Arena-Hard v0.1: win rates against a baseline by Bradley-Terry scores (arXiv 2406.11939).

Pure functions that give the figures of the official code of v0.1; version 2 computes differently.
Each question is judged in two games: in the first the baseline's answer is shown as A, in the
second the model's. Models play only against the baseline, so a win rate depends on the model's own
games alone. Its interval also depends on the other models: the official bootstrap draws from the
battles of the whole board.
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
"""{verdict: (number of battles it counts as, A's share of each)}."""

ROUNDS, SEED = 100, 42
INTERVAL = (2.5, 97.5)
LOG_BASE = math.log(10)
"""Scores are in units of 400 Elo points: a difference of 1 means odds of 10 to 1."""

CODE = re.compile(r"```([^`]*)```")
HEADERS = re.compile(r"^#{1,6}\s", re.MULTILINE)
LISTS = (
    re.compile(r"^[^\S\n]*\d+\.\s", re.MULTILINE),
    re.compile(r"^[^\S\n]*[-*+]\s", re.MULTILINE),
)
BOLDS = (re.compile(r"\*\*[^*\n]+\*\*"), re.compile(r"__[^_\n]+__"))


WORDS = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Style:
    """The features of an answer that style control adjusts for."""

    tokens: int
    headers: int
    lists: int
    """List items, numbered or not."""
    bolds: int


@dataclass(frozen=True)
class Games:
    """The judge's verdicts on one question, such as `A>>B`; None without a verdict."""

    first: str | None
    """The baseline's answer is A."""
    second: str | None
    """The model's answer is A."""
    baseline: Style | None = None
    model: Style | None = None
    """The styles of both answers, for style control."""


@dataclass(frozen=True)
class ArenaHard:
    """Win rate against the baseline and its 95 % interval, in percent."""

    win_rate: float
    low: float
    high: float
    judged: int
    """Games with a verdict."""
    failed: int
    """Games without a verdict; the other game of the question still counts."""


def parse_verdict(judgment: str) -> str | None:
    """Return the verdict in a judgment; None without one, or with contradicting ones."""
    labels = set(LABEL.findall(judgment))
    return labels.pop() if len(labels) == 1 and labels <= VERDICTS.keys() else None


def is_unfinished(judgment: str) -> bool:
    """Whether the judgment has no label, so that the judge is asked once to continue."""
    return not LABEL.search(judgment)


def style_of(answer: str, tokens: int) -> Style:
    """Return the style of an answer with `tokens` tokens (officially counted as gpt-4o's).

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
    """Return each model's win rate against the baseline, in percent, with a 95 % interval.

    The win rate follows from the model's Bradley-Terry score, fitted by logistic regression.

    Args:
        board: {model: its games, in the order of the questions}.
        style_control: adjust for the length and markdown of the answers. As in the official code,
            models are compared at the mean style difference of the whole board.

    Returns:
        {model: figures}; NaN for a model without a verdict.

    Raises:
        UserError: style control is asked for, and a game lacks the styles of its answers.

    Example:
        >>> games = [Games("A=B", "A=B"), Games("B>A", "A>B"), Games("A>B", "B>A")]
        >>> result = arena_hard({"mine": games})["mine"]
        >>> round(result.win_rate), result.judged, result.failed
        (50, 6, 0)
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
    """The numbers of games with and without a verdict."""
    judged = sum(v in VERDICTS for games in questions for v in (games.first, games.second))
    return judged, 2 * len(questions) - judged


def _ratings(battles: _Battles, style_control: bool) -> np.ndarray:
    """Scores relative to the baseline: estimate, lower and upper bound, (3, models)."""
    rng = np.random.RandomState(SEED)  # what pandas' `sample` and numpy's `choice` draw with
    n = len(battles.shares)
    drawn = [
        _fit(battles, np.bincount(rng.choice(n, n), minlength=n), style_control)
        for _ in range(ROUNDS)
    ]
    # A model without a drawn battle has no score in that round.
    interval = np.nanpercentile(drawn, INTERVAL, axis=0)
    return np.vstack([_fit(battles, np.ones(n), style_control), interval])


@dataclass(frozen=True)
class _Battles:
    """Battles of the baseline against models, as input of a logistic regression.

    N battles, U distinct rows of features: battles of the same model and style share one.
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
    """The difference of both styles; each feature is divided by the sum of both plus one."""
    if games.baseline is None or games.model is None:
        raise UserError(f"style control needs the styles of both answers; {name} lacks one")
    a, b = (np.array(astuple(style), float) for style in (games.baseline, games.model))
    difference: np.ndarray = (a - b) / (a + b + 1)
    return difference


def _standard(styles: np.ndarray) -> np.ndarray:
    """Scale each column to mean 0 and standard deviation 1; constant columns become 0."""
    spread = styles.std(axis=0)
    standard: np.ndarray = (styles - styles.mean(axis=0)) / np.where(spread > 0, spread, np.inf)
    return standard


def _fit(battles: _Battles, counts: np.ndarray, style_control: bool) -> np.ndarray:  # (models,)
    """Fit scores relative to the baseline; battle i occurs `counts[i]` times. NaN without battles.

    Each battle is two rows of the regression: two wins, two losses, or one of each for a tie.
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
