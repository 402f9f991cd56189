"""Adapters (named LoRA weights) on a trunk, and switching between them.

PEFT's own ``set_adapter`` and ``disable_adapter`` rewrite ``requires_grad`` and cost milliseconds per call.
The switch here writes the two attributes that a LoRA layer reads in its forward pass, and nothing else.
"""

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lit_rlhf.errors import ConfigError


@dataclass
class LoraArgs:
    """Settings of the adapters that are trained. Dropout is always 0: RL needs ratio 1 at the first step.

    Args:
        r: Rank.
        alpha: Scaling numerator; the update is multiplied by ``alpha / r`` (``alpha / sqrt(r)`` with rsLoRA).
        target_modules: ``all-linear`` (every linear layer but the output embedding), a list of module names,
            or a regular expression over whole module paths.
        use_rslora: Rank-stabilized scaling.
        use_dora: DoRA: direction and magnitude of each weight's rows are trained separately. Slower, since every pass
            computes the norms of the adapted weights.
        ranks: Other ranks for some adapters, such as ``{"critic": 4}``. Their alpha is ``alpha * rank / r``, so that
            ``alpha / r`` is the same for all; with rsLoRA their update is then multiplied by
            ``(alpha / r) * sqrt(rank)``.

    Raises:
        ValueError: A value is out of range.
    """

    r: int = 16
    alpha: float = 32.0
    target_modules: str | list[str] = field(default="all-linear")
    use_rslora: bool = False
    use_dora: bool = False
    ranks: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(f"lora.r must be at least 1, got {self.r}")
        if self.alpha <= 0:
            raise ConfigError(f"lora.alpha must be positive, got {self.alpha}")
        if not self.target_modules:
            raise ConfigError("lora.target_modules is empty: name at least one module, or 'all-linear'")
        for name, rank in self.ranks.items():
            if rank < 1:
                raise ConfigError(f"lora.ranks: the rank of {name!r} must be at least 1, got {rank}")

    def for_adapter(self, name: str) -> "LoraArgs":
        """Return the settings of one adapter: its own rank, and empty ``ranks``."""
        rank = self.ranks.get(name, self.r)
        return replace(self, r=rank, alpha=self.alpha * rank / self.r, ranks={})

    def check_adapters(self, trained: Collection[str]) -> None:
        """Raise ValueError where ``ranks`` names an adapter that is not among the trained ones."""
        if unknown := sorted(set(self.ranks) - set(trained)):
            raise ConfigError(
                f"lora.ranks names {', '.join(map(repr, unknown))}, but the adapters trained here are "
                f"{', '.join(map(repr, sorted(trained))) or 'none'}"
            )

    @property
    def scaling(self) -> float:
        """The factor on ``B @ A``."""
        return self.alpha / (self.r**0.5 if self.use_rslora else self.r)

    def to_peft(self) -> LoraConfig:
        """Return the PEFT configuration of one adapter; see :meth:`for_adapter`."""
        targets = self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)
        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            target_modules=targets,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
        )


# One (active adapters, off?) pair for each LoRA layer.
State = list[tuple[str | list[str], bool]]


class AdapterSwitch:
    """Selects the adapter that a trunk's forward pass uses.

    Args:
        trunk: A model with PEFT layers, or a plain one (then only "off" exists).
        always: Frozen adapters that belong to what "off" means: every forward pass adds them.
    """

    def __init__(self, trunk: nn.Module, always: Sequence[str] = ()) -> None:
        self._always = list(always)
        self._layers = [m for m in trunk.modules() if isinstance(m, BaseTunerLayer)]

    def use(self, adapter: str | None) -> AbstractContextManager[None]:
        """Use this adapter (None: off) inside the block; the previous state is restored, even on errors."""
        active = self._always + ([] if adapter is None else [adapter])
        state: State = [(active or layer._active_adapter, not active) for layer in self._layers]
        return _Selected(self, state)

    def checkpoint_context(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return the (forward, recompute) contexts for ``torch.utils.checkpoint``'s ``context_fn``.

        Recomputation happens during backward, when another adapter may be active; without this the gradients of
        every adapter but the last one used are silently wrong.
        """
        return nullcontext(), _Selected(self, self._state())

    def _state(self) -> State:
        return [(layer._active_adapter, layer._disable_adapters) for layer in self._layers]

    def _write(self, state: State) -> None:
        for layer, (active, disabled) in zip(self._layers, state, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


class _Selected(AbstractContextManager[None]):
    """A state of the switch, active inside the block; may be entered again, as when one graph runs backward twice."""

    def __init__(self, switch: AdapterSwitch, state: State) -> None:
        self._switch, self._state = switch, state

    def __enter__(self) -> None:
        self._before = self._switch._state()
        self._switch._write(self._state)

    def __exit__(self, *_: object) -> None:
        self._switch._write(self._before)
