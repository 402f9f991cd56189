"""The supervised stages: SFT, reward model and Hydra-SFT. Each has one trunk with one or two heads."""

from typing import Any, ClassVar

from lightning.pytorch import Callback
from torch import Tensor
from torchmetrics import Metric

from lit_rlhf.algorithms.base import BackboneModule
from lit_rlhf.algorithms.settings import out_of_range
from lit_rlhf.backbone import Layout, supervised_layout
from lit_rlhf.backbone.roles import HeadName
from lit_rlhf.callbacks import SaveAtEpochEnd
from lit_rlhf.data import InstructionData, PreferenceData
from lit_rlhf.data.base import TextData
from lit_rlhf.functional import cross_entropy, masked_mean, preference_loss
from lit_rlhf.metrics import PairwiseAccuracy, RewardMargin, TokenPerplexity
from lit_rlhf.strategies.ranks import trainer_of

Batch = dict[str, Tensor]


class SupervisedModule(BackboneModule):
    """Base of the supervised stages; a subclass names its heads and defines :meth:`losses`.

    Args:
        **kwargs: See :class:`BackboneModule`.
    """

    heads: ClassVar[dict[str, HeadName]] = {}
    data: ClassVar[type[TextData[Any]] | None] = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.metrics: dict[str, Metric] = self.make_metrics()
        for name, metric in self.metrics.items():
            # Registered one by one: Lightning moves and resets metrics that are attributes.
            self.add_module(f"metric_{name}", metric)

    def problems(self) -> list[str]:
        """Add data of another kind, whose batches mean something else."""
        found, trainer = super().problems(), trainer_of(self)
        data = getattr(trainer, "datamodule", None)
        if self.data is not None and isinstance(data, TextData) and not isinstance(data, self.data):
            found.append(
                f"{type(self).__name__} is trained on {self.data.__name__}, not on {type(data).__name__}; "
                f"set data to it (--data {self.data.__name__})"
            )
        return found

    def configure_callbacks(self) -> list[Callback]:
        """Allow checkpoints after any step."""
        return [SaveAtEpochEnd(), *super().configure_callbacks()]

    def make_layout(self) -> Layout:
        """Return one trunk that carries every head."""
        return supervised_layout(self.heads, lora=self.spec.lora is not None)

    def make_metrics(self) -> dict[str, Metric]:
        """Return the validation metrics by name."""
        raise NotImplementedError(f"{type(self).__name__} must define make_metrics")

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], dict[str, tuple[Tensor, ...]]]:
        """Return the loss, its named parts, and for each metric the arguments of its update."""
        raise NotImplementedError(f"{type(self).__name__} must define losses")

    def run_heads(self, batch: Batch, lm_mask: Tensor | None = None) -> dict[str, Tensor]:
        """Return every head's output, in one forward pass."""
        roles = tuple(self.heads)
        return self.backbone(roles, batch["tokens"], batch["attention_mask"], batch["mask"], lm_mask=lm_mask)

    def token_count(self, mask: Tensor) -> Tensor | None:
        """Return the divisor of a token loss in training: the ranks' mean count of tokens; None is the batch's own.

        Averaging the ranks' gradients then gives the mean over all their tokens, not the mean of their means. The
        batches of ``accumulate_grad_batches`` are averaged as they are, each a mean over its own tokens.

        Args:
            mask: ``[B, T]`` bool, this rank's tokens that count.
        """
        if self._trainer is None or not self.trainer.training or self.trainer.world_size == 1:
            return None
        return self.trainer.strategy.reduce(mask.sum().float(), reduce_op="mean").clamp_min(1.0)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        loss, parts, _ = self.losses(batch)
        values = {"loss": loss.detach(), **{name: part.detach() for name, part in parts.items()}}
        self.log_all("train", values, batch_size=len(batch["mask"]), sync_dist=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Update and log the held-out metrics."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Like validation, under ``test/``."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Batch, prefix: str) -> None:
        loss, _, updates = self.losses(batch)
        self.log(f"{prefix}/loss", loss, batch_size=len(batch["mask"]), sync_dist=True)
        for name, arguments in updates.items():
            self.metrics[name].update(*arguments)
            self.log(f"{prefix}/{name}", self.metrics[name], prog_bar=True)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, float]]:
        """Return each head's output for each sequence: a score, or the mean log-prob of a response token."""
        columns = {
            role: value if value.dim() == 1 else masked_mean(value, batch["mask"], dim=1)
            for role, value in self.run_heads(batch).items()
        }
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in rows]


