"""AlpacaEval 2: win rate and length-controlled win rate (arXiv 2404.04475); pure functions.

They follow the official code (alpaca_eval, `length_controlled_v1`) and give the same figures. The
solver is sensitive to its random numbers, so the order of rows and columns, the folds and the seed
are part of the algorithm.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv
from sklearn import config_context
from sklearn.linear_model import LogisticRegressionCV
from sklearn.metrics import make_scorer
from sklearn.model_selection import GroupKFold

from wrpo_ray.errors import UserError

ANNOTATION = pa.schema(
    [
        ("index", pa.int64()),  # of the instruction, from 0
        (
            "preference",
            pa.float64(),
        ),  # 1 baseline is better .. 2 model is; 0 or 1.5 tie; null failed
        ("len_1", pa.int64()),  # characters of the baseline's answer
        ("len_2", pa.int64()),  # characters of the model's answer
    ]
)
"""The judge's verdict on one instruction. The official code takes `index` from the row's position,
so an instruction without a verdict keeps its row, with a null preference."""

GAMED_WEIGHT = 0.1
"""The weight of a row of a gamed baseline: there are two, with a total weight of 0.2."""
FOLDS, SEED = 5, 123


@dataclass(frozen=True)
class Reference:
    """The benchmark's auxiliary data: verdicts on two baselines that game length, and difficulties.

    Arrays of G rows: features (G, 3) as of `_features`, preference (G,) in 0..1.
    """

    features: np.ndarray
    preference: np.ndarray
    difficulty: Mapping[int, float]
    """{instruction: difficulty}."""


@dataclass(frozen=True)
class AlpacaEval:
    """Rates and standard errors in percent; counts of instructions."""

    win_rate: float
    standard_error: float
    length_controlled_win_rate: float
    """The predicted win rate for answers as long as the baseline's; 50 where all verdicts are ties;
    NaN where all lengths differ by the same amount, which leaves nothing to control for."""
    length_controlled_standard_error: float
    discrete_win_rate: float
    """The win rate with each verdict rounded to win or loss; a tie is half a win."""
    wins: int
    losses: int
    draws: int
    judged: int
    failed: int
    """Instructions without a valid verdict, which the rates leave out."""


def read_reference(path: Path) -> Reference:
    """Read the benchmark's `df_gamed.csv`.

    Raises:
        UserError: the file is missing or malformed.
    """
    try:
        table = csv.read_csv(path)
        rows = {name: table[name].to_numpy() for name in table.column_names}
        features = _features(
            rows["std_delta_len"], rows["instruction_difficulty"], rows["not_gamed_baseline"]
        )
        # The first row of an instruction counts; all of them have the same difficulty.
        pairs = zip(rows["index"].tolist(), rows["instruction_difficulty"].tolist(), strict=True)
        return Reference(features, rows["preference"], dict(reversed(list(pairs))))
    except (OSError, pa.ArrowException, KeyError) as error:
        raise UserError(f"{path} is not AlpacaEval's df_gamed.csv: {error}") from None


def preference(logprobs: Mapping[str, float], first: str, second: str, swapped: bool) -> float:
    """Return the judge's preference, from 1 to 2, by the log-probabilities of its first token.

    Args:
        logprobs: of the most likely tokens.
        first: token that prefers the answer shown first (`m` in the official prompt).
        second: token that prefers the other (`M`).
        swapped: whether the model's answer was shown first.

    Returns:
        1 plus the probability share of the model's token; NaN where both tokens are missing.
    """
    a, b = (math.exp(logprobs.get(token, -math.inf)) for token in (first, second))
    if a + b == 0:
        return math.nan
    return 1 + (a if swapped else b) / (a + b)


def alpaca_eval(annotations: pa.Table, reference: Reference) -> AlpacaEval:
    """Return win rate and length-controlled win rate of a model against the baseline, in percent.

    Args:
        annotations: one row for each instruction, with the columns of `ANNOTATION`, in the
            benchmark's order.
        reference: returned by `read_reference`.

    Raises:
        UserError: the reference lacks an instruction.

    Example:
        >>> reference = read_reference(Path("alpaca_eval/df_gamed.csv"))  # doctest: +SKIP
        >>> alpaca_eval(annotations, reference).length_controlled_win_rate  # doctest: +SKIP
        55.9
    """
    annotations = annotations.select(ANNOTATION.names).cast(ANNOTATION)
    won = _won(annotations["preference"].to_numpy())
    judged = won[~np.isnan(won)]
    controlled = _length_controlled(annotations, won, reference)
    rate, error = _percent(judged)
    # rint rounds half to even, so that 0.5, a tie, is kept out of it.
    discrete, _ = _percent(np.where(judged == 0.5, 0.5, np.rint(judged)))
    controlled_rate, controlled_error = _percent(controlled)
    return AlpacaEval(
        win_rate=rate,
        standard_error=error,
        length_controlled_win_rate=controlled_rate,
        length_controlled_standard_error=controlled_error,
        discrete_win_rate=discrete,
        wins=int((judged > 0.5).sum()),
        losses=int((judged < 0.5).sum()),
        draws=int((judged == 0.5).sum()),
        judged=len(judged),
        failed=len(won) - len(judged),
    )


def _won(preferences: np.ndarray) -> np.ndarray:
    """The model's share of each verdict, from 0 to 1; NaN without a verdict."""
    won = np.where(preferences == 0, 0.5, preferences - 1)
    return np.where((won >= 0) & (won <= 1), won, np.nan)


