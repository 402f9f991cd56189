"""Responses by vLLM, which gets the actor's current adapter for each rollout."""

import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from lit_rlhf.errors import ConfigError, MissingPackageError
from lit_rlhf.rollout.engines import Engine
from lit_rlhf.rollout.experience import Experience
from lit_rlhf.rollout.generation import Request, as_experience

# The ranks vLLM has kernels for.
RANKS = (8, 16, 32, 64, 128, 256)


class VLLMEngine(Engine):
    """vLLM on a copy of the frozen trunk, beside the training weights.

    The trunk is written to a temporary folder and loaded by vLLM once; the actor's adapter follows before each rollout,
    under a new id. Log-probs come from a forward pass of the training weights: vLLM's own differ from them. Written
    against vLLM's documented interface (``LLM``, ``SamplingParams``, ``LoRARequest``) and tested with a stand-in for
    it; it has not been run with vLLM itself.

    One process, one GPU. ``rollout_batch_size`` still bounds the scoring passes, while vLLM schedules its own batches.

    Args:
        gpu_memory_utilization: Share of the GPU's memory that vLLM takes for its weights and KV cache.
        options: Further arguments of ``vllm.LLM``, such as ``max_model_len`` or ``enforce_eager``.

    Raises:
        ImportError: vLLM is not installed.
    """

    def __init__(self, gpu_memory_utilization: float = 0.4, options: dict[str, Any] | None = None) -> None:
        super().__init__()
        if importlib.util.find_spec("vllm") is None:
            raise MissingPackageError("VLLMEngine needs vLLM: pip install vllm, or remove model.engine")
        self.gpu_memory_utilization = gpu_memory_utilization
        self.options = dict(options or {})
        self._llm: Any = None
        self._rollouts = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def respond(self, model: PreTrainedModel, request: Request) -> Experience:
        """Sample, see :class:`Engine`; the seeds are drawn from torch's global generator.

        Raises:
            ConfigError: The actor is sharded, spread over several processes, or not a plain adapter on a frozen trunk;
                or log-probs are requested.
        """
        if request.in_step or (dist.is_initialized() and dist.get_world_size() > 1):
            raise ConfigError("VLLMEngine runs in one process on one GPU; remove model.engine with several devices")
        if request.keep_log_probs:
            raise ConfigError("VLLMEngine returns no log-probs; set keep_log_probs to false")
        tokens, attention_mask = request.tokens, request.attention_mask
        sampling, samples = request.sampling, request.samples
        adapter = self._hand_over(model)
        prompts = [
            {"prompt_token_ids": row[kept].tolist()} for row, kept in zip(tokens, attention_mask.bool(), strict=True)
        ]
        common = {
            "max_tokens": sampling.max_new_tokens,
            "min_tokens": sampling.min_new_tokens,
            "stop_token_ids": list(request.eos_ids),
            "detokenize": False,
        }
        drawn: list[list[int]] = []
        if samples:
            chances = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k or -1}
            seeds = torch.randint(2**31, (len(prompts),)).tolist()
            drawn = self._ask(prompts, [{**common, **chances, "n": samples, "seed": seed} for seed in seeds], adapter)
        greedy = [{**common, "temperature": 0.0}] * len(prompts)
        likeliest = self._ask(prompts, greedy, adapter) if request.greedy else []
        padded = _padded(drawn + likeliest, request.pad_id).to(tokens.device)
        eos = torch.tensor(request.eos_ids, device=tokens.device)
        parts = []
        for copies, responses in ((samples, padded[: len(drawn)]), (1, padded[len(drawn) :])):
            if len(responses):
                repeated = tokens.repeat_interleave(copies, dim=0)
                mask = attention_mask.bool().repeat_interleave(copies, dim=0)
                parts.append(as_experience(repeated, mask, responses, eos))
        if samples and request.greedy:
            parts[0].greedy = parts[1]
        return parts[0]

    def _ask(self, prompts: list[Any], settings: list[dict[str, Any]], adapter: Any) -> list[list[int]]:
        """Return the responses' token ids, grouped by prompt."""
        from vllm import SamplingParams

        params = [SamplingParams(**setting) for setting in settings]
        outputs = self._llm.generate(prompts, params, use_tqdm=False, lora_request=adapter)
        return [list(c.token_ids) for o in outputs for c in sorted(o.outputs, key=lambda c: c.index)]

    def _hand_over(self, model: PreTrainedModel) -> Any:
        """Write the actor's adapter, on the first call the trunk too; return vLLM's request for it."""
        from vllm.lora.request import LoRARequest

        tensors, config = active_lora(model)
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="lit_rlhf_vllm_")
        folder = Path(self._folder.name)
        if self._llm is None:
            self._llm = self._load(model, folder / "trunk", config.r)
        self._rollouts += 1
        # One folder per rollout: vLLM may read it as late as the first request.
        adapter = folder / f"actor_{self._rollouts}"
        adapter.mkdir()
        save_file(tensors, adapter / "adapter_model.safetensors")
        config.save_pretrained(str(adapter))
        shutil.rmtree(folder / f"actor_{self._rollouts - 1}", ignore_errors=True)
        return LoRARequest(lora_name=adapter.name, lora_int_id=self._rollouts, lora_path=str(adapter))

    def _load(self, model: PreTrainedModel, folder: Path, rank: int) -> Any:
        from vllm import LLM

        model.save_pretrained(folder, state_dict=trunk_state(model))
        settings = {
            "dtype": str(model.dtype).removeprefix("torch."),
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "skip_tokenizer_init": True,
            "enable_lora": True,
            "max_loras": 1,
            "max_lora_rank": next((r for r in RANKS if r >= rank), rank),
        }
        return LLM(model=str(folder), **{**settings, **self.options})


def active_lora(model: PreTrainedModel) -> tuple[dict[str, Tensor], LoraConfig]:
    """Return the active adapter as PEFT stores it: tensors by name, on the CPU, and its configuration.

    Raises:
        ValueError: There is none, several are active, it is DoRA, or the trunk itself is trained.
    """
    why = "VLLMEngine needs an actor that is one plain adapter on a frozen trunk; "
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer) and not m.disable_adapters}
    active = {name for layer in layers.values() for name in layer.active_adapters}
    if len(active) != 1:
        raise ConfigError(f"{why}this one uses {', '.join(sorted(active)) or 'none'}")
    if any(p.requires_grad for name, p in model.named_parameters() if ".lora_" not in name):
        raise ConfigError(f"{why}here the trunk's own weights are trained too")
    (name,) = active
    tensors, scalings = {}, {}
    path: str
    layer: Any
    for path, layer in layers.items():
        if name not in layer.lora_A:
            continue
        if name in layer.lora_magnitude_vector:
            raise ConfigError(f"{why}this one is DoRA, which vLLM does not support")
        scalings[layer.r[name], layer.scaling[name]] = path
        for part, weight in (("lora_A", layer.lora_A[name].weight), ("lora_B", layer.lora_B[name].weight)):
            tensors[f"base_model.model.{path}.{part}.weight"] = weight.detach().cpu().contiguous()
    ((rank, scaling),) = scalings
    targets = sorted({key.split(".")[-3] for key in tensors})
    return tensors, LoraConfig(r=rank, lora_alpha=scaling * rank, target_modules=targets, task_type="CAUSAL_LM")


def trunk_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the weights without LoRA, under the names they have without it."""
    return {k.replace(".base_layer.", "."): v for k, v in model.state_dict().items() if ".lora_" not in k}


def _padded(rows: list[list[int]], pad_id: int) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([row + [pad_id] * (width - len(row)) for row in rows])
