"""DPO: preferences without a reward model or rollouts, the offline baseline."""

from typing import Any, ClassVar

from torch import Tensor
from torchmetrics import Metric

from lit_rlhf.algorithms.settings import out_of_range
from lit_rlhf.algorithms.supervised import Batch, SupervisedModule
from lit_rlhf.backbone import Layout, LoraArgs, find_layout
from lit_rlhf.backbone.roles import HeadName
from lit_rlhf.data import PreferenceData
from lit_rlhf.functional import dpo_loss, masked_sum
from lit_rlhf.metrics import PairwiseAccuracy, RewardMargin


class DPO(SupervisedModule):
    """Direct preference optimization. The reference is the layout's; with LoRA, the trunk with its adapter off.

    Paper    Rafailov et al. 2023, arXiv:2305.18290, Eq. 7

    Args:
        layout: Which trunk and adapter actor and reference use; see :class:`OnPolicyModule`.
        lora: The trained adapter; None is ``LoraArgs()``. Not used by layouts that train whole trunks (``full``).
        beta: Strength of the pull toward the reference.
        label_smoothing: Assumed share of pairs whose labels are swapped, in [0, 0.5).
        **kwargs: See :class:`BackboneModule`.
    """

    heads: ClassVar[dict[str, HeadName]] = {"actor": "lm", "reference": "lm"}
    data = PreferenceData

    def __init__(
        self,
        layout: str = "hydra",
        lora: LoraArgs | None = None,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        **kwargs: Any,
    ) -> None:
        named = find_layout(layout)
        super().__init__(lora=(lora or LoraArgs()) if named.trains_lora else None, **kwargs)
        self.layout = named
        self.beta = beta
        self.label_smoothing = label_smoothing

    def problems(self) -> list[str]:
        """Add DPO's own settings."""
        found = super().problems() + out_of_range(self, positive=("beta",))
        if not 0 <= self.label_smoothing < 0.5:
            found.append(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
        return found

    def make_layout(self) -> Layout:
        """Return the named layout's actor and reference."""
        return self.layout.restricted_to(tuple(self.heads))

    def make_metrics(self) -> dict[str, Metric]:
        """Return accuracy and margin of the implicit rewards."""
        return {"accuracy": PairwiseAccuracy(), "margin": RewardMargin()}

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], dict[str, tuple[Tensor, ...]]]:
        """Return the loss of a batch whose first half is chosen, second half rejected."""
        outputs = self.run_heads(batch)
        log_ratio = masked_sum(outputs["actor"] - outputs["reference"], batch["mask"], dim=1)
        chosen, rejected = log_ratio.chunk(2)
        loss = dpo_loss(chosen, rejected, self.beta, self.label_smoothing)
        rewards = (self.beta * log_ratio.detach()).chunk(2)
        parts = {"chosen_reward": rewards[0].mean(), "rejected_reward": rewards[1].mean()}
        return loss, parts, {"accuracy": rewards, "margin": rewards}
