"""What a run starts from, read once and refused where it cannot be built, before any model loads."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lit_rlhf.backbone.adapter_tensors import Adapter
from lit_rlhf.backbone.quantization import check_quantization
from lit_rlhf.backbone.roles import Layout
from lit_rlhf.backbone.spec import BackboneSpec, absolute
from lit_rlhf.backbone.stage_checkpoints import StageCheckpoint, StageReader, TrunkWeights
from lit_rlhf.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Stages:
    """Everything that a backbone starts from; tensors are mapped from their files, nothing of the models is loaded.

    Args:
        spec: Where the weights come from.
        layout: The run's layout.
        parents: The checkpoints that the run starts from, by the paths of ``spec``.
        trunks: Trunk name to the weights it starts from.
        reward_adapter: The reward model's adapter, where the layout uses it beside its own.
        reward_head: Tensors of the trained reward head that scalar heads start from; None starts them at zero.
    """

    spec: BackboneSpec
    layout: Layout
    parents: dict[str, StageCheckpoint]
    trunks: dict[str, TrunkWeights]
    reward_adapter: Adapter | None
    reward_head: dict[str, Tensor] | None

    def fingerprints(self) -> dict[str, str]:
        """Return what the parents hold, by absolute path, for the run's own record."""
        return {str(Path(path).resolve()): stage.fingerprint for path, stage in sorted(self.parents.items())}


def read_stages(spec: BackboneSpec, layout: Layout) -> Stages:
    """Read the chain of checkpoints that a run starts from, each file once, as far as the layout needs it.

    Raises:
        CheckpointError: A checkpoint is missing or damaged.
        ValueError: A role needs an artifact that the checkpoints do not hold, ``lora.ranks`` names an adapter that is
            not trained, the layout cannot be quantized, or a checkpoint of the chain was replaced.
        ImportError: Quantization needs bitsandbytes.
    """
    if spec.lora is not None:
        spec.lora.check_adapters(layout.trained_adapters)
    check_quantization(spec.quantization, layout, spec.lora)
    reader = StageReader()
    parents = {path: reader.read(path) for path in spec.checkpoints}
    for stage in parents.values():
        stage.check_base(spec)
    if spec.policy_checkpoint and "actor" not in parents[spec.policy_checkpoint].layout.roles:
        raise ConfigError(f"policy_checkpoint {spec.policy_checkpoint} holds no policy (no actor role)")
    path = spec.checkpoint_of("reward")
    has_scalar_heads = any(role.head != "lm" for role in layout.roles.values())
    head = parents[path].head_state("reward") if path and has_scalar_heads else None
    if "reward" in layout.roles and "reward" not in layout.trained_heads:
        _check_reward_head(spec, layout, parents[path] if path and head is not None else None)
    adapter = _reward_adapter(spec, parents) if layout.loaded_adapters else None
    trunks = {name: reader.weights(spec, trunk.artifact) for name, trunk in layout.trunks.items()}
    return Stages(spec, layout, parents, trunks, adapter, head)


def _reward_adapter(spec: BackboneSpec, parents: dict[str, StageCheckpoint]) -> Adapter:
    """Return the reward model's adapter; it is valid only on the weights it was trained on."""
    stage = parents.get(spec.reward_checkpoint or "")
    adapter = None if stage is None else stage.adapter("reward")
    if stage is None or adapter is None:
        raise ConfigError(
            "this layout (of the table: pe) uses the reward model as an adapter: give reward_checkpoint a "
            "RewardModel that was trained with lora on the same policy_checkpoint, as in experiments/pe_rlhf"
        )
    theirs, ours = stage.spec.policy_checkpoint, spec.policy_checkpoint
    if theirs != absolute(ours):
        raise ConfigError(f"reward_checkpoint was trained on policy checkpoint {theirs}, not on {ours}")
    return adapter


def _check_reward_head(spec: BackboneSpec, layout: Layout, stage: StageCheckpoint | None) -> None:
    """Refuse a layout without a reward head, or with one on a trunk that the head was not trained on.

    On another trunk its scores would look right but be meaningless.

    Args:
        spec: Where weights start.
        layout: A layout whose reward role uses a head that is not trained here.
        stage: The checkpoint that the reward head comes from, None where there is none.
    """
    where = layout.roles["reward"]
    on_policy_trunk = where.adapter is None and layout.trunks[where.trunk].artifact == "policy"
    if stage is None:
        raise ConfigError(
            "the reward role needs a trained reward head: give policy_checkpoint a Hydra-SFT checkpoint"
            + (", " if on_policy_trunk else ", or reward_checkpoint a reward-model checkpoint, ")
            + "or set `reward` to a reward function instead"
        )
    roles = stage.layout.roles
    fits = "reward" in roles
    if fits and on_policy_trunk:
        # The role uses what the policy starts from, so one stage must have trained both in one pass.
        passes = {(role.trunk, role.adapter) for name, role in roles.items() if name in ("actor", "reward")}
        paths = {absolute(path) for path in (spec.policy_checkpoint, spec.checkpoint_of("reward")) if path}
        fits = spec.policy_checkpoint is not None and len(paths) == 1 and "actor" in roles and len(passes) == 1
    if not fits:
        raise ConfigError(
            f"the reward head of {stage.path} was trained on another trunk than the one this layout "
            "uses: give policy_checkpoint the Hydra-SFT checkpoint that holds both and leave reward_checkpoint "
            "out, or choose a layout with a reward trunk (full, lora, dynamic_lora)"
        )