class SFT(SupervisedModule):
    """Supervised fine-tuning: cross-entropy over response tokens, prompt tokens masked.

    Args:
        **kwargs: See :class:`BackboneModule`.
    """

    heads: ClassVar[dict[str, HeadName]] = {"actor": "lm"}
    data = InstructionData

    def make_metrics(self) -> dict[str, Metric]:
        """Return perplexity."""
        return {"perplexity": TokenPerplexity()}

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], dict[str, tuple[Tensor, ...]]]:
        """Return the cross-entropy of an instruction batch."""
        log_probs = self.run_heads(batch)["actor"]
        loss = cross_entropy(log_probs, batch["mask"], count=self.token_count(batch["mask"]))
        return loss, {}, {"perplexity": (log_probs, batch["mask"])}


class RewardModel(SupervisedModule):
    """A reward model on preference pairs: ``-log sigmoid(r(x, y_w) - r(x, y_l))``.

    With ``lora`` it is PE-RLHF's (Sidahmed et al. 2024, arXiv:2403.10704): the trunk stays frozen. Without, the
    whole trunk is trained.

    Args:
        **kwargs: See :class:`BackboneModule`.
    """

    heads: ClassVar[dict[str, HeadName]] = {"reward": "reward"}
    data = PreferenceData

    def make_metrics(self) -> dict[str, Metric]:
        """Return pairwise accuracy and margin."""
        return {"accuracy": PairwiseAccuracy(), "margin": RewardMargin()}

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], dict[str, tuple[Tensor, ...]]]:
        """Return the preference loss of a batch whose first half is chosen, second half rejected."""
        chosen, rejected = self.run_heads(batch)["reward"].chunk(2)
        pair = (chosen.detach(), rejected.detach())
        return preference_loss(chosen, rejected), {}, {"accuracy": pair, "margin": pair}


class HydraSFT(SupervisedModule):
    """One decoder, two heads: language model and reward model trained together.

    Paper    Santacroce et al. 2023, arXiv:2309.00754, section on Hydra-SFT
    Loss     ``L_xent(y_w | x) + gamma * L_pref``; one pass over chosen and rejected responses serves both heads; no
             logits are computed for the rejected ones.

    Args:
        gamma: Weight of the preference loss.
        **kwargs: See :class:`BackboneModule`.
    """

    heads: ClassVar[dict[str, HeadName]] = {"actor": "lm", "reward": "reward"}
    data = PreferenceData

    def __init__(self, gamma: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.gamma = gamma

    def problems(self) -> list[str]:
        """Add the weight of the preference loss."""
        return super().problems() + out_of_range(self, not_negative=("gamma",))

    def make_metrics(self) -> dict[str, Metric]:
        """Return perplexity of the chosen responses, pairwise accuracy and margin."""
        return {"perplexity": TokenPerplexity(), "accuracy": PairwiseAccuracy(), "margin": RewardMargin()}

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], dict[str, tuple[Tensor, ...]]]:
        """Return the joint loss of a batch whose first half is chosen, second half rejected."""
        pairs = len(batch["mask"]) // 2
        lm_mask = batch["mask"].clone()
        lm_mask[pairs:] = False
        outputs = self.run_heads(batch, lm_mask)
        chosen, rejected = outputs["reward"].chunk(2)
        language = cross_entropy(outputs["actor"], lm_mask, count=self.token_count(lm_mask))
        preference = preference_loss(chosen, rejected)
        pair = (chosen.detach(), rejected.detach())
        return (
            language + self.gamma * preference,
            {"cross_entropy": language, "preference": preference},
            {"perplexity": (outputs["actor"].detach(), lm_mask), "accuracy": pair, "margin": pair},
        )
