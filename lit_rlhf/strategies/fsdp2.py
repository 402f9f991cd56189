"""``fsdp2``: FSDP2 over all ranks, without a mesh to spell out."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor
from torch.distributed import Backend
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from lit_rlhf.checkpoints.folders import REST, beside, load_folder, put_in_place, remove, save_folder, settle
from lit_rlhf.checkpoints.records import read_checkpoint
from lit_rlhf.errors import CheckpointError, StrategyError


class FSDP2Strategy(ModelParallelStrategy):
    """FSDP2 over all ranks (``--trainer.strategy fsdp2``); every rank draws its own data.

    Checkpoints are what single-device and DDP runs write, so each resumes those of the others, on any number of ranks.

    Args:
        reshard_after_forward: True frees gathered parameters after each layer's forward pass (ZeRO-3); False keeps
            them until backward (ZeRO-2's memory in training: gradients and optimizer state are sharded).
        save_distributed_checkpoint: Write a folder with each rank's shards instead of one file. Only this strategy
            resumes it, on any number of ranks; ``export`` and later stages need the file.
        process_group_backend: None chooses NCCL on GPUs, with Gloo beside it for ``cpu_offload``, else Gloo.
        timeout: Of collective operations.
        cpu_offload: Keep sharded parameters, gradients and optimizer state in the host's memory (ZeRO-3 with CPU
            offload); the optimizer steps there. A layer's parameters are gathered on the GPU. Not yet run on a GPU.
    """

    def __init__(
        self,
        reshard_after_forward: bool = True,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta = default_pg_timeout,
        cpu_offload: bool = False,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.reshard_after_forward = reshard_after_forward
        self.cpu_offload = cpu_offload

    def setup_environment(self) -> None:
        """Create the mesh over all ranks.

        Raises:
            StrategyError: ``cpu_offload`` on GPUs with a backend that cannot sum over tensors in the host's memory.
        """
        if not self.cpu_offload:
            self._data_parallel_size = self.num_nodes * self.num_processes
            super().setup_environment()
            return
        self._process_group_backend = offload_backend(self.root_device.type, self._process_group_backend)
        self._setup_distributed()
        # Of one dimension, which is the default group. For a second one torch would split that group, and with two
        # backends that fails or warns (pytorch/pytorch#159200).
        mesh = init_device_mesh(self.root_device.type, (self.world_size,), mesh_dim_names=("data_parallel",))
        assert self.lightning_module is not None
        self._device_mesh = self.lightning_module._device_mesh = mesh

    def setup(self, trainer: Trainer) -> None:
        """Set up as Lightning does, but leave an optimizer's state where its parameters are."""
        super().setup(trainer)
        if self.cpu_offload:
            _optimizers_to_device(self.optimizers, torch.device("cpu"))

    def model_to_device(self) -> None:
        """Move the model; with ``cpu_offload`` its buffers only, since FSDP2 insists on parameters on the CPU."""
        if not self.cpu_offload:
            super().model_to_device()
            return
        assert self.model is not None
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.root_device)
        # Sets ``module.device``, where batches, rollouts and logged numbers go.
        _update_properties(self.model, device=self.root_device)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state as on a single device; on ranks other than 0 it is empty.

        Lightning's own numbers parameters by their place in the whole model, frozen ones included, which only FSDP2
        loads correctly.
        """
        if self._save_distributed_checkpoint:
            return super().optimizer_state(optimizer)
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        saved = optimizer.state_dict()
        whole = {
            index: {name: _gathered(value, self.is_global_zero) for name, value in state.items()}
            for index, state in saved["state"].items()
        }
        return {"state": whole, "param_groups": saved["param_groups"]} if self.is_global_zero else {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint; an earlier one of that name is replaced by a rename, once all of the new one is on disk.

        Raises:
            CheckpointError: It could not be written; the earlier one is intact. For a folder, all ranks raise.
        """
        path, over_folder = self.broadcast((Path(filepath), (Path(filepath) / REST).is_file()))
        if not self._save_distributed_checkpoint or storage_options is not None:
            if self.is_global_zero:
                settle(path)
                remove(beside(path, "previous"))
            # Lightning would delete a folder of that name before it writes the file.
            super().save_checkpoint(checkpoint, beside(path, "partial") if over_folder else filepath, storage_options)
            if over_folder and self.is_global_zero:
                put_in_place(beside(path, "partial"), path)
            return
        if "://" in str(filepath):
            raise CheckpointError(
                f"checkpoint {filepath}: folders of shards can be written to disks only, not to remote storage"
            )
        states = checkpoint.pop("optimizer_states", [])
        shards = {"state_dict": checkpoint.pop("state_dict")}
        save_folder(path, shards | {f"optimizer_{index}": state for index, state in enumerate(states)}, checkpoint)

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Delete a checkpoint; a folder is never left half deleted."""
        if not Path(filepath).is_dir():
            super().remove_checkpoint(filepath)
        elif self.is_global_zero:
            remove(Path(filepath))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load weights and optimizer state; each rank reads its own shards, from a folder or from the one file.

        Raises:
            CheckpointError: It cannot be read.
        """
        path = Path(self.broadcast(checkpoint_path))
        assert self.lightning_module is not None
        settle(path)
        if path.is_dir():
            return load_folder(path, self.lightning_module, self.optimizers, self.lightning_module.strict_loading)
        try:
            checkpoint = read_checkpoint(path)
        except (OSError, ValueError) as error:
            raise CheckpointError(str(error)) from error
        parameters = dict(self.lightning_module.named_parameters())
        weights = checkpoint.pop("state_dict")
        with torch.no_grad():
            for name in weights.keys() & parameters.keys():
                parameters[name].copy_(_like(weights[name], parameters[name]))
        for optimizer, saved in zip(self.optimizers, checkpoint.get("optimizer_states", []), strict=False):
            optimizer.load_state_dict(_sharded_state(optimizer, saved))
        return checkpoint


