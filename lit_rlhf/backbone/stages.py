"""Reading what an earlier stage wrote: the model that role R of checkpoint C reads.

A stage checkpoint holds only what was trained. The frozen rest is found again through the record that every
checkpoint carries: the base model's name and the checkpoints the stage itself started from.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.backbone.adapters import LoraArgs
from lit_rlhf.backbone.loading import DType, load_language_model
from lit_rlhf.backbone.lora_sets import LoraSet, RoleModel
from lit_rlhf.backbone.quantization import Quantization, check_quantization, quantize
from lit_rlhf.backbone.roles import LAYOUTS, ArtefactName, HeadName, Layout, Role, Trunk
from lit_rlhf.checkpoints.files import load_file
from lit_rlhf.errors import ConfigError

RECORD_KEY = "lit_rlhf"
FORMAT = 1


@dataclass
class BackboneSpec:
    """Everything that says where a backbone's weights come from; plain data, saved in every checkpoint.

    Args:
        model: Base model name (see :func:`lit_rlhf.backbone.loading.resolve_source`).
        tokenizer: Tokenizer name; None means the model's.
        dtype: Dtype of the trunks. LoRA sets and scalar heads are float32 always.
        lora: The trained LoRA sets; None where trunks are fully trained.
        policy_checkpoint: Stage checkpoint (SFT, Hydra-SFT, an earlier PPO) the policy trunks start from.
        reward_checkpoint: Reward-model checkpoint; None means the policy checkpoint's own reward head.
        fingerprints: What these checkpoints held when the stage started from them, by absolute path.
        quantization: Keep the linear layers of the frozen trunks in 8 (``int8``) or 4 bits (``nf4``); needs
            bitsandbytes and a CUDA device. LoRA sets of earlier stages stay beside the trunk, frozen and exact, since
            added to coarsely rounded weights they would be lost. Exports add all sets to the plain weights.
    """

    model: str
    tokenizer: str | None = None
    dtype: DType = "float32"
    lora: LoraArgs | None = None
    policy_checkpoint: str | None = None
    reward_checkpoint: str | None = None
    fingerprints: dict[str, str] = field(default_factory=dict)
    quantization: Quantization | None = None

    def parent(self, artefact: ArtefactName) -> "StageCheckpoint | None":
        """Read the checkpoint that this artefact comes from; None is the base model.

        Raises:
            ValueError: The file was replaced by another since this stage started from it.
        """
        path = self.checkpoint_of(artefact)
        if path is None:
            return None
        stage = StageCheckpoint.read(path)
        expected = self.fingerprints.get(str(Path(path).resolve()))
        if expected is not None and stage.fingerprint() != expected:
            raise ConfigError(
                f"checkpoint {path} was replaced after a later stage was trained on it; that stage's weights mean "
                "nothing on the new file. Restore the old one, or train the later stage again"
            )
        return stage

    def checkpoint_of(self, artefact: ArtefactName) -> str | None:
        """Return the checkpoint that trunks of this artefact start from; None is the base model."""
        if artefact == "reward" and self.reward_checkpoint is not None:
            return self.reward_checkpoint
        return self.policy_checkpoint


def make_record(algorithm: str, spec: BackboneSpec, layout: Layout, trainable_names: list[str]) -> dict[str, Any]:
    """Return the plain-data record that a checkpoint carries under :data:`RECORD_KEY`."""
    plain = asdict(spec)
    for key in ("policy_checkpoint", "reward_checkpoint"):
        plain[key] = str(Path(plain[key]).resolve()) if plain[key] else None
    return {
        "format": FORMAT,
        "algorithm": algorithm,
        "spec": plain,
        "layout": _record_layout(layout),
        "trainable_names": list(trainable_names),
    }


def _record_layout(layout: Layout) -> dict[str, Any]:
    return {
        "roles": {name: [r.trunk, r.adapter, r.head] for name, r in layout.roles.items()},
        "trunks": {name: [t.artefact, t.trained] for name, t in layout.trunks.items()},
        "trained_heads": sorted(layout.trained_heads),
        "loaded_adapters": sorted(layout.loaded_adapters),
    }


def layout_names(record: Mapping[str, Any]) -> list[str]:
    """Return the layouts of the table that a record's layout is, as far as its roles go; none for one's own."""
    roles = list(record["roles"])
    known = {name: layout for name, layout in LAYOUTS.items() if set(roles) <= set(layout.roles)}
    return [name for name, layout in known.items() if _record_layout(layout.restricted_to(roles)) == record]


def read_spec(plain: Mapping[str, Any]) -> BackboneSpec:
    """Return the spec of a record; fields that older versions did not write take their defaults."""
    lora = plain["lora"]
    return BackboneSpec(**{**plain, "lora": LoraArgs(**lora) if lora else None})


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint file written by this package, tensors mapped lazily, plain types only.

    Raises:
        CheckpointError: There is no such file, or it is not a readable checkpoint.
        ValueError: It is not one of this package's.
    """
    file = Path(path)
    if file.is_dir():
        raise ConfigError(
            f"checkpoint {file} is a folder of shards, as FSDP2 writes them; give the strategy "
            "save_distributed_checkpoint: false and resume for one more epoch (trainer.max_epochs), to get one file"
        )
    content = load_file(file, mmap=True)
    record = content.get(RECORD_KEY)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ConfigError(f"checkpoint {file} was not written by this version of lit_rlhf (no {RECORD_KEY!r} record)")
    return content


