"""The framework's own passes on tensors that have shapes but no bytes."""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from lit_rlhf.backbone import Adapter, Backbone, DType, Layout, LoraArgs, vocabulary
from lit_rlhf.functional import position_ids
from lit_rlhf.planner.live import WorstCaseLive
from lit_rlhf.planner.steps import make_module, minibatch_loss
from lit_rlhf.rollout.sampling import inverse_cdf

# What decoding keeps of a response's columns: tokens, log-probs, uniform numbers.
RECORD_DTYPES = (torch.long, torch.float32, torch.float64)

Peaks = dict[str, Counter[str]]


@dataclass(frozen=True)
class Sizes:
    """A padded batch.

    Args:
        batch: Sequences B.
        prompt: Prompt tokens P.
        response: Response tokens T; every response is taken to be this long.
    """

    batch: int
    prompt: int
    response: int


class _WithoutData(TorchDispatchMode):
    """Builds on the meta device whatever device is asked for, and answers every query about values with yes."""

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.aten._local_scalar_dense.default:
            return True
        if "device" in kwargs:
            kwargs["device"] = torch.device("meta")
        return func(*args, **kwargs)


def build_without_weights(
    config: PretrainedConfig,
    layout: Layout,
    lora: LoraArgs | None,
    dtype: DType,
    gradient_checkpointing: bool = False,
) -> Backbone:
    """Return the framework's backbone on the meta device: every shape, dtype and flag as in training, no bytes."""
    with _WithoutData():
        trunks = {
            name: AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval() for name in layout.trunks
        }
        loaded = {name: Adapter(lora or LoraArgs(), {}) for name in layout.loaded_adapters}
        return Backbone(layout, trunks, lora=lora, loaded=loaded, gradient_checkpointing=gradient_checkpointing)


def decoder_layers(backbone: Backbone, trunk: str) -> list[nn.Module]:
    """Return the layers of a trunk that gradient checkpointing and sharding take one at a time."""
    return [m for m in backbone.language_model(trunk).modules() if isinstance(m, GradientCheckpointingLayer)]


def count_parameters(backbone: Backbone) -> Counter[str]:
    """Bytes of a backbone's parameters and buffers, tied ones once.

    Returns:
        ``trunks``; ``adapters`` (scalar heads included); ``trained`` (part of both); ``largest_trained`` (one
        parameter); ``unit`` (the largest decoder layer, adapters included) and ``outside`` (what is in no decoder
        layer), and of these two the trained part: ``trained_unit``, ``trained_outside``.
    """
    trained = set(backbone.trainable_names)
    counts: Counter[str] = Counter()
    layers = {id(p): layer for name in backbone.trunks for layer in decoder_layers(backbone, name)
              for p in layer.parameters()}  # fmt: skip
    units: dict[int, Counter[str]] = {}
    for name, tensor in [*backbone.named_parameters(), *backbone.named_buffers()]:
        size = tensor.numel() * tensor.element_size()
        own = size if name in trained else 0
        is_trunk = not name.startswith("heads.") and ".lora_" not in name
        counts["trunks" if is_trunk else "adapters"] += size
        counts["trained"] += own
        counts["largest_trained"] = max(counts["largest_trained"], own)
        layer = layers.get(id(tensor))
        where = counts if layer is None else units.setdefault(id(layer), Counter())
        where["outside" if layer is None else "unit"] += size
        where["trained_outside" if layer is None else "trained_unit"] += own
    for unit in units.values():
        counts |= unit
    return counts


