"""One forward pass with its graph, kept for reuse."""

from dataclasses import dataclass
from typing import TypedDict

from torch import Tensor


class PassOptions(TypedDict, total=False):
    """What a forward pass may be asked for; see :meth:`lit_rlhf.backbone.Backbone.forward`."""

    entropy: bool
    value_gradient: float


@dataclass(frozen=True, eq=False)
class PassKey:
    """What decides the outputs of a forward pass.

    Args:
        roles: Roles.
        inputs: Tokens, attention mask and response mask, compared as objects.
        options: Keyword arguments.
        versions: How often each trained parameter has been changed in place.
    """

    roles: tuple[str, ...]
    inputs: tuple[Tensor, ...]
    options: PassOptions
    versions: tuple[int, ...]

    def matches(self, other: "PassKey") -> bool:
        """Return whether both passes have the same outputs, as far as objects show it."""
        same = all(a is b for a, b in zip(self.inputs, other.inputs, strict=True))
        return same and (self.roles, self.options, self.versions) == (other.roles, other.options, other.versions)


class RecordedPass:
    """Keeps roles' outputs for one batch, with the graph, and returns them once, for that very batch."""

    def __init__(self) -> None:
        self._kept: tuple[PassKey, dict[str, Tensor]] | None = None

    def __bool__(self) -> bool:
        return self._kept is not None

    def keep(self, key: PassKey, outputs: dict[str, Tensor]) -> None:
        """Keep the outputs of a pass."""
        self._kept = (key, outputs)

    def take(self, key: PassKey) -> dict[str, Tensor] | None:
        """Return the outputs if they are of this very pass; else None.

        Either way they are no longer kept: after the next update they would be out of date.
        """
        kept, self._kept = self._kept, None
        return kept[1] if kept is not None and kept[0].matches(key) else None

    def drop(self) -> None:
        """Free the graph."""
        self._kept = None
