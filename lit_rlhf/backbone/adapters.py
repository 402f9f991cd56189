"""LoRA sets on a trunk, and switching between them.

PEFT's own ``set_adapter`` and ``disable_adapter`` rewrite ``requires_grad`` and cost milliseconds a call.
The switch here writes the two attributes that a LoRA layer reads in its forward pass, and nothing else.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


@dataclass
class LoraArgs:
    """The LoRA sets that are trained. Dropout is always 0: RL needs ratio 1 at the first step.

    Args:
        r: Rank.
        alpha: Scaling numerator; the update is multiplied by ``alpha / r`` (``alpha / sqrt(r)`` with rsLoRA).
        target_modules: ``all-linear`` (every linear layer but the output embedding), a list of module names,
            or a regular expression.
        use_rslora: Rank-stabilised scaling.
    """

    r: int = 16
    alpha: float = 32.0
    target_modules: str | list[str] = field(default="all-linear")
    use_rslora: bool = False

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"lora.r must be at least 1, got {self.r}")
        if self.alpha <= 0:
            raise ValueError(f"lora.alpha must be positive, got {self.alpha}")
        if not self.target_modules:
            raise ValueError("lora.target_modules is empty: name at least one module, or 'all-linear'")

    def to_peft(self) -> LoraConfig:
        """Return the PEFT configuration of one set."""
        targets = self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)
        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            target_modules=targets,
            use_rslora=self.use_rslora,
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
        )


# One (active set, off?) pair a LoRA layer.
State = list[tuple[str | list[str], bool]]


class AdapterSwitch:
    """Selects the LoRA set that a trunk's forward pass reads.

    Args:
        trunk: A model with PEFT layers, or a plain one (then only "LoRA off" exists).
    """

    def __init__(self, trunk: nn.Module) -> None:
        self._layers = [m for m in trunk.modules() if isinstance(m, BaseTunerLayer)]

    def use(self, adapter: str | None) -> AbstractContextManager[None]:
        """Read this LoRA set (None: off) inside the block; the former state comes back, even on errors."""
        off = adapter is None
        state = [(layer._active_adapter if adapter is None else [adapter], off) for layer in self._layers]
        return _Selected(self, state)

    def checkpoint_context(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return the (forward, recompute) contexts for ``torch.utils.checkpoint``'s ``context_fn``.

        Recomputation happens during backward, when another set may be on; without this the gradients of
        every set but the last one used are silently wrong.
        """
        return nullcontext(), _Selected(self, self._state())

    def _state(self) -> State:
        return [(layer._active_adapter, layer._disable_adapters) for layer in self._layers]

    def _write(self, state: State) -> None:
        for layer, (active, disabled) in zip(self._layers, state, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


class _Selected(AbstractContextManager[None]):
    """A state of the switch, on inside the block; may be entered again, as a graph walked twice does."""

    def __init__(self, switch: AdapterSwitch, state: State) -> None:
        self._switch, self._state = switch, state

    def __enter__(self) -> None:
        self._before = self._switch._state()
        self._switch._write(self._state)

    def __exit__(self, *_: object) -> None:
        self._switch._write(self._before)
