"""One forward pass with its graph, kept for reuse."""

from collections.abc import Sequence
from typing import TypedDict

from torch import Tensor


class PassOptions(TypedDict, total=False):
    """What a forward pass may be asked for; see :meth:`lit_rlhf.backbone.Backbone.forward`."""

    entropy: bool
    value_gradient: float


class RecordedPass:
    """Keeps roles' outputs for one batch, with the graph, and returns them once, for that very batch."""

    def __init__(self) -> None:
        self._kept: tuple[tuple[str, ...], Tensor, PassOptions, dict[str, Tensor]] | None = None

    def __bool__(self) -> bool:
        return self._kept is not None

    def keep(self, roles: Sequence[str], tokens: Tensor, options: PassOptions, outputs: dict[str, Tensor]) -> None:
        """Keep the outputs of a pass."""
        self._kept = (tuple(roles), tokens, options, outputs)

    def take(self, roles: Sequence[str], tokens: Tensor, options: PassOptions) -> dict[str, Tensor] | None:
        """Return the outputs if they are of these roles, this very tensor and these options; else None.

        Either way they are no longer kept: after the next update they would be out of date.
        """
        kept, self._kept = self._kept, None
        if kept is None or kept[0] != tuple(roles) or kept[1] is not tokens or kept[2] != options:
            return None
        return kept[3]

    def drop(self) -> None:
        """Free the graph."""
        self._kept = None
