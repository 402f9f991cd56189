import math

import pytest

from lit_rlhf.evaluation import WinRate, mean_ci95, win_rate
from lit_rlhf.evaluation.statistics import _t95


def test_win_rate_by_hand():
    result = win_rate([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 1.0, 5.0])
    assert (result.rate, result.wins, result.ties, result.losses) == (0.625, 2, 1, 1)
    # Wilson by hand: z^2 = 3.841459, n = 4: center (0.625 + 0.480182) / 1.960365,
    # half width 1.959964 / 1.960365 * sqrt(0.0585938 + 0.0600228) = 0.344338
    assert result.ci95[0] == pytest.approx(0.219425, abs=1e-5)
    assert result.ci95[1] == pytest.approx(0.908101, abs=1e-5)


def test_win_rate_interval_matches_a_published_example():
    # 81 of 263: Wilson 0.2553 to 0.3662 (Newcombe 1998, table I)
    low, high = win_rate([1.0] * 81 + [0.0] * 182, [0.5] * 263).ci95
    assert round(low, 4) == 0.2553
    assert round(high, 4) == 0.3662


@pytest.mark.parametrize("n", [1, 10, 1000])
def test_all_wins_and_all_losses_have_real_intervals(n):
    won, lost = win_rate([1.0] * n, [0.0] * n), win_rate([0.0] * n, [1.0] * n)
    assert won.rate == 1.0
    assert won.ci95 == (pytest.approx(n / (n + 3.841459)), 1.0)
    assert lost.ci95 == (0.0, pytest.approx(3.841459 / (n + 3.841459)))


def test_all_ties_are_one_half():
    result = win_rate([1.0] * 8, [1.0] * 8)
    assert (result.rate, result.wins, result.ties, result.losses) == (0.5, 0, 8, 0)
    assert result.ci95[0] + result.ci95[1] == pytest.approx(1.0)
    assert result.ci95[0] < 0.5 < result.ci95[1]


def test_tie_tolerance_includes_its_edge():
    result = win_rate([1.0, 1.5, 2.0], [1.25, 1.0, 1.0], tie_tolerance=0.5)
    assert (result.wins, result.ties, result.losses) == (1, 2, 0)


def test_swapping_the_models_mirrors_the_result():
    after, before = [3.0, 1.0, 2.0, 2.0, 9.0], [1.0, 2.0, 2.0, 1.0, 3.0]
    one, two = win_rate(after, before), win_rate(before, after)
    assert one.rate == pytest.approx(1 - two.rate)
    assert one.ci95 == (pytest.approx(1 - two.ci95[1]), pytest.approx(1 - two.ci95[0]))


def test_infinite_scores_compare():
    assert win_rate([math.inf, math.inf], [0.0, math.inf]) == WinRate(
        0.75, pytest.approx(win_rate([1, 1], [0, 1]).ci95), 1, 1, 0
    )


def test_win_rate_leaves_inputs_unchanged():
    after, before = [1.0, 2.0], [2.0, 1.0]
    win_rate(after, before)
    assert (after, before) == ([1.0, 2.0], [2.0, 1.0])


def test_win_rate_errors():
    with pytest.raises(ValueError, match="win_rate needs at least one pair of scores"):
        win_rate([], [])
    with pytest.raises(ValueError, match="before has 1 scores, but after has 2"):
        win_rate([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match=r"before\[1\] is nan"):
        win_rate([1.0, 2.0], [1.0, math.nan])
    with pytest.raises(ValueError, match=r"tie_tolerance must not be negative, got -0.1"):
        win_rate([1.0], [1.0], tie_tolerance=-0.1)


def test_mean_by_hand():
    result = mean_ci95([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (result.mean, result.n) == (3.0, 5)
    half = 2.776445105 * math.sqrt(2.5 / 5)
    assert result.ci95 == (pytest.approx(3 - half), pytest.approx(3 + half))


def test_mean_of_equal_values_has_no_width():
    assert mean_ci95([7, 7, 7]).ci95 == (7.0, 7.0)


@pytest.mark.parametrize(
    ("df", "quantile"),
    [(1, 12.7062), (10, 2.228139), (11, 2.200985), (20, 2.085963), (30, 2.042272), (100, 1.983972)],
)
def test_t_quantiles(df, quantile):
    assert _t95(df) == pytest.approx(quantile, abs=2e-5)


def test_t_quantiles_fall_towards_the_normal_one():
    values = [_t95(df) for df in range(1, 200)]
    assert values == sorted(values, reverse=True)
    assert _t95(10**9) == pytest.approx(1.959964)


def test_mean_errors():
    with pytest.raises(ValueError, match="mean_ci95 needs at least two values, got 1"):
        mean_ci95([1.0])
    with pytest.raises(ValueError, match="values must be finite"):
        mean_ci95([1.0, math.inf])