def _percent(shares: np.ndarray) -> tuple[float, float]:
    """Mean and standard error, in percent; NaN of too few values."""
    n = len(shares)
    mean = float(np.mean(shares)) if n else math.nan
    error = float(np.std(shares, ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return 100 * mean, 100 * error


def _features(length: np.ndarray, difficulty: np.ndarray, model: np.ndarray) -> np.ndarray:
    """(N, 3): tanh of the length difference, difficulty, 1 unless the model is a gamed baseline."""
    return np.column_stack([np.tanh(length), difficulty, model.astype(float)])


def _length_controlled(
    annotations: pa.Table, won: np.ndarray, reference: Reference
) -> np.ndarray:  # (N,)
    """Predict the model's share on each instruction for an answer as long as the baseline's.

    The fit leaves out instructions without a verdict; the prediction includes them.
    """
    lengths = (annotations["len_1"].to_numpy() - annotations["len_2"].to_numpy()).astype(float)
    known = ~np.isnan(won)
    if not lengths.any() or (won[known] == 0.5).all():
        judged: np.ndarray = won[known]
        return judged  # nothing to control: all lengths are equal, or all verdicts are ties
    spread = np.std(lengths, ddof=1) if len(lengths) > 1 else 0.0
    if not spread:
        return np.array([])
    difficulty = _difficulties(annotations["index"].to_pylist(), reference)
    ones = np.ones(len(won))
    features = np.concatenate([reference.features, _features(lengths / spread, difficulty, ones)])
    shares = np.concatenate([reference.preference, won])
    weights = np.concatenate([np.full(len(reference.preference), GAMED_WEIGHT), ones])
    known = ~np.isnan(shares)
    model = _fit(features[known], shares[known], weights[known])
    controlled: np.ndarray = model.predict_proba(_features(0 * ones, difficulty, ones))[:, 1]
    return controlled


def _difficulties(indices: list[int], reference: Reference) -> np.ndarray:
    unknown = set(indices) - reference.difficulty.keys()
    if unknown:
        raise UserError(
            f"instruction {min(unknown)} is not in AlpacaEval's reference file, which has "
            f"{len(reference.difficulty)}"
        )
    return np.array([reference.difficulty[i] for i in indices])


def _fit(features: np.ndarray, shares: np.ndarray, weights: np.ndarray) -> LogisticRegressionCV:
    """Fit a logistic GLM of shares with an L1 penalty chosen by cross-validated log loss.

    A share p becomes a row of label 1 with weight p and one of label 0 with weight 1 - p, both in
    one fold.
    """
    n = len(shares)
    groups = np.tile(np.arange(n), 2)
    shares, weights = np.concatenate([shares, 1 - shares]), np.tile(weights, 2)
    with config_context(enable_metadata_routing=True):
        scorer = make_scorer(
            _log_loss, response_method="predict_proba", greater_is_better=False
        ).set_score_request(share=True, weight=True)
        model = LogisticRegressionCV(
            cv=GroupKFold(FOLDS),
            scoring=scorer,
            solver="liblinear",
            l1_ratios=(1,),
            use_legacy_attributes=False,
            fit_intercept=False,
            random_state=SEED,
        ).set_fit_request(sample_weight=True)
        return model.fit(
            np.tile(features, (2, 1)),
            np.repeat([1, 0], n),
            sample_weight=shares * weights,
            groups=groups,
            share=shares,
            weight=weights,
        )


def _log_loss(
    label: np.ndarray, predicted: np.ndarray, share: np.ndarray, weight: np.ndarray
) -> float:
    """Mean weighted log loss; `share` is that of the row's own label."""
    share = np.where(label == 1, share, 1 - share)
    predicted = np.clip(predicted, 1e-15, 1 - 1e-15)
    loss = share * np.log(predicted) + (1 - share) * np.log(1 - predicted)
    return -float(np.mean(loss * weight))