class Simulation:
    """One backbone on fake tensors, and the passes of each phase on it.

    Args:
        config: Architecture, at the depth to run.
        layout: Layout of the backbone.
        lora: The trained adapters.
        dtype: Dtype of the trunks.
        gradient_checkpointing: Recompute the layers' activations in backward.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        layout: Layout,
        lora: LoraArgs | None,
        dtype: DType,
        gradient_checkpointing: bool = False,
    ) -> None:
        self.layout = layout
        self.vocabulary = vocabulary(config)
        self.backbone = build_without_weights(config, layout, lora, dtype, gradient_checkpointing)
        self._mode = FakeTensorMode()
        with self._mode:
            _make_fake(self.backbone)

    def _live(self) -> WorstCaseLive:
        known = [*self.backbone.parameters(), *self.backbone.buffers()]
        return WorstCaseLive(known, self.vocabulary)

    def _trainables(self) -> list[nn.Parameter]:
        parameters = dict(self.backbone.named_parameters())
        return [parameters[name] for name in self.backbone.trainable_names]

    def training(self, algorithm: str, sizes: Sizes) -> Peaks:
        """Run one minibatch, loss and backward, from no gradients.

        Args:
            algorithm: See :func:`lit_rlhf.planner.steps.make_module`.
            sizes: The minibatch.

        Returns:
            Stretch (``loss ..`` while the module computes its loss, then ``backward ..``) to the bytes by kind at its
            peak; ``gradients`` are those computed so far.
        """
        module = make_module(algorithm, self.backbone)
        trainables = self._trainables()
        live = self._live()
        live.gradient_shapes = {(p.shape, p.dtype) for p in trainables}
        with self._mode, live, ExitStack() as hooks:
            for parameter in trainables:
                for handle in (
                    parameter.register_hook(lambda gradient: live.move(gradient, "gradients")),
                    parameter.register_post_accumulate_grad_hook(lambda p: live.move(p.grad, "gradients")),
                ):
                    hooks.callback(handle.remove)
            marks = hooks.enter_context(_marked(self.backbone, live))
            loss = minibatch_loss(module, *_batch(sizes))
            marks.begin("backward")
            loss.backward()
        for parameter in trainables:
            parameter.grad = None
        return live.peaks

    @torch.no_grad()
    def scoring(self, roles: Sequence[str], sizes: Sizes) -> Peaks:
        """Run the forward passes of these roles without gradients, as a rollout is scored."""
        live = self._live()
        with self._mode, live, _marked(self.backbone, live):
            tokens, attention_mask, mask = _batch(sizes)
            self.backbone(roles, tokens, attention_mask, mask)
        return live.peaks

    @torch.no_grad()
    def generation(self, sizes: Sizes, per_prompt: int = 1) -> Peaks:
        """Run the prompts, and then the last token of the responses with the cache full; sample from the logits.

        Args:
            sizes: Its batch is the sequences decoded at once.
            per_prompt: Sequences that share the pass over their prompt.

        Returns:
            Stretch ``prefill`` or ``decode`` to the bytes at its peak, the cache under ``kv_cache``.
        """
        prompts = replace(sizes, batch=max(1, sizes.batch // per_prompt))
        return {"prefill": self._prefill(prompts), "decode": self._decode(sizes)}

    def _prefill(self, sizes: Sizes) -> Counter[str]:
        live = self._live()
        with self._mode, live, self.backbone.use("actor") as model:
            _sample(_step(model, sizes.batch, sizes.prompt, None))
        return live.peaks[live.stretch]

    def _decode(self, sizes: Sizes) -> Counter[str]:
        live = self._live()
        with self._mode, self.backbone.use("actor") as model:
            # The last token of a response needs no forward pass; the one before it is run here.
            cache = _step(model, sizes.batch, max(sizes.prompt + sizes.response - 2, 1), None).past_key_values
            with live:
                for tensor in _cached(cache):
                    live.add(tensor, "kv_cache")
                record = [torch.zeros(sizes.batch, sizes.response, dtype=d) for d in RECORD_DTYPES]
                record.append(torch.zeros(sizes.batch, sizes.prompt + sizes.response, dtype=torch.long))
                _sample(_step(model, sizes.batch, 1, cache))
                del record
        return live.peaks[live.stretch]


def _make_fake(module: nn.Module) -> None:
    """Replace meta tensors by fake CPU ones; tied weights stay tied. Meta ones have no attention kernel to choose."""
    made: dict[int, Tensor] = {}
    for owner in (d for m in module.modules() for d in (m._parameters, m._buffers)):
        for name, old in owner.items():
            if old is None:
                continue
            if id(old) not in made:
                tensor = torch.empty(old.shape, dtype=old.dtype)
                is_parameter = isinstance(old, nn.Parameter)
                made[id(old)] = nn.Parameter(tensor, requires_grad=old.requires_grad) if is_parameter else tensor
            owner[name] = made[id(old)]  # type: ignore[assignment]


def _batch(sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    length = sizes.prompt + sizes.response
    return (
        torch.zeros(sizes.batch, length, dtype=torch.long),
        torch.ones(sizes.batch, length, dtype=torch.bool),
        torch.ones(sizes.batch, sizes.response, dtype=torch.bool),
    )


def _step(model: PreTrainedModel, batch: int, tokens: int, cache: Cache | None) -> CausalLMOutputWithPast:
    """Run the language model as ``generate`` does: logits of the last position only."""
    seen = 0 if cache is None else cache.get_seq_length()
    attention_mask = torch.ones(batch, seen + tokens, dtype=torch.long)
    inputs: dict[str, Any] = {"input_ids": torch.zeros(batch, tokens, dtype=torch.long), "past_key_values": cache}
    wanted = inspect.signature(model.forward).parameters
    if "position_ids" in wanted:
        inputs["position_ids"] = position_ids(attention_mask)[:, -tokens:]
    if "logits_to_keep" in wanted:
        inputs["logits_to_keep"] = 1
    output: CausalLMOutputWithPast = model(attention_mask=attention_mask, use_cache=True, **inputs)
    return output


def _sample(output: CausalLMOutputWithPast) -> None:
    """What one sampling step keeps: float32 logits, their softmax; both again without the EOS; the draw."""
    assert output.logits is not None
    logits = output.logits[:, -1].float()
    policy = logits.softmax(dim=-1)
    allowed = logits.clone()
    inverse_cdf(allowed.softmax(dim=-1), torch.zeros(len(logits), dtype=torch.float64))
    del policy


def _cached(cache: Cache | None) -> Iterator[Tensor]:
    for layer in getattr(cache, "layers", []):
        yield from (t for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if t is not None)


class _Marks:
    """Names the stretches of a run by stage, pass, and first layer, last layer or what lies between and after.

    Only then is each stretch's peak linear in the depth: the run's peak may pass from one stretch to another.
    """

    def __init__(self, live: WorstCaseLive) -> None:
        self._live = live
        self._stage = ""
        self._passes = 0
        self.begin("loss")

    def begin(self, stage: str) -> None:
        self._stage = stage
        self._enter("start")

    def _enter(self, name: str) -> None:
        self._live.enter(f"{self._stage} {name}")

    def before(self, index: int, place: str) -> Callable[..., None]:
        """Return the hook that runs before a layer."""

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if _in_backward():  # recomputation
                return
            self._passes += index == 0
            self._enter(f"{self._passes} {place}")
            if index == 0 and args and args[0].requires_grad:
                self._on_gradient(args[0], "embedding")

        return hook

    def after(self, place: str) -> Callable[..., None]:
        """Return the hook that runs after a layer."""

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
            if _in_backward():
                return
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                self._on_gradient(hidden, place)
            if place == "last":
                self._enter(f"{self._passes} heads")

        return hook

    def _on_gradient(self, tensor: Tensor, place: str) -> None:
        name = f"{self._passes} {place} gradient"
        tensor.register_hook(lambda gradient: self._enter(name))


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


@contextmanager
def _marked(backbone: Backbone, live: WorstCaseLive) -> Iterator[_Marks]:
    """Follow the decoder layers of every trunk inside the block."""
    marks = _Marks(live)
    with ExitStack() as stack:
        for trunk in backbone.trunks:
            layers = decoder_layers(backbone, trunk)
            for index, layer in enumerate(layers):
                place = "last" if index == len(layers) - 1 else "middle" if index else "first"
                stack.callback(layer.register_forward_pre_hook(marks.before(index, place)).remove)
                stack.callback(layer.register_forward_hook(marks.after(place)).remove)
        yield marks
