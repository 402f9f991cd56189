"""Reading what an earlier stage wrote: the weights that role R of checkpoint C uses.

A stage checkpoint holds only what was trained. The frozen rest is found again through the record that every
checkpoint carries: the base model's name and the checkpoints that the stage itself started from.
"""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from lit_rlhf.backbone.adapter_tensors import Adapter, RoleModel
from lit_rlhf.backbone.loading import DType, load_language_model
from lit_rlhf.backbone.quantization import Quantization, quantize
from lit_rlhf.backbone.roles import ArtifactName, HeadName, Layout, Role
from lit_rlhf.backbone.spec import BackboneSpec, read_layout, read_spec
from lit_rlhf.checkpoints.records import RECORD_KEY, read_checkpoint
from lit_rlhf.errors import ConfigError


@dataclass(frozen=True)
class Trained:
    """What one stage trained of a trunk; two are equal if they are the same part of the same checkpoint.

    Args:
        checkpoint: The stage's file.
        part: Name of the trunk, or of trunk and adapter.
        weights: An adapter on the trunk, or the trunk's own tensors by their names in the language model.
    """

    checkpoint: Path
    part: str
    weights: Adapter | dict[str, Tensor] = field(compare=False, repr=False)


@dataclass(frozen=True)
class TrunkWeights:
    """A trunk's weights as a recipe: a base model, then what each stage trained on it, in that order.

    Args:
        model: Name of the base model.
        stages: What the stages trained.
    """

    model: str
    stages: tuple[Trained, ...] = ()

    def load(self, dtype: DType, quantization: Quantization | None = None) -> RoleModel:
        """Load the base model, once, and apply what each stage trained.

        Args:
            dtype: Dtype of the weights.
            quantization: Quantize the linear layers, as soon as no later stage trained them in full.

        Returns:
            The model, and the adapters trained since its own weights were last trained.

        Raises:
            ValueError: The tensors of a stage do not fit the model.
            OSError: The base model cannot be loaded.
        """
        trained_in_full = any(isinstance(stage.weights, dict) for stage in self.stages)
        found = RoleModel(load_language_model(self.model, dtype, None if trained_in_full else quantization), [])
        for stage in self.stages:
            if isinstance(stage.weights, Adapter):
                found.adapters.append(stage.weights)
                continue
            unexpected = found.merged().load_state_dict(stage.weights, strict=False).unexpected_keys
            if unexpected:
                raise ConfigError(f"checkpoint {stage.checkpoint} does not fit {self.model}: {unexpected[:3]} ...")
        if trained_in_full and quantization is not None:
            found.base = quantize(found.base, quantization)
        return found


@dataclass
class _Contents:
    """What a checkpoint file holds."""

    spec: BackboneSpec
    layout: Layout
    state: dict[str, Tensor]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the trained tensors."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state.items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


class StageReader:
    """Reads the checkpoints of a chain of stages, each file once, its tensors mapped lazily."""

    def __init__(self) -> None:
        # The files' contents, not checkpoints, which refer to this reader: a reference cycle would keep tensors alive.
        self._read: dict[Path, _Contents] = {}

    def read(self, path: str | Path) -> "StageCheckpoint":
        """Return a checkpoint; see :func:`lit_rlhf.checkpoints.records.read_checkpoint` for the errors."""
        place = Path(path).resolve()
        if place not in self._read:
            content = read_checkpoint(path)
            record = content[RECORD_KEY]
            self._read[place] = _Contents(
                read_spec(record["spec"]), read_layout(record["layout"]), content["state_dict"]
            )
        return StageCheckpoint(Path(path), self._read[place], self)

    def parent(self, spec: BackboneSpec, artifact: ArtifactName) -> "StageCheckpoint | None":
        """Return the checkpoint that this artifact of a stage comes from; None is the base model.

        Raises:
            ValueError: The file was replaced by another since the stage started from it.
        """
        path = spec.checkpoint_of(artifact)
        if path is None:
            return None
        stage = self.read(path)
        expected = spec.fingerprints.get(str(Path(path).resolve()))
        if expected is not None and stage.fingerprint != expected:
            raise ConfigError(
                f"checkpoint {path} was replaced after a later stage was trained on it; that stage's weights do not "
                "fit the new file. Restore the old one, or train the later stage again"
            )
        return stage

    def weights(self, spec: BackboneSpec, artifact: ArtifactName) -> TrunkWeights:
        """Return the weights that trunks of this artifact start from.

        Raises:
            ValueError: A checkpoint of the chain was replaced, or was trained from another model than ``spec.model``.
        """
        stage = self.parent(spec, artifact)
        if stage is None:
            return TrunkWeights(spec.model)
        stage.check_base(spec)
        return stage.weights("reward" if artifact == "reward" and "reward" in stage.layout.roles else "actor")


