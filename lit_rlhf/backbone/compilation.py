"""``torch.compile`` for the forward passes over whole sequences."""

from transformers.modeling_layers import GradientCheckpointingLayer

from lit_rlhf.backbone.backbone import Backbone


def compile_layers(backbone: Backbone) -> None:
    """Compile every decoder layer, in place, for the passes of scoring and training; decoding stays as it is.

    Layers are alike, so that one of them is compiled for all: once for each adapter that is used, with and without
    gradients, for sequences of any length.
    """
    for layer in backbone.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.compile(dynamic=True)
    backbone.compiled = True
