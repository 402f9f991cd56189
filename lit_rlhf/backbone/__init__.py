"""Trunks, LoRA sets and heads, read by role."""

from lit_rlhf.backbone.adapters import AdapterSwitch, LoraArgs
from lit_rlhf.backbone.backbone import Backbone, build_backbone
from lit_rlhf.backbone.checks import check_length, check_model, context_length, vocabulary
from lit_rlhf.backbone.compilation import compile_layers
from lit_rlhf.backbone.loading import (
    DType,
    load_language_model,
    load_tokenizer,
    read_config,
    resolve_source,
    without_weights,
)
from lit_rlhf.backbone.lora_sets import LoraSet, RoleModel
from lit_rlhf.backbone.quantization import Quantization
from lit_rlhf.backbone.roles import LAYOUTS, Layout, Role, Trunk, find_layout, supervised_layout
from lit_rlhf.backbone.stages import (
    RECORD_KEY,
    BackboneSpec,
    StageCheckpoint,
    check_artefacts,
    fingerprint_parents,
    layout_names,
    make_record,
    read_spec,
)

__all__ = [
    "LAYOUTS",
    "RECORD_KEY",
    "AdapterSwitch",
    "Backbone",
    "BackboneSpec",
    "DType",
    "Layout",
    "LoraArgs",
    "LoraSet",
    "Quantization",
    "Role",
    "RoleModel",
    "StageCheckpoint",
    "Trunk",
    "build_backbone",
    "check_artefacts",
    "check_length",
    "check_model",
    "compile_layers",
    "context_length",
    "find_layout",
    "fingerprint_parents",
    "layout_names",
    "load_language_model",
    "load_tokenizer",
    "make_record",
    "read_config",
    "read_spec",
    "resolve_source",
    "supervised_layout",
    "vocabulary",
    "without_weights",
]