@dataclass
class StageCheckpoint:
    """A checkpoint of an earlier stage.

    Args:
        path: Its file.
        spec: Where the stage's own weights started.
        layout: The stage's layout.
        state: The trained tensors by their names in the LightningModule.
    """

    path: Path
    spec: BackboneSpec
    layout: Layout
    state: dict[str, Tensor]

    @classmethod
    def read(cls, path: str | Path) -> "StageCheckpoint":
        """Read a checkpoint file; see :func:`read_checkpoint` for the errors."""
        content = read_checkpoint(path)
        record = content[RECORD_KEY]
        saved = record["layout"]
        layout = Layout(
            roles={name: Role(*role) for name, role in saved["roles"].items()},
            trunks={name: Trunk(*trunk) for name, trunk in saved["trunks"].items()},
            trained_heads=frozenset(saved["trained_heads"]),
            loaded_adapters=frozenset(saved["loaded_adapters"]),
        )
        return cls(Path(path), read_spec(record["spec"]), layout, content["state_dict"])

    def fingerprint(self) -> str:
        """Return a hash of the trained tensors."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state.items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _role(self, role: str) -> Role:
        if role not in self.layout.roles:
            raise ConfigError(f"checkpoint {self.path} holds the roles {sorted(self.layout.roles)}, not {role!r}")
        return self.layout.roles[role]

    def lora_set(self, role: str) -> LoraSet | None:
        """Return the LoRA set that a role reads, None for LoRA off.

        Raises:
            ValueError: The checkpoint has no such role.
        """
        where = self._role(role)
        if where.adapter is None:
            return None
        if where.adapter in self.layout.loaded_adapters:
            parent = self.spec.parent("reward")
            return None if parent is None else parent.lora_set("reward")
        if self.spec.lora is None:
            return None
        prefix, suffix = f"backbone.trunks.{where.trunk}.", f".{where.adapter}.weight"
        tensors = {
            key.removeprefix(prefix).removesuffix(suffix) + ".weight": value
            for key, value in self.state.items()
            if key.startswith(prefix) and key.endswith(suffix)
        }
        return LoraSet(self.spec.lora.for_set(where.adapter), tensors)

    def role_model(self, role: str, dtype: DType | None = None, quantization: Quantization | None = None) -> RoleModel:
        """Return the language model that a role reads, found through the chain of stages.

        Args:
            role: Role name, such as ``actor`` or ``reward``.
            dtype: Dtype of the weights; None means the stage's own.
            quantization: Quantise the base model; None gives it plain, whatever the stage was trained on.
        """
        where = self._role(role)
        trunk = self.layout.trunks[where.trunk]
        spec = replace(self.spec, dtype=dtype or self.spec.dtype, quantization=None if trunk.trained else quantization)
        parent = starting_model(spec, trunk.artefact)
        if trunk.trained:
            model, prefix = parent.merged(), f"backbone.trunks.{where.trunk}."
            tensors = {k.removeprefix(prefix): v for k, v in self.state.items() if k.startswith(prefix)}
            unexpected = model.load_state_dict(tensors, strict=False).unexpected_keys
            if unexpected:
                raise ConfigError(f"checkpoint {self.path} does not fit {self.spec.model}: {unexpected[:3]} ...")
            return RoleModel(quantize(model, quantization) if quantization else model, [])
        lora_set = self.lora_set(role)
        return parent if lora_set is None else RoleModel(parent.base, [*parent.sets, lora_set])

    def head_state(self, head: HeadName) -> dict[str, Tensor] | None:
        """Return the tensors of a scalar head, from the nearest stage of the chain that trained one, or None."""
        prefix = f"backbone.heads.{head}."
        own = {k.removeprefix(prefix): v for k, v in self.state.items() if k.startswith(prefix)}
        if own:
            return own
        parent = self.spec.parent("reward")
        return None if parent is None else parent.head_state(head)


def starting_model(spec: BackboneSpec, artefact: ArtefactName) -> RoleModel:
    """Return the model that a trunk of this artefact starts from.

    Raises:
        ValueError: The checkpoint was trained from another base model than ``spec.model``.
    """
    stage = spec.parent(artefact)
    if stage is None:
        return RoleModel(load_language_model(spec.model, spec.dtype, spec.quantization), [])
    if stage.spec.model != spec.model:
        raise ConfigError(_other_model(stage, spec))
    role = "reward" if artefact == "reward" and "reward" in stage.layout.roles else "actor"
    return stage.role_model(role, spec.dtype, spec.quantization)


def fingerprint_parents(spec: BackboneSpec) -> dict[str, str]:
    """Return the fingerprints of the checkpoints that a stage starts from, by absolute path."""
    paths = {path for path in (spec.policy_checkpoint, spec.reward_checkpoint) if path}
    return {str(Path(path).resolve()): StageCheckpoint.read(path).fingerprint() for path in sorted(paths)}


def check_artefacts(spec: BackboneSpec, layout: Layout) -> None:
    """Refuse, before any model loads, what cannot be built.

    Raises:
        ValueError: A role needs an artefact that the checkpoints do not hold, ``lora.ranks`` names a set that is not
            trained, or the layout cannot be quantised.
        ImportError: Quantisation needs bitsandbytes.
    """
    if spec.lora is not None:
        spec.lora.check_sets(layout.trained_adapters)
    check_quantization(spec.quantization, layout, spec.lora)
    stages = {path: StageCheckpoint.read(path) for path in {spec.policy_checkpoint, spec.reward_checkpoint} if path}
    for stage in stages.values():
        if stage.spec.model != spec.model:
            raise ConfigError(_other_model(stage, spec))
    if spec.policy_checkpoint and "actor" not in stages[spec.policy_checkpoint].layout.roles:
        raise ConfigError(f"policy_checkpoint {spec.policy_checkpoint} holds no policy (no actor role)")
    if "reward" in layout.roles and "reward" not in layout.trained_heads:
        path = spec.checkpoint_of("reward")
        if path is None or stages[path].head_state("reward") is None:
            where = layout.roles["reward"]
            alone = where.adapter is None and layout.trunks[where.trunk].artefact == "policy"
            raise ConfigError(
                "the reward role needs a trained reward head: give policy_checkpoint a Hydra-SFT checkpoint"
                + (", " if alone else ", or reward_checkpoint a reward-model checkpoint, ")
                + "or set `reward` to a reward function instead"
            )
        _check_reward_trunk(spec, layout, stages[path])
    if layout.loaded_adapters:
        path = spec.reward_checkpoint
        if path is None or stages[path].lora_set("reward") is None:
            raise ConfigError(
                "this layout (of the table: pe) reads the reward model as a LoRA set: give reward_checkpoint a "
                "RewardModel that was trained with lora on the same policy_checkpoint, as in experiments/pe_rlhf"
            )
        theirs, ours = stages[path].spec.policy_checkpoint, spec.policy_checkpoint
        if theirs != (str(Path(ours).resolve()) if ours else None):
            raise ConfigError(f"reward_checkpoint was trained on policy checkpoint {theirs}, not on {ours}")


def _other_model(stage: StageCheckpoint, spec: BackboneSpec) -> str:
    return (
        f"checkpoint {stage.path} was trained from model {stage.spec.model!r}, but model is {spec.model!r}. Set "
        f"model.model to the checkpoint's (--model.model {stage.spec.model}), or choose another checkpoint"
    )


def _check_reward_trunk(spec: BackboneSpec, layout: Layout, stage: StageCheckpoint) -> None:
    """Refuse a reward head on a trunk it was not trained on: its scores would look right and mean nothing.

    Args:
        spec: Where weights start.
        layout: A layout with a reward role.
        stage: The checkpoint that the reward head comes from.
    """
    where, roles = layout.roles["reward"], stage.layout.roles
    fits = "reward" in roles
    if fits and where.adapter is None and layout.trunks[where.trunk].artefact == "policy":
        # The role reads what the policy starts from, so one stage must have trained both in one pass.
        passes = {(role.trunk, role.adapter) for name, role in roles.items() if name in ("actor", "reward")}
        paths = {Path(path).resolve() for path in (spec.policy_checkpoint, spec.checkpoint_of("reward")) if path}
        fits = spec.policy_checkpoint is not None and len(paths) == 1 and "actor" in roles and len(passes) == 1
    if not fits:
        raise ConfigError(
            f"the reward head of {stage.path} was trained on another trunk than the one this layout "
            "reads: give policy_checkpoint the Hydra-SFT checkpoint that holds both and leave reward_checkpoint "
            "out, or choose a layout with a reward trunk (full, lora, dynamic_lora)"
        )
