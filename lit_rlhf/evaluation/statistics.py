"""Win rates and means with 95 % confidence intervals."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from mpmath import betainc, findroot

Z95 = statistics.NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class WinRate:
    """How often one model beat another on the same prompts.

    Attributes:
        rate: (wins + ties / 2) / pairs, in [0, 1].
        ci95: Lower and upper end of the 95 % interval.
        wins: Pairs won.
        ties: Pairs tied.
        losses: Pairs lost.
    """

    rate: float
    ci95: tuple[float, float]
    wins: int
    ties: int
    losses: int


@dataclass(frozen=True)
class MeanCI:
    """A mean with its 95 % confidence interval.

    Attributes:
        mean: Arithmetic mean.
        ci95: Lower and upper end of the interval.
        n: Number of values.
    """

    mean: float
    ci95: tuple[float, float]
    n: int


def win_rate(after: Sequence[float], before: Sequence[float], tie_tolerance: float = 0.0) -> WinRate:
    """Share of prompts on which ``after`` scores higher than ``before``; a tie counts half.

    The interval is Wilson's (1927) with the rate, ties counted half, as the proportion. It is not degenerate
    when every pair is won, it needs no random numbers, and with ties it is conservative: a half point varies
    less than the coin flip that the formula assumes.

    Args:
        after: Scores of the model in question, one per prompt.
        before: Scores of the model to beat on the same prompts.
        tie_tolerance: Differences of at most this size are ties.

    Returns:
        Rate, interval and counts.

    Raises:
        ValueError: There are no pairs, the lengths differ, a score is nan, or ``tie_tolerance`` is negative.
    """
    if len(after) != len(before):
        raise ValueError(f"before has {len(before)} scores, but after has {len(after)}")
    if len(after) == 0:
        raise ValueError("win_rate needs at least one pair of scores")
    if not tie_tolerance >= 0:
        raise ValueError(f"tie_tolerance must not be negative, got {tie_tolerance}")
    _check_no_nan(after=after, before=before)
    n = len(after)
    wins = sum(float(a) > float(b) + tie_tolerance for a, b in zip(after, before, strict=True))
    losses = sum(float(b) > float(a) + tie_tolerance for a, b in zip(after, before, strict=True))
    ties = n - wins - losses
    rate = (wins + 0.5 * ties) / n
    return WinRate(rate, proportion_ci95(rate, n), wins, ties, losses)


def mean_ci95(values: Sequence[float]) -> MeanCI:
    """Mean of independent values with Student's t interval.

    Args:
        values: At least two numbers.

    Returns:
        Mean, interval and number of values.

    Raises:
        ValueError: There are fewer than two values, or one is not finite.
    """
    numbers = [float(v) for v in values]
    n = len(numbers)
    if n < 2:
        raise ValueError(f"mean_ci95 needs at least two values, got {n}")
    if not all(map(math.isfinite, numbers)):
        raise ValueError("values must be finite")
    mean = statistics.fmean(numbers)
    half = _t95(n - 1) * statistics.stdev(numbers) / math.sqrt(n)
    return MeanCI(mean, (mean - half, mean + half), n)


def proportion_ci95(rate: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".

    Args:
        rate: Observed proportion, in [0, 1].
        n: Number of observations, at least 1.
    """
    z2 = Z95 * Z95
    center = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n))
    # at the ends the formula gives exactly 0 or 1, except for rounding
    return 0.0 if rate == 0 else center - half, 1.0 if rate == 1 else center + half


def _t95(df: int) -> float:
    """97.5 % quantile of Student's t, where the two tails hold 5 % (Abramowitz and Stegun 26.7.1)."""

    def excess(t: float) -> float:
        tails: float = betainc(df / 2, 0.5, 0, df / (df + t * t), regularized=True)
        return tails - 0.05

    return float(findroot(excess, Z95 + 2.4 / df))


def _check_no_nan(**scores: Sequence[float]) -> None:
    for name, values in scores.items():
        for index, value in enumerate(values):
            if math.isnan(value):
                raise ValueError(f"{name}[{index}] is nan")
