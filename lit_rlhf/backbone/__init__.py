"""Trunks, adapters and heads behind role names."""

from lit_rlhf.backbone.adapter_tensors import Adapter, LoraSet, RoleModel
from lit_rlhf.backbone.adapters import AdapterSwitch, LoraArgs
from lit_rlhf.backbone.backbone import Backbone
from lit_rlhf.backbone.build import build_backbone
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
from lit_rlhf.backbone.quantization import Quantization
from lit_rlhf.backbone.reuse import PassOptions
from lit_rlhf.backbone.roles import LAYOUTS, Layout, Role, Trunk, find_layout, supervised_layout
from lit_rlhf.backbone.spec import (
    BackboneSpec,
    complete_spec,
    describe_part,
    layout_names,
    make_record,
    read_spec,
)
from lit_rlhf.backbone.stage_checkpoints import StageCheckpoint, fingerprint_parents
from lit_rlhf.backbone.stages import Stages, read_stages
from lit_rlhf.checkpoints.records import RECORD_KEY

__all__ = [
    "LAYOUTS",
    "RECORD_KEY",
    "Adapter",
    "AdapterSwitch",
    "Backbone",
    "BackboneSpec",
    "DType",
    "Layout",
    "LoraArgs",
    "LoraSet",
    "PassOptions",
    "Quantization",
    "Role",
    "RoleModel",
    "StageCheckpoint",
    "Stages",
    "Trunk",
    "build_backbone",
    "check_length",
    "check_model",
    "compile_layers",
    "complete_spec",
    "context_length",
    "describe_part",
    "find_layout",
    "fingerprint_parents",
    "layout_names",
    "load_language_model",
    "load_tokenizer",
    "make_record",
    "read_config",
    "read_spec",
    "read_stages",
    "resolve_source",
    "supervised_layout",
    "vocabulary",
    "without_weights",
]
