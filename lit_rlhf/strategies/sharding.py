"""FSDP2: shards a backbone layer by layer, and the module that holds it as the root."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.distributed import broadcast, broadcast_object_list
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from lit_rlhf.backbone import Backbone
from lit_rlhf.errors import StrategyError
from lit_rlhf.strategies.ranks import trainer_of


def data_parallel_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """Return the one-dimensional mesh of the ranks that share the parameters.

    Args:
        mesh: Device mesh of ``ModelParallelStrategy``, or already the mesh of the ranks.

    Raises:
        StrategyError: The mesh has a tensor-parallel dimension.
    """
    names = mesh.mesh_dim_names or ()
    if "tensor_parallel" in names and (size := mesh["tensor_parallel"].size()) > 1:
        raise StrategyError(
            f"strategy: tensor_parallel_size is {size} (ModelParallelStrategy's default is every device), but lit_rlhf "
            "shards over data-parallel ranks only, and gradients would silently stay local. Layer "
            "experiments/strategies/fsdp2.yaml over the run (strategy: fsdp2), or set strategy.init_args."
            f"data_parallel_size: {mesh.size()} and strategy.init_args.tensor_parallel_size: 1"
        )
    return mesh["data_parallel"] if "data_parallel" in names else mesh


def shard(
    root: nn.Module,
    backbone: Backbone,
    mesh: DeviceMesh,
    entry_methods: Sequence[str],
    reshard_after_forward: bool = True,
    from_first_rank: bool = False,
    cpu_offload: bool = False,
) -> None:
    """Shard every decoder layer, then the root with the rest: embeddings, norms, heads.

    Only entry methods may reach the root's own parameters: they gather them first.

    Args:
        root: The module that holds the backbone.
        backbone: Built, and on one device.
        mesh: See :func:`data_parallel_mesh`.
        entry_methods: Names of the root's methods that run the backbone.
        reshard_after_forward: False keeps gathered parameters until their backward pass is done.
        from_first_rank: Take all weights from the first rank, each layer just before it is sharded. The other ranks'
            backbone may be on the meta device: they never hold more than their shards and one layer (or what is in no
            layer).
        cpu_offload: Keep shards and their gradients in the host's memory; gathered parameters are on the device.

    Raises:
        StrategyError: The mesh has a tensor-parallel dimension.
        RuntimeError: The ranks built different models, or a trained parameter is not sharded; its gradients would
            silently stay local.
    """
    mesh = data_parallel_mesh(mesh)
    pending = _agree(backbone, mesh) if from_first_rank else {}
    layers = [
        layer
        for name in backbone.trunks
        for layer in backbone.language_model(name).modules()
        if isinstance(layer, GradientCheckpointingLayer)
    ]
    # Page-locked memory speeds up copies from and to a device.
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if cpu_offload else OffloadPolicy()
    for unit in (*layers, root):
        if from_first_rank:
            _receive(unit, pending, mesh)
        # The root's own parameters are needed again as soon as backward begins.
        reshard = reshard_after_forward and (unit is not root or None)
        fully_shard(unit, mesh=mesh, reshard_after_forward=reshard, offload_policy=offload)
    for method in entry_methods:
        register_fsdp_forward_method(root, method)
    trained = set(backbone.trainable_names)
    local = [n for n, p in backbone.named_parameters() if n in trained and not isinstance(p, DTensor)]
    if local:
        raise RuntimeError(f"these trained parameters are not sharded, so their gradients stay local: {local[:3]} ...")


def shard_module(
    module: LightningModule, backbone: Backbone, entry_methods: Sequence[str], mesh: DeviceMesh, from_first_rank: bool
) -> None:
    """Shard a LightningModule and its backbone as the trainer's strategy says, once.

    Args:
        module: The root.
        backbone, entry_methods, mesh, from_first_rank: See :func:`shard`.
    """
    if backbone.is_sharded:
        return
    trainer = trainer_of(module)
    strategy = None if trainer is None else trainer.strategy
    reshard = getattr(strategy, "reshard_after_forward", True)
    offload = getattr(strategy, "cpu_offload", False)
    shard(module, backbone, mesh, entry_methods, reshard, from_first_rank, offload)


def class_path(module: nn.Module) -> str:
    """Return the import path of a module's class; ``fully_shard`` puts its own class in front."""
    kind = next(cls for cls in type(module).__mro__ if not issubclass(cls, FSDPModule))
    return f"{kind.__module__}.{kind.__qualname__}"


def _agree(backbone: Backbone, mesh: DeviceMesh) -> dict[int, torch.dtype]:
    """Compare the model with the first rank's, and take over what only that rank has read from files.

    Returns:
        Dtypes on the first rank, by the ``id`` of this rank's parameter or buffer.
    """
    tensors = {f"{path}.{name}": t for path, module in backbone.named_modules() for name, t in _own_tensors(module)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    sent: list[Any] = [(shapes, {name: tensor.dtype for name, tensor in tensors.items()}, backbone.eos_token_ids)]
    broadcast_object_list(sent, group=mesh.get_group(), group_src=0)
    expected, dtypes, backbone.eos_token_ids = sent[0]
    if expected != shapes:
        different = sorted(n for n in expected.keys() | shapes.keys() if expected.get(n) != shapes.get(n))
        raise RuntimeError(f"rank {mesh.get_local_rank()} built a different model than rank 0: {different[:3]} ...")
    return {id(tensor): dtypes[name] for name, tensor in tensors.items()}


def _own_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Return a module's parameters, buffers and plain attributes that are tensors; not its children's."""
    plain = [(name, value) for name, value in vars(module).items() if isinstance(value, torch.Tensor)]
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False), *plain]


@torch.no_grad()
def _receive(unit: nn.Module, pending: dict[int, torch.dtype], mesh: DeviceMesh) -> None:
    """Replace this rank's weights by the first rank's; those done are removed from ``pending``."""
    first = mesh.get_local_rank() == 0
    device = torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")
    received: dict[int, torch.Tensor] = {}
    replaced = []  # kept until the end, so that no new tensor gets an old one's id
    for module in unit.modules():
        for name, old in _own_tensors(module):
            if (dtype := pending.pop(id(old), None)) is not None:
                data = old.data.to(device) if first else torch.empty(old.shape, dtype=dtype, device=device)
                broadcast(data, group=mesh.get_group(), group_src=0)
                new = nn.Parameter(data, old.requires_grad) if isinstance(old, nn.Parameter) else data
                received[id(old)] = new
                replaced.append(old)
            if (shared := received.get(id(old))) is not None:  # tied weights stay tied
                setattr(module, name, shared)
