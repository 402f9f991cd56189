"""Adapters as tensors: attached to a model, summed into one, merged into its weights."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_rlhf.backbone.adapters import LoraArgs
from lit_rlhf.backbone.lora_linear import use_fused_layers
from lit_rlhf.errors import ConfigError


@dataclass
class Adapter:
    """One adapter outside a model.

    Args:
        args: Its configuration.
        tensors: PEFT's names without the adapter's name (``base_model.model.….lora_A.weight``) to tensors.
    """

    args: LoraArgs
    tensors: dict[str, Tensor]

    @property
    def scaling(self) -> float:
        """The factor on ``B @ A``."""
        return self.args.scaling


# The old name, for code written against earlier versions.
LoraSet = Adapter


@dataclass
class RoleModel:
    """A base model and the adapters stacked on it, in the order they were trained."""

    base: PreTrainedModel
    adapters: list[Adapter]

    def merged(self) -> PreTrainedModel:
        """Fold the adapters into the base weights, once, and return it."""
        for adapter in self.adapters:
            attached = attach_lora(self.base, adapter.args.to_peft(), adapter.tensors)
            self.base = attached.merge_and_unload()
        self.adapters = []
        return self.base

    def summed(self) -> Adapter | None:
        """Return the stacked adapters as one; None where there are none.

        Raises:
            ValueError: There are several, and one of them is DoRA.
        """
        return concatenate(self.adapters) if len(self.adapters) > 1 else next(iter(self.adapters), None)

    def as_peft(self) -> PeftModel:
        """Return one PEFT model with one adapter, the exact sum of the stacked ones, active as ``default``.

        Raises:
            ValueError: There is no adapter (the role's trunk was trained in full), or the adapters have no sum.
        """
        summed = self.summed()
        if summed is None:
            raise ConfigError("this role has no adapter; export it with format 'merged'")
        return attach_lora(self.base, summed.args.to_peft(), summed.tensors)

    def for_inference(self) -> PreTrainedModel:
        """Return a model in eval mode: LoRA layers inside where the adapters have a sum, else merged."""
        if not self.adapters or (len(self.adapters) > 1 and any(a.args.use_dora for a in self.adapters)):
            return self.merged()
        model = self.as_peft().eval().get_base_model()
        use_fused_layers(model)
        return model  # type: ignore[return-value]


def attach_lora(model: PreTrainedModel, config: LoraConfig, tensors: dict[str, Tensor]) -> PeftModel:
    """Wrap a model with one adapter named ``default`` and load its tensors.

    Raises:
        ValueError: The tensors do not fit the model.
    """
    attached = get_peft_model(model, config)
    assert isinstance(attached, PeftModel)
    result: Any = set_peft_model_state_dict(attached, tensors)
    missing = [key for key in result.missing_keys if "lora_" in key]
    if result.unexpected_keys or missing:
        raise ConfigError(f"adapter does not fit the model: {[*result.unexpected_keys, *missing][:3]} ...")
    return attached


def concatenate(adapters: list[Adapter]) -> Adapter:
    """Return one adapter of the summed rank whose ``B @ A`` is the sum of the scaled updates of all.

    Adapters of different modules are padded with zeros.

    Raises:
        ValueError: One of several adapters is DoRA, which rescales the result of the earlier ones.
    """
    if any(adapter.args.use_dora for adapter in adapters):
        raise ConfigError(
            "DoRA adapters of several stages have no sum, so no single PEFT adapter equals them; export with "
            "`--format merged`, and give the merged folder as `model` where a stage is to start from it"
        )
    suffix = ".lora_A.weight"
    modules = sorted({n.removesuffix(suffix) for a in adapters for n in a.tensors if n.endswith(suffix)})
    tensors: dict[str, Tensor] = {}
    for module in modules:
        name_a, name_b = f"{module}{suffix}", f"{module}.lora_B.weight"
        owner = next(adapter for adapter in adapters if name_a in adapter.tensors)
        columns, rows = owner.tensors[name_a].shape[1], owner.tensors[name_b].shape[0]
        a_parts, b_parts = [], []
        for adapter in adapters:
            if name_a in adapter.tensors:
                a_parts.append(adapter.tensors[name_a].float())
                b_parts.append(adapter.tensors[name_b].float() * adapter.scaling)
            else:
                a_parts.append(torch.zeros(adapter.args.r, columns))
                b_parts.append(torch.zeros(rows, adapter.args.r))
        tensors[name_a], tensors[name_b] = torch.cat(a_parts), torch.cat(b_parts, dim=1)
    rank = sum(adapter.args.r for adapter in adapters)
    targets = [module.removeprefix("base_model.model.") for module in modules]
    return Adapter(LoraArgs(r=rank, alpha=float(rank), target_modules=targets), tensors)


def adapter_of(parameter: str) -> str | None:
    """Return the adapter of a parameter, from its name (``….lora_A.actor.weight``); None for other parameters."""
    *_, kind, name, _ = ["", "", *parameter.split(".")]
    return name if kind.startswith("lora_") else None


def attach_adapters(model: PreTrainedModel, adapters: Mapping[str, LoraArgs | Adapter]) -> PeftModel:
    """Wrap a model with named adapters.

    Args:
        model: Changed in place: LoRA layers take the place of linear ones.
        adapters: Name to the settings of an adapter that starts at zero, or to an adapter whose tensors are loaded.

    Raises:
        ValueError: The settings name modules that the model does not have, or tensors do not fit it.
    """
    fresh = {name: entry for name, entry in adapters.items() if isinstance(entry, LoraArgs)}
    for args in fresh.values():
        check_targets(model, args)
    configs = {n: (entry if isinstance(entry, LoraArgs) else entry.args).to_peft() for n, entry in adapters.items()}
    first, *others = configs
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # The initial A is the same wherever the backbone is built (Lightning builds on the GPU). Only the
        # CPU's generator is seeded, since only its state is put back.
        torch.default_generator.manual_seed(0)
        wrapped = get_peft_model(model, configs[first], adapter_name=first)
        for name in others:
            wrapped.add_adapter(name, configs[name])
    assert isinstance(wrapped, PeftModel)
    _refuse_embeddings(wrapped)
    for name, entry in adapters.items():
        if isinstance(entry, Adapter):
            renamed = {k.removesuffix(".weight") + f".{name}.weight": v for k, v in entry.tensors.items()}
            unexpected = wrapped.load_state_dict(renamed, strict=False).unexpected_keys
            if unexpected:
                raise ConfigError(f"adapter {name!r} does not fit its trunk: {unexpected[:3]} ...")
    _start_magnitudes(wrapped, [name for name, args in fresh.items() if args.use_dora])
    use_fused_layers(wrapped)
    return wrapped


def check_targets(model: PreTrainedModel, args: LoraArgs) -> None:
    """Refuse targets that match nothing (PEFT would silently train the rest), or that cannot carry LoRA.

    Args:
        model: Plain; its weights may be on the meta device.
        args: The settings.

    Raises:
        ValueError: A target is not a regular expression, matches no module, or matches one that is not a linear layer.
    """
    targets = args.target_modules
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return
    modules = {name: module for name, module in model.named_modules() if name}
    matched: dict[str, list[str]]
    if isinstance(targets, str):
        try:
            matched = {targets: [name for name in modules if re.fullmatch(targets, name)]}
        except re.error as error:
            raise ConfigError(f"lora.target_modules {targets!r} is not a regular expression: {error}") from error
        kind = "no module path matches the regular expression (a list names modules)"
    else:
        matched = {t: [name for name in modules if name == t or name.endswith(f".{t}")] for t in targets}
        kind = "no module is named"
    head = model.get_output_embeddings()
    linear = {name for name, module in modules.items() if module is not head and _is_linear(module)}
    there = f"linear layers of {type(model).__name__}: {', '.join(sorted({n.rpartition('.')[2] for n in linear}))}"
    if missing := [target for target, names in matched.items() if not names]:
        raise ConfigError(f"lora.target_modules: {kind} {', '.join(map(repr, missing))}; {there}")
    for name in (name for names in matched.values() for name in names if name not in linear):
        module = modules[name]
        if module is head or isinstance(module, nn.Embedding):
            raise ConfigError(f"lora.target_modules adapts {name}; input and output embeddings cannot carry LoRA here")
        raise ConfigError(
            f"lora.target_modules adapts {name}, a {type(module).__name__}, which cannot carry LoRA; {there}"
        )


def _is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer of any kind: torch's, transformers' Conv1D, or a quantized one."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(module, nn.Embedding)


def _refuse_embeddings(wrapped: PeftModel) -> None:
    """Refuse LoRA on embeddings: log-probs use the plain output embedding, checkpoints support linear layers only."""
    head = wrapped.get_base_model().get_output_embeddings()  # type: ignore[operator]
    for name, module in wrapped.get_base_model().named_modules():
        if isinstance(module, BaseTunerLayer) and (module is head or isinstance(module.get_base_layer(), nn.Embedding)):
            raise ConfigError(f"lora.target_modules adapts {name}; input and output embeddings cannot carry LoRA here")


def _start_magnitudes(wrapped: PeftModel, names: list[str]) -> None:
    """Compute DoRA's starting magnitudes in float32.

    Rounded to a 16-bit trunk's dtype they would change what the trunk computes, before anything is trained.

    Args:
        wrapped: A model with LoRA layers.
        names: Its DoRA adapters that start at zero.
    """
    for layer in wrapped.modules():
        if not isinstance(layer, LoraLayer):
            continue
        for name in names:
            if name in layer.lora_magnitude_vector:
                magnitudes: Any = layer.lora_magnitude_vector[name]
                magnitudes.update_layer(
                    base_layer=layer.get_base_layer(),
                    lora_A=layer.lora_A[name].weight,
                    lora_B=layer.lora_B[name].weight,
                    scaling=layer.scaling[name],
                )