def offload_backend(device: str, backend: str | None) -> str | None:
    """Return the backend of the process group for ``cpu_offload``: on GPUs one for each kind of tensor.

    The norm of the gradient and the like are sums over tensors in the host's memory.

    Args:
        device: Type of the device.
        backend: What the user asked for.

    Raises:
        StrategyError: It cannot handle tensors in host memory.
    """
    if device == "cpu":
        return backend
    if backend is not None and "cpu:" not in backend:
        raise StrategyError(
            f"strategy: cpu_offload needs a process_group_backend for the host's memory too, and {backend} is for "
            f"{device} alone. Leave it out, or set cpu:gloo,{device}:{backend}"
        )
    return backend or f"cpu:gloo,{device}:{Backend.default_device_backend_map.get(device, 'nccl')}"


def _gathered(value: Any, keep: bool) -> Any:
    """Return the whole of a sharded tensor on the CPU; every rank calls this, those that keep nothing get None."""
    if isinstance(value, DTensor):
        # Offloaded shards are gathered on the device like all others.
        value = value.to(device=value.device_mesh.device_type)
        value = value.full_tensor()
    if not keep:
        return None
    return value.cpu() if isinstance(value, Tensor) else value


def _like(whole: Tensor, parameter: Tensor) -> Tensor:
    """Return a tensor sharded and placed as the parameter is; every rank has the whole and takes its own part."""
    if not isinstance(parameter, DTensor) or whole.shape != parameter.shape:
        return whole.to(parameter.device)
    whole = whole.to(parameter.device_mesh.device_type)
    sharded = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return sharded.to(parameter.device)


def _sharded_state(optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """Return a saved optimizer state with each tensor sharded as its parameter is.

    Like torch's own loading, it matches parameters by their position in the group, whatever their number in the file.
    """
    parameters = {
        number: parameter
        for theirs, ours in zip(saved["param_groups"], optimizer.param_groups, strict=True)
        for number, parameter in zip(theirs["params"], ours["params"], strict=True)
    }
    state = {
        number: {
            name: _like(value, parameters[number]) if isinstance(value, Tensor) and value.dim() else value
            for name, value in values.items()
        }
        for number, values in saved["state"].items()
    }
    return {**saved, "state": state}


if "fsdp2" not in StrategyRegistry:
    StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2 over all ranks (lit_rlhf)")