@dataclass
class StageCheckpoint:
    """A checkpoint of an earlier stage.

    Args:
        path: Its file.
        contents: What it holds.
        reader: Reads the checkpoints that the stage itself started from.
    """

    path: Path
    contents: _Contents
    reader: StageReader

    @classmethod
    def read(cls, path: str | Path) -> "StageCheckpoint":
        """Read a checkpoint file; see :func:`lit_rlhf.checkpoints.records.read_checkpoint` for the errors."""
        return StageReader().read(path)

    @property
    def spec(self) -> BackboneSpec:
        """Where the stage's own weights started."""
        return self.contents.spec

    @property
    def layout(self) -> Layout:
        """The stage's layout."""
        return self.contents.layout

    @property
    def state(self) -> dict[str, Tensor]:
        """The trained tensors by their names in the LightningModule."""
        return self.contents.state

    @property
    def fingerprint(self) -> str:
        """A hash of the trained tensors, computed once a file."""
        return self.contents.fingerprint

    def check_base(self, spec: BackboneSpec) -> None:
        """Raise ValueError where the stage was trained from another base model than ``spec.model``."""
        if self.spec.model != spec.model:
            raise ConfigError(
                f"checkpoint {self.path} was trained from model {self.spec.model!r}, but model is {spec.model!r}. Set "
                f"model.model to the checkpoint's (--model.model {self.spec.model}), or choose another checkpoint"
            )

    def _role(self, role: str) -> Role:
        if role not in self.layout.roles:
            raise ConfigError(f"checkpoint {self.path} holds the roles {sorted(self.layout.roles)}, not {role!r}")
        return self.layout.roles[role]

    def _tensors(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in self.state.items() if key.startswith(prefix)}

    def adapter(self, role: str) -> Adapter | None:
        """Return the adapter that a role uses, None where it uses the trunk alone.

        Raises:
            ValueError: The checkpoint has no such role.
        """
        where = self._role(role)
        if where.adapter is None:
            return None
        if where.adapter in self.layout.loaded_adapters:
            parent = self.reader.parent(self.spec, "reward")
            return None if parent is None else parent.adapter("reward")
        if self.spec.lora is None:
            return None
        suffix = f".{where.adapter}.weight"
        trunk = self._tensors(f"backbone.trunks.{where.trunk}.")
        tensors = {k.removesuffix(suffix) + ".weight": tensor for k, tensor in trunk.items() if k.endswith(suffix)}
        return Adapter(self.spec.lora.for_adapter(where.adapter), tensors)

    def weights(self, role: str) -> TrunkWeights:
        """Return the weights that a role uses, found through the chain of stages.

        Raises:
            ValueError: The checkpoint has no such role, or see :meth:`StageReader.weights`.
        """
        where = self._role(role)
        trunk = self.layout.trunks[where.trunk]
        start = self.reader.weights(self.spec, trunk.artifact)
        trained: Adapter | dict[str, Tensor] | None
        if trunk.trained:
            part, trained = where.trunk, self._tensors(f"backbone.trunks.{where.trunk}.")
        else:
            part, trained = f"{where.trunk}.{where.adapter}", self.adapter(role)
        if trained is None:
            return start
        return TrunkWeights(start.model, (*start.stages, Trained(self.path, part, trained)))

    def role_model(self, role: str, dtype: DType | None = None, quantization: Quantization | None = None) -> RoleModel:
        """Load the language model that a role uses.

        Args:
            role: Role name, such as ``actor`` or ``reward``.
            dtype: Dtype of the weights; None means the stage's own.
            quantization: Quantize the base model; None gives it plain, whatever the stage was trained on.

        Raises:
            ValueError, OSError: See :meth:`weights` and :meth:`TrunkWeights.load`.
        """
        return self.weights(role).load(dtype or self.spec.dtype, quantization)

    def head_state(self, head: HeadName) -> dict[str, Tensor] | None:
        """Return the tensors of a scalar head, from the nearest stage of the chain that trained one, or None."""
        own = self._tensors(f"backbone.heads.{head}.")
        if own:
            return own
        parent = self.reader.parent(self.spec, "reward")
        return None if parent is None else parent.head_state(head)


def fingerprint_parents(spec: BackboneSpec) -> dict[str, str]:
    """Return the fingerprints of the checkpoints that a stage starts from, by absolute path."""
    reader = StageReader()
    return {str(Path(path).resolve()): reader.read(path).fingerprint for path in sorted(spec.checkpoints)}
