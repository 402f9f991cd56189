"""A pass with its graph, carried from scoring into the loss."""

from torch import Tensor

from lit_rlhf.rollout import Experience


class CarriedPass:
    """Holds one reading of a whole rollout until the loss asks for it; hands it out once, and to no other batch."""

    def __init__(self) -> None:
        self._held: tuple[tuple[str, ...], Tensor, dict[str, Tensor]] | None = None

    def put(self, roles: tuple[str, ...], experience: Experience, read: dict[str, Tensor]) -> None:
        """Keep what these roles read; the tokens are kept too, so that their memory is nobody else's meanwhile."""
        self._held = (roles, experience.tokens, read)

    def take(self, roles: tuple[str, ...], minibatch: Experience) -> dict[str, Tensor] | None:
        """Return what these roles read of this very batch, once; None for any other."""
        held, self._held = self._held, None
        if held is None or held[0] != roles:
            return None
        same = held[1].data_ptr() == minibatch.tokens.data_ptr() and held[1].shape == minibatch.tokens.shape
        return held[2] if same else None

    def drop(self) -> None:
        """Let go of the graph."""
        self._held = None
