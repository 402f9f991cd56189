"""Building a backbone from what its stages left: trunks, then adapters and heads."""

import copy

from transformers import PreTrainedModel

from lit_rlhf.backbone.adapter_tensors import Adapter
from lit_rlhf.backbone.backbone import Backbone
from lit_rlhf.backbone.roles import Layout
from lit_rlhf.backbone.spec import BackboneSpec
from lit_rlhf.backbone.stage_checkpoints import TrunkWeights
from lit_rlhf.backbone.stages import Stages, read_stages


def build_backbone(
    spec: BackboneSpec,
    layout: Layout,
    gradient_checkpointing: bool = False,
    temperature: float = 1.0,
    stages: Stages | None = None,
) -> Backbone:
    """Load trunks, adapters and heads as the spec says.

    The value head starts from the reward head (InstructGPT's practice), or at zero where there is none.

    Args:
        spec: Where the weights come from.
        layout: Which trunk, adapter and head each role uses.
        gradient_checkpointing: See :class:`Backbone`.
        temperature: See :class:`Backbone`.
        stages: What :func:`read_stages` returned for this spec and layout; None reads them now.

    Raises:
        ValueError, ImportError: See :func:`read_stages`; or ``lora.target_modules`` names no module of the model.
        OSError: The base model cannot be loaded.
    """
    stages = stages or read_stages(spec, layout)
    trunks, frozen = (_load_quantized if spec.quantization else _load_trunks)(stages)
    loaded = {} if stages.reward_adapter is None else dict.fromkeys(layout.loaded_adapters, stages.reward_adapter)
    backbone = Backbone(layout, trunks, spec.lora, loaded, gradient_checkpointing, temperature, frozen)
    if stages.reward_head is not None:
        for head in backbone.heads.values():
            head.load_state_dict(stages.reward_head)
    return backbone


def _load_trunks(stages: Stages) -> tuple[dict[str, PreTrainedModel], dict[str, Adapter]]:
    """Return the trunks by name, the adapters of earlier stages in their weights; equal ones are loaded once."""
    first: dict[TrunkWeights, PreTrainedModel] = {}
    models: dict[str, PreTrainedModel] = {}
    for name, weights in stages.trunks.items():
        if weights in first:
            models[name] = copy.deepcopy(first[weights])
        else:
            models[name] = first[weights] = weights.load(stages.spec.dtype).merged()
    return models, {}


def _load_quantized(stages: Stages) -> tuple[dict[str, PreTrainedModel], dict[str, Adapter]]:
    """Return the quantized trunks by name, and beside each the adapters of earlier stages, summed.

    bitsandbytes' weights are loaded anew for each trunk rather than copied.
    """
    models: dict[str, PreTrainedModel] = {}
    frozen: dict[str, Adapter] = {}
    for name, weights in stages.trunks.items():
        found = weights.load(stages.spec.dtype, stages.spec.quantization)
        models[name] = found.base
        if (summed := found.summed()) is not None:
            frozen[name] = summed
    return models, frozen
