"""Helpers of the backbone tests: tiny random models, a padded batch, random updates, stage checkpoints."""

import copy
from dataclasses import dataclass

import pytest
import torch
import transformers
from peft.tuners.lora import LoraLayer
from stage_helpers import HYDRA, REWARD, SFT, lora
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lit_rlhf.backbone import (
    LAYOUTS,
    RECORD_KEY,
    Backbone,
    BackboneSpec,
    LoraArgs,
    build_backbone,
    make_record,
    supervised_layout,
)

EOS = 2
SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": EOS,
    "eos_token_id": EOS,
    "bos_token_id": 1,
}
OPT = {"ffn_dim": 48, "init_std": 0.2, "word_embed_proj_dim": 32}
# Dropout is left at its default: GPT-2's and OPT's is 0.1.
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "opt": ("OPTConfig", OPT),
    # OPT-350M's shape: the last hidden state is narrower than config.hidden_size says.
    "opt_projected": ("OPTConfig", OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}),  # takes no position_ids
    "falcon": ("FalconConfig", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gemma2": ("Gemma2Config", {"final_logit_softcapping": 3.0}),
    "granite": ("GraniteConfig", {"logits_scaling": 0.25}),
    "cohere": ("CohereConfig", {"logit_scale": 0.25}),
}


@dataclass
class Batch:
    tokens: torch.Tensor
    attention_mask: torch.Tensor
    mask: torch.Tensor

    def __iter__(self):
        return iter((self.tokens, self.attention_mask, self.mask))

    def rows(self):
        """Yield (row, its tokens without padding, length of its response)."""
        for i, (tokens, kept, mask) in enumerate(zip(*self, strict=True)):
            yield i, tokens[kept].unsqueeze(0), int(mask.sum())


