"""For test_cpu_offload.py: two steps of an offloaded model on a device that only pretends; prints where tensors lay.

Tensors are fake (device, dtype, shape and no numbers), the device is one that torch lets Python register, and the other
rank's part of every collective is made up. FSDP2, autograd, clipping and the optimizer are torch's own.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers import make_ppo

from lit_rlhf.strategies import FSDP2Strategy, shard
from lit_rlhf.strategies.fsdp2 import _gathered, _like


class Event:
    """An event that has always happened; also a stream on which nothing is waited for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Any = None) -> "Event":
        return self

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: Event()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *args: object) -> None:
        pass


class Gpu(_DummyBackendModule):
    """What torch asks of ``torch.gpu``."""

    Event = Stream = Event

    def device_count(self) -> int:
        return 2

    def stream(self, stream: Any) -> Event:
        return Event()

    def current_stream(self, device: Any = None) -> Event:
        return Event()


_setup_privateuseone_for_python_backend(rename="gpu", backend_module=Gpu())
GPU = torch.device("gpu", 0)


def places(tensors: Any) -> list[str]:
    return sorted({tensor.device.type for tensor in tensors})


def main() -> dict[str, Any]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    # Page-locked memory is the one thing that only a real device has.
    torch.Tensor.pin_memory = lambda self, *args: self  # type: ignore[method-assign, assignment]
    torch.Tensor.is_pinned = lambda self, *args: self.device.type == "cpu"  # type: ignore[method-assign, assignment]
    mesh = init_device_mesh("gpu", (2,), mesh_dim_names=("data_parallel",))
    module = make_ppo()
    module.configure_model()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    mode.__enter__()
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            fake = mode.from_tensor(parameter.data).to(GPU)
            part._parameters[name] = nn.Parameter(fake, parameter.requires_grad)
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = mode.from_tensor(buffer).to(GPU)
    shard(module, module.backbone, mesh, (), cpu_offload=True)
    strategy = FSDP2Strategy(cpu_offload=True)
    strategy.parallel_devices = [GPU]
    strategy.cluster_environment = type("One", (), {"local_rank": lambda self: 0})()
    strategy.model = module
    strategy.model_to_device()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    found: dict[str, Any] = {"parameters": places(module.parameters()), "buffers": places(module.buffers())}
    found["module"] = module.device.type
    model = module.backbone.language_model(next(iter(module.backbone.trunks))).train()
    layers: set[tuple[str, str]] = set()
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(lambda m, a: layers.add((m.weight.device.type, a[0].device.type)))
    tokens = torch.randint(3, 900, (2, 12), device=GPU)
    module.go = lambda: model(tokens, use_cache=False).logits.float().logsumexp(-1).mean()
    register_fsdp_forward_method(module, "go")
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for _ in range(2):
        loss = module.go()
        loss.backward()
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        found |= {"loss": loss.device.type, "gradients": places(gradients)}
        found["norm"] = nn.utils.clip_grad_norm_(trained, 1.0).device.type
        optimizer.step()
        optimizer.zero_grad()
    states = [state for state in optimizer.state.values() if state]
    found["moments"] = places(value for state in states for value in state.values())
    found["weights in layers, inputs"] = sorted(layers)
    moment, parameter = states[0]["exp_avg"], trained[0]
    found["taken from a file"] = places([_like(torch.zeros(parameter.shape), parameter)])
    found["gathered for a file"] = places([_gathered(moment, True)])
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    found["weights for a file"] = places(get_model_state_dict(module, options=whole).values())
    return found


if __name__ == "__main__":
    print(json.dumps(main()))
