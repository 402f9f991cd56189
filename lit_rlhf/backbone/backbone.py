"""The backbone: trunks, adapters and heads behind role names."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lit_rlhf.backbone.adapter_tensors import Adapter, adapter_of, attach_adapters
from lit_rlhf.backbone.adapters import AdapterSwitch, LoraArgs
from lit_rlhf.backbone.language_head import LogitTransform, masked_log_probs, read_logit_transform
from lit_rlhf.backbone.reuse import PassKey, PassOptions, RecordedPass
from lit_rlhf.backbone.roles import START_ADAPTER, HeadName, Layout, Role
from lit_rlhf.errors import ConfigError
from lit_rlhf.functional import gather_last, position_ids, scale_gradient


class Backbone(nn.Module):
    """Trunks, adapters and heads of a layout, used by role.

    The module stays in eval mode for good: dropout would break "ratio 1 at the first minibatch". Gradient
    checkpointing, which transformers ties to train mode, is switched on for the trunk pass alone.

    Args:
        layout: Which trunk, adapter and head each role uses.
        trunks: Trunk name to language model; changed in place (LoRA layers are injected).
        lora: Configuration of the trained adapters.
        loaded: Frozen adapters, by name.
        gradient_checkpointing: Recompute the layers' activations in backward.
        temperature: Divides the logits; the sampling temperature, so that log-probs are the sampled policy's.
        start: Trunk name to a frozen adapter that belongs to the trunk: it stays on with "LoRA off".
    """

    __call__: Callable[..., dict[str, Tensor]]

    def __init__(
        self,
        layout: Layout,
        trunks: Mapping[str, PreTrainedModel],
        lora: LoraArgs | None = None,
        loaded: Mapping[str, Adapter] | None = None,
        gradient_checkpointing: bool = False,
        temperature: float = 1.0,
        start: Mapping[str, Adapter] | None = None,
    ) -> None:
        super().__init__()
        if lora is not None:
            lora.check_adapters(layout.trained_adapters)
        self.layout = layout
        self.temperature = temperature
        self.compiled = False
        self._recorded = RecordedPass()
        self.gradient_checkpointing = gradient_checkpointing
        for model in trunks.values():
            model.eval()
        widths = [model.get_output_embeddings().in_features for model in trunks.values()]
        lm_trunks = {role.trunk for role in layout.roles.values() if role.head == "lm"}
        self.logit_transforms: dict[str, LogitTransform] = {
            name: read_logit_transform(trunks[name]) for name in trunks if name in lm_trunks
        }
        self.trunks = nn.ModuleDict()
        for name, model in trunks.items():
            if name not in lm_trunks:
                drop_language_head(model)
            adapters = _adapters_of_trunk(layout, name, lora, loaded or {}, (start or {}).get(name))
            self.trunks[name] = attach_adapters(model, adapters) if adapters else model
        self._switches = {
            name: AdapterSwitch(trunk, always=[START_ADAPTER] if name in (start or {}) else [])
            for name, trunk in self.trunks.items()
        }
        self.heads = nn.ModuleDict(
            {
                role.head: scalar_head(widths[list(trunks).index(role.trunk)])
                for role in layout.roles.values()
                if role.head != "lm"
            }
        )
        self._takes_positions = {
            name: "position_ids" in inspect.signature(self.language_model(name).base_model.forward).parameters
            for name in self.trunks
        }
        # Read before the configs are blanked: chat models list several ids that end a response.
        self.eos_token_ids = sorted({i for model in trunks.values() for i in _configured_eos(model)})
        self._prepare_layers()
        self.eval()
        self.trainable_names = self._list_trainables()
        self.freeze()

    def _prepare_layers(self) -> None:
        for name, switch in self._switches.items():
            model = self.language_model(name)
            if self.gradient_checkpointing:
                kwargs = {"use_reentrant": False, "context_fn": switch.checkpoint_context}
                # transformers 5.23 renamed the method; the older name still serves our lower bound.
                enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
                enable(kwargs)
                for layer in model.modules():
                    if isinstance(layer, GradientCheckpointingLayer):
                        _checkpoint_in_eval_mode(layer)
            # Sampling follows the arguments of each call; nothing leaks in from the hub's file.
            model.generation_config = GenerationConfig()

    def _list_trainables(self) -> list[str]:
        names = []
        for name, _ in self.named_parameters():
            room, part, *_ = name.split(".")
            if room == "heads":
                trained = part in self.layout.trained_heads
            else:
                trained = part in self.layout.trained_trunks or adapter_of(name) in self.layout.trained_adapters
            if trained:
                names.append(name)
        return names

    def freeze(self) -> None:
        """Set ``requires_grad`` from the list of trainables; call it after PEFT methods that rewrite flags."""
        trainable = set(self.trainable_names)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in trainable)

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in eval mode whatever the trainer asks for; see the class docstring."""
        return super().train(False)

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 has sharded it; parameters cannot tell, since gathered ones look like any others."""
        return any(isinstance(module, FSDPModule) for module in self.modules())

    @property
    def in_step(self) -> bool:
        """Whether a forward pass needs every rank, since it gathers weights from all of them."""
        return self.is_sharded

    def language_model(self, trunk: str) -> PreTrainedModel:
        """Return a trunk's Hugging Face model, LoRA layers inside."""
        module = self.trunks[trunk]
        return module.get_base_model() if isinstance(module, PeftModel) else module  # type: ignore[return-value]

    def role(self, name: str) -> Role:
        """Return a role of this layout.

        Raises:
            KeyError: The layout has no such role.
        """
        if name not in self.layout.roles:
            raise KeyError(f"this backbone has the roles {sorted(self.layout.roles)}, not {name!r}")
        return self.layout.roles[name]

    @contextmanager
    def use(self, role: str) -> Iterator[PreTrainedModel]:
        """Give a role's language model, its adapter on, ready for ``generate``."""
        where = self.role(role)
        # A step of one token with a growing cache would be recompiled again and again.
        eager = torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()
        with eager, self._switches[where.trunk].use(where.adapter):
            yield self.language_model(where.trunk)

    def role_parameters(self, role: str) -> dict[str, nn.Parameter]:
        """Return the trained parameters that a role uses, by name."""
        where = self.role(role)
        wanted = set(self.trainable_names)
        found = {}
        for name, parameter in self.named_parameters():
            in_trunk = name.startswith(f"trunks.{where.trunk}.") and adapter_of(name) == where.adapter
            if name in wanted and (in_trunk or name.startswith(f"heads.{where.head}.")):
                found[name] = parameter
        return found

    def passes(self, roles: Sequence[str]) -> dict[tuple[str, str | None], list[str]]:
        """Group roles by the trunk pass that serves them: one for each distinct (trunk, adapter)."""
        groups: dict[tuple[str, str | None], list[str]] = {}
        for name in roles:
            where = self.role(name)
            groups.setdefault((where.trunk, where.adapter), []).append(name)
        return groups

    def forward(
        self,
        roles: Sequence[str],
        tokens: Tensor,
        attention_mask: Tensor,
        mask: Tensor,
        *,
        lm_mask: Tensor | None = None,
        entropy: bool = False,
        value_gradient: float = 1.0,
    ) -> dict[str, Tensor]:
        """Run roles on padded sequences; roles that share a trunk and an adapter share one pass.

        Args:
            roles: Role names.
            tokens: ``[B, P+T]`` long; prompts left-padded to P, responses right-padded to T.
            attention_mask: ``[B, P+T]`` bool, True = token counts.
            mask: ``[B, T]`` bool, True = real response token.
            lm_mask: ``[B, T]`` bool, positions whose log-prob is needed; None means ``mask``.
            entropy: Also return the entropy of the last ``lm`` role under the key ``entropy``.
            value_gradient: Factor on the gradient of values into a pass that other roles share.

        Returns:
            Role name to: log-probs ``[B, T]`` (``lm``), values ``[B, T]`` (``value``: of the state before
            token t), or scores ``[B]`` (``reward``: at the last response token). All float32.
        """
        if self._recorded and torch.is_grad_enabled() and lm_mask is None:
            options: PassOptions = {"entropy": entropy, "value_gradient": value_gradient}
            key = self._pass_key(roles, (tokens, attention_mask, mask), options)
            if (recorded := self._recorded.take(key)) is not None:
                return recorded
        results: dict[str, Tensor] = {}
        lm_mask = mask if lm_mask is None else lm_mask
        for where, group in self.passes(roles).items():
            # A separate call frees each pass's hidden states before the next pass begins.
            results |= self._run_pass(where, group, tokens, attention_mask, mask, lm_mask, entropy, value_gradient)
        return results

    def record(
        self,
        roles: Sequence[str],
        tokens: Tensor,
        attention_mask: Tensor,
        mask: Tensor,
        *,
        entropy: bool = False,
        value_gradient: float = 1.0,
    ) -> dict[str, Tensor]:
        """Run roles and keep their graph: :meth:`forward` returns it once, for these very tensors and weights.

        So a batch that is scored and then trained on, with no update in between, costs one pass instead of two. A
        sharded backbone records nothing: its graph must begin in the training step.

        Args:
            roles, tokens, attention_mask, mask, entropy, value_gradient: See :meth:`forward`; the later call must have
                the same ones.

        Returns:
            What :meth:`forward` returns, detached; nothing where nothing was recorded.
        """
        self.forget()
        if self.is_sharded:
            return {}
        with torch.enable_grad():
            outputs = self(roles, tokens, attention_mask, mask, entropy=entropy, value_gradient=value_gradient)
        options: PassOptions = {"entropy": entropy, "value_gradient": value_gradient}
        self._recorded.keep(self._pass_key(roles, (tokens, attention_mask, mask), options), outputs)
        return {name: output.detach() for name, output in outputs.items()}

    def _pass_key(self, roles: Sequence[str], inputs: tuple[Tensor, ...], options: PassOptions) -> PassKey:
        trained = set(self.trainable_names)
        versions = tuple(p._version for name, p in self.named_parameters() if name in trained)
        return PassKey(tuple(roles), inputs, options, versions)

    def forget(self) -> None:
        """Free what :meth:`record` kept, if nothing used it."""
        self._recorded.drop()

    def zero_loss(self) -> Tensor:
        """Return 0, differentiable: the loss of a skipped minibatch, without a forward pass.

        DDP wants every trained parameter in the graph. Under FSDP2 the heads, which the training step itself gathers,
        are enough.
        """
        parameters = self.heads.parameters() if self.is_sharded else self.parameters()
        return torch.stack([p.sum() for p in parameters if p.requires_grad]).sum() * 0.0

    def _run_pass(
        self,
        where: tuple[str, str | None],
        group: list[str],
        tokens: Tensor,
        attention_mask: Tensor,
        mask: Tensor,
        lm_mask: Tensor,
        entropy: bool,
        value_gradient: float,
    ) -> dict[str, Tensor]:
        """Run one trunk pass and its roles' heads; the arguments are :meth:`forward`'s."""
        results: dict[str, Tensor] = {}
        trunk, responses = where[0], mask.shape[1]
        hidden = self._hidden(*where, tokens, attention_mask)
        before = hidden[:, -responses - 1 : -1]
        for name in group:
            head = self.role(name).head
            if head == "lm":
                results[name], entropies = masked_log_probs(
                    self.language_model(trunk),
                    self.logit_transforms[trunk],
                    before,
                    tokens[:, -responses:],
                    lm_mask,
                    self.temperature,
                    entropy,
                )
                if entropies is not None:
                    results["entropy"] = entropies
            elif head == "value":
                factor = value_gradient if len(group) > 1 else 1.0
                states = before if factor == 1.0 else scale_gradient(before, factor)
                results[name] = self._scalar("value", states).masked_fill(~mask, 0.0)
            else:
                results[name] = self._scalar("reward", gather_last(hidden[:, -responses:], mask))
        return results

    def _scalar(self, head: HeadName, hidden: Tensor) -> Tensor:
        # Values and scores are float32 under autocast too.
        with torch.autocast(hidden.device.type, enabled=False):
            result: Tensor = self.heads[head](hidden.float()).squeeze(-1)
            return result

    def _hidden(self, trunk: str, adapter: str | None, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        attention_mask = attention_mask.long()
        inputs = {"input_ids": tokens, "attention_mask": attention_mask, "use_cache": False}
        if self._takes_positions[trunk]:
            inputs["position_ids"] = position_ids(attention_mask)
        with self._switches[trunk].use(adapter), self._checkpointed(trunk):
            hidden: Tensor = self.language_model(trunk).base_model(**inputs).last_hidden_state
            return hidden

    @contextmanager
    def _checkpointed(self, trunk: str) -> Iterator[None]:
        """Put the layers themselves (not their children) in train mode: that turns checkpointing on."""
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            yield
            return
        layers = [m for m in self.trunks[trunk].modules() if isinstance(m, GradientCheckpointingLayer)]
        with ExitStack() as stack:
            for layer in layers:
                layer.training = True
                stack.callback(setattr, layer, "training", False)
            yield


def scalar_head(width: int) -> nn.Linear:
    """Return a float32 head ``[.., H] -> [.., 1]`` that starts at zero.

    Hidden states of different families differ in scale by orders of magnitude; from zero, the preference loss starts
    at log 2 on all of them.
    """
    head = nn.Linear(width, 1, dtype=torch.float32, device="cpu")
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def _checkpoint_in_eval_mode(layer: Any) -> None:
    """Put a layer back in eval mode once it is being checkpointed: OPT's and Falcon's use it for dropout."""
    checkpoint = layer._gradient_checkpointing_func

    def run(*args: Any) -> Any:
        layer.training = False
        return checkpoint(*args)

    layer._gradient_checkpointing_func = run


def _configured_eos(model: PreTrainedModel) -> list[int]:
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    return [int(i) for i in (configured if isinstance(configured, list) else [configured]) if i is not None]


def drop_language_head(model: PreTrainedModel) -> None:
    """Free the output embedding of a trunk that no ``lm`` role uses, unless the input embedding is the same."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is not embedding.weight:
        model.set_output_embeddings(nn.Identity())


def _adapters_of_trunk(
    layout: Layout, trunk: str, lora: LoraArgs | None, loaded: Mapping[str, Adapter], start: Adapter | None
) -> dict[str, LoraArgs | Adapter]:
    """Return the adapters that a trunk carries: settings of those to train, tensors of the frozen ones.

    Raises:
        ValueError: There are no settings for an adapter to train, or a DoRA adapter would lie on another one.
    """
    sets: dict[str, LoraArgs | Adapter] = {}
    for name in layout.adapters(trunk):
        if name in loaded:
            sets[name] = loaded[name]
        elif lora is None:
            raise ConfigError(f"the layout trains adapter {name!r}, but no lora settings were given")
        else:
            sets[name] = lora.for_adapter(name)
    if start is not None:
        for name, entry in sets.items():
            if (entry if isinstance(entry, LoraArgs) else entry.args).use_dora:
                raise ConfigError(
                    f"DoRA adapter {name!r} needs plain weights, but on a quantized trunk earlier stages stay "
                    "adapters; export the checkpoint with `--format merged` and give that folder as `model`"
                )
        sets[START_ADAPTER] = start
    return sets