@pytest.fixture
def batch():
    """Left-padded prompts, right-padded responses of unequal length; EOS pads, some real tokens are EOS."""
    prompts, responses = [6, 3, 1, 4], [5, 2, 1, 4]
    width, length = max(prompts), max(responses)
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(3, SIZES["vocab_size"], (4, width + length), generator=generator)
    kept = torch.zeros(4, width + length, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        kept[row, width - prompt : width + response] = True
        if response < length:
            tokens[row, width + response - 1] = EOS
    tokens[3, width - 2] = EOS  # an EOS inside the prompt counts, whatever pads
    return Batch(tokens.masked_fill(~kept, EOS), kept, kept[:, width:].clone())


@pytest.fixture
def make_model():
    def make_model(family="llama", dtype=torch.float32, seed=0, **changes):
        name, settings = FAMILIES[family]
        sizes = {k: v for k, v in SIZES.items() if family != "falcon" or k != "head_dim"}  # Falcon computes it
        config = getattr(transformers, name)(**{**sizes, **settings, **changes})
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        # Norms and biases start at 1 and 0, which hides mistakes in them.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model.to(dtype).eval()

    return make_model


@pytest.fixture
def randomize():
    """Change everything that is trained, as some optimizer steps would."""

    def randomize(backbone, seed=1, scale=0.1):
        generator = torch.Generator().manual_seed(seed)
        parameters = dict(backbone.named_parameters())
        with torch.no_grad():
            for name in backbone.trainable_names:
                noise = torch.randn(parameters[name].shape, generator=generator)
                parameters[name].add_(scale * noise.to(parameters[name]))
        return backbone

    return randomize


@pytest.fixture
def make_backbone(make_model, randomize):
    """Build a layout on copies of one random model and change everything that is trained."""

    def make_backbone(layout="hydra", family="llama", model=None, roles=None, update=True, lora=None, **kwargs):
        model = model if model is not None else make_model(family)
        table = LAYOUTS[layout] if isinstance(layout, str) else layout
        if roles is not None:
            table = table.restricted_to(roles)
        trunks = {name: copy.deepcopy(model) for name in table.trunks}
        backbone = Backbone(table, trunks, lora or LoraArgs(r=4, alpha=8), **kwargs)
        for head in backbone.heads.values():
            # Heads start at zero; a stage would have trained them.
            torch.nn.init.normal_(head.weight, std=0.2, generator=torch.Generator().manual_seed(1))
        return randomize(backbone) if update else backbone

    return make_backbone


@pytest.fixture
def merged_by_hand():
    """Return a copy of a plain model with ``W + scaling * B @ A`` written into its weights, in float64."""

    def merged_by_hand(plain, backbone, trunk, adapter):
        merged = copy.deepcopy(plain).double()
        weights = dict(merged.named_modules())
        for name, layer in backbone.language_model(trunk).named_modules():
            if adapter is None or not isinstance(layer, LoraLayer) or adapter not in layer.lora_A:
                continue
            config = backbone.trunks[trunk].peft_config[adapter]
            scaling = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
            a, b = layer.lora_A[adapter].weight.double(), layer.lora_B[adapter].weight.double()
            update = scaling * b @ a
            weights[name].weight.data += update.T if isinstance(weights[name], Conv1D) else update
        return merged

    return merged_by_hand


@pytest.fixture
def read_by_hand():
    """Read a plain model row by row without padding: log-probs of the response, hidden states (float64)."""

    @torch.no_grad()
    def read_by_hand(model, batch, temperature=1.0):
        log_probs, before, last = [], [], []
        for _, tokens, n in batch.rows():
            output = model(input_ids=tokens, output_hidden_states=True)
            logits = output.logits[0, -n - 1 : -1].double() / temperature
            log_probs.append(logits.log_softmax(-1).gather(-1, tokens[0, -n:, None])[:, 0])
            hidden = output.hidden_states[-1][0]
            before.append(hidden[-n - 1 : -1])
            last.append(hidden[-1])
        return log_probs, before, last

    return read_by_hand


@pytest.fixture
def padded():
    """Put per-row values where the mask is True, zeros elsewhere."""

    def padded(rows, mask):
        dense = torch.zeros(mask.shape, dtype=torch.float64)
        return dense.masked_scatter(mask, torch.cat(list(rows)).double())

    return padded


@pytest.fixture
def base_model(make_model, tmp_path):
    """Folder of a plain random Llama."""
    make_model().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def run_stage(randomize, tmp_path):
    """Build a backbone, update it at random, write the checkpoint as the LightningModule does; return both."""

    def run_stage(name, spec, layout, seed=1, algorithm="tests.Stage", **changes):
        backbone = randomize(build_backbone(spec, layout), seed)
        state = {f"backbone.{k}": v for k, v in backbone.state_dict().items() if k in set(backbone.trainable_names)}
        record = make_record(algorithm, spec, layout, backbone.trainable_names)
        path = str(tmp_path / f"{name}.ckpt")
        torch.save({"state_dict": state, RECORD_KEY: record, "epoch": 3, **changes}, path)
        return path, backbone

    return run_stage


@pytest.fixture
def sft(run_stage, base_model):
    return run_stage("sft", BackboneSpec(base_model, lora=lora()), supervised_layout(SFT, lora=True))


@pytest.fixture
def hydra_sft(run_stage, base_model):
    return run_stage("hydra_sft", BackboneSpec(base_model, lora=lora()), supervised_layout(HYDRA, lora=True), seed=2)


@pytest.fixture
def reward_model(run_stage, base_model, sft):
    """LoRA reward model on the SFT checkpoint, other rank, scaling and targets than the SFT's."""
    settings = lora(3, use_rslora=True, target_modules=["q_proj", "o_proj"])
    spec = BackboneSpec(base_model, lora=settings, policy_checkpoint=sft[0])
    return run_stage("reward_model", spec, supervised_layout(REWARD, lora=True), seed=3)


@pytest.fixture
def ppo(run_stage, base_model, hydra_sft):
    settings = lora(2, use_rslora=True, target_modules=["q_proj", "v_proj", "up_proj"])
    spec = BackboneSpec(base_model, lora=settings, policy_checkpoint=hydra_sft[0])
    return run_stage("ppo", spec, LAYOUTS["hydra"], seed=4)


@pytest.fixture
def storage_bytes():
    """Return the bytes that a module's parameters and buffers occupy, shared storage counted once."""

    def storage_bytes(module: nn.Module):
        tensors = [*module.parameters(), *module.buffers()]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    return storage_bytes
