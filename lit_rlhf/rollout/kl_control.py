"""Controllers that choose the coefficient of the KL penalty."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping


def _check_number(name: str, value: float, *, positive: bool) -> float:
    value = float(value)
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(f"{name} must be finite and {'positive' if positive else 'not negative'}, got {value}")
    return value


class KLController(ABC):
    """Holds the KL coefficient; subclass it to write another schedule."""

    def __init__(self, coefficient: float) -> None:
        super().__init__()
        self._value = _check_number("coefficient", coefficient, positive=False)

    @property
    def value(self) -> float:
        """The coefficient to use now."""
        return self._value

    def problems(self, size: int) -> list[str]:
        """Return what is wrong with the settings for iterations of ``size`` responses over all ranks, one line each."""
        return []

    @abstractmethod
    def update(self, kl: float, n: int) -> None:
        """Update the coefficient from the mean KL of the last ``n`` responses."""

    def state_dict(self) -> dict[str, float]:
        """Everything that changes during training, as plain floats."""
        return {"coefficient": self._value}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore a ``state_dict``.

        Raises:
            KeyError: ``state`` lacks "coefficient".
            ValueError: The coefficient is negative or not finite.
        """
        self._value = _check_number("coefficient", state["coefficient"], positive=False)


class FixedKL(KLController):
    """The same coefficient throughout.

    Args:
        coefficient: KL coefficient (beta), at least 0.

    Raises:
        ValueError: ``coefficient`` is negative or not finite.
    """

    def __init__(self, coefficient: float = 0.05) -> None:
        super().__init__(coefficient)

    def update(self, kl: float, n: int) -> None:
        """Change nothing."""

    def state_dict(self) -> dict[str, float]:
        """Nothing: the coefficient is a setting, and a resumed run takes it from its own configuration."""
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Change nothing."""


class AdaptiveKL(KLController):
    """Steers the measured KL toward a target.

    Each update multiplies the coefficient by ``1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon``.

    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2; the horizon form is that of the authors' code.

    Args:
        coefficient: Where the coefficient starts, above 0 (0 could never change).
        target: Mean KL of a response (summed over its tokens, in nats) to aim for.
        horizon: Responses over which a full correction is spread; larger is slower.

    Raises:
        ValueError: An argument is not positive or not finite.
    """

    def __init__(self, coefficient: float = 0.2, target: float = 6.0, horizon: float = 10000.0) -> None:
        super().__init__(_check_number("coefficient", coefficient, positive=True))
        self.target = _check_number("target", target, positive=True)
        self.horizon = _check_number("horizon", horizon, positive=True)

    def problems(self, size: int) -> list[str]:
        """Refuse a horizon so short that one update could make the coefficient 0 or negative."""
        if size < 5 * self.horizon:
            return []
        return [f"kl.horizon {self.horizon:g} must be above a fifth of an iteration's {size} responses"]

    def update(self, kl: float, n: int) -> None:
        """Adapt to ``kl``, the mean KL of the last ``n`` responses.

        Raises:
            ValueError: ``kl`` is not finite, or ``n`` is negative or so large (5 horizons) that one update
                could make the coefficient 0 or negative.
        """
        if not math.isfinite(kl):
            raise ValueError(f"kl must be finite, got {kl}")
        if not 0 <= n < 5 * self.horizon:
            raise ValueError(f"n must lie in [0, 5 * horizon = {5 * self.horizon}), got {n}")
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self._value *= 1.0 + error * n / self.horizon
