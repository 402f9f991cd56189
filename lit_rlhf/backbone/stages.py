"""Reading what an earlier stage wrote: the model that role R of checkpoint C reads.

A stage checkpoint holds only what was trained. The frozen rest is found again through the record that every
checkpoint carries: the base model's name and the checkpoints the stage itself started from.
"""

import hashlib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from lit_rlhf.backbone.adapters import LoraArgs
from lit_rlhf.backbone.loading import DType, load_language_model
from lit_rlhf.backbone.roles import ArtefactName, HeadName, Layout, Role, Trunk

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
    """

    model: str
    tokenizer: str | None = None
    dtype: DType = "float32"
    lora: LoraArgs | None = None
    policy_checkpoint: str | None = None
    reward_checkpoint: str | None = None
    fingerprints: dict[str, str] = field(default_factory=dict)

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
            raise ValueError(
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
        "layout": {
            "roles": {name: [r.trunk, r.adapter, r.head] for name, r in layout.roles.items()},
            "trunks": {name: [t.artefact, t.trained] for name, t in layout.trunks.items()},
            "trained_heads": sorted(layout.trained_heads),
            "loaded_adapters": sorted(layout.loaded_adapters),
        },
        "trainable_names": list(trainable_names),
    }


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint file written by this package, tensors mapped lazily, plain types only.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a readable checkpoint of this package.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"checkpoint {file} does not exist; give the .ckpt file that an earlier stage wrote")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(f"checkpoint {file} cannot be read ({type(error).__name__}: {error})") from error
    record = content.get(RECORD_KEY) if isinstance(content, dict) else None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"checkpoint {file} was not written by this version of lit_rlhf (no {RECORD_KEY!r} record)")
    return content


@dataclass
class LoraSet:
    """One LoRA set outside a model.

    Args:
        args: Its configuration.
        tensors: PEFT's names without the adapter's name (``base_model.model.….lora_A.weight``) to tensors.
    """

    args: LoraArgs
    tensors: dict[str, Tensor]

    @property
    def scaling(self) -> float:
        """The factor on ``B @ A``."""
        return self.args.alpha / (self.args.r**0.5 if self.args.use_rslora else self.args.r)


@dataclass
class RoleModel:
    """A base model and the LoRA sets stacked on it, in the order they were trained."""

    base: PreTrainedModel
    sets: list[LoraSet]

    def merged(self) -> PreTrainedModel:
        """Fold the sets into the base weights, once, and return it."""
        for lora_set in self.sets:
            attached = attach_lora(self.base, lora_set.args.to_peft(), lora_set.tensors)
            self.base = attached.merge_and_unload()
        self.sets = []
        return self.base

    def as_peft(self) -> PeftModel:
        """Return one PEFT model with one set, the exact sum of the stacked ones, active as ``default``.

        Raises:
            ValueError: There is no LoRA set (the role's trunk was trained in full).
        """
        if not self.sets:
            raise ValueError("this role has no LoRA set; export it with format 'merged'")
        summed = self.sets[0] if len(self.sets) == 1 else concatenate(self.sets)
        return attach_lora(self.base, summed.args.to_peft(), summed.tensors)


def attach_lora(model: PreTrainedModel, config: LoraConfig, tensors: dict[str, Tensor]) -> PeftModel:
    """Wrap a model with one LoRA set named ``default`` and load its tensors.

    Raises:
        ValueError: The tensors do not fit the model.
    """
    attached = get_peft_model(model, config)
    assert isinstance(attached, PeftModel)
    result: Any = set_peft_model_state_dict(attached, tensors)
    missing = [key for key in result.missing_keys if "lora_" in key]
    if result.unexpected_keys or missing:
        raise ValueError(f"LoRA set does not fit the model: {[*result.unexpected_keys, *missing][:3]} ...")
    return attached


def concatenate(sets: list[LoraSet]) -> LoraSet:
    """Return one set of the summed rank whose ``B @ A`` is the sum of the scaled updates of all.

    Sets that adapt different modules are padded with zeros.
    """
    rank = sum(s.args.r for s in sets)
    modules = {
        name.rsplit(".lora_A.weight", 1)[0] for s in sets for name in s.tensors if name.endswith("lora_A.weight")
    }
    tensors: dict[str, Tensor] = {}
    for module in sorted(modules):
        owner = next(s for s in sets if f"{module}.lora_A.weight" in s.tensors)
        columns, rows = (
            owner.tensors[f"{module}.lora_A.weight"].shape[1],
            owner.tensors[f"{module}.lora_B.weight"].shape[0],
        )
        a_parts, b_parts = [], []
        for s in sets:
            a = s.tensors.get(f"{module}.lora_A.weight")
            a_parts.append(torch.zeros(s.args.r, columns) if a is None else a.float())
            b_parts.append(
                torch.zeros(rows, s.args.r) if a is None else s.tensors[f"{module}.lora_B.weight"].float() * s.scaling
            )
        tensors[f"{module}.lora_A.weight"] = torch.cat(a_parts)
        tensors[f"{module}.lora_B.weight"] = torch.cat(b_parts, dim=1)
    targets = sorted({m.removeprefix("base_model.model.") for m in modules})
    return LoraSet(LoraArgs(r=rank, alpha=float(rank), target_modules=targets), tensors)


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
        plain = dict(record["spec"])
        lora = plain.pop("lora")
        saved = record["layout"]
        layout = Layout(
            roles={name: Role(*role) for name, role in saved["roles"].items()},
            trunks={name: Trunk(*trunk) for name, trunk in saved["trunks"].items()},
            trained_heads=frozenset(saved["trained_heads"]),
            loaded_adapters=frozenset(saved["loaded_adapters"]),
        )
        spec = BackboneSpec(lora=LoraArgs(**lora) if lora else None, **plain)
        return cls(Path(path), spec, layout, content["state_dict"])

    def fingerprint(self) -> str:
        """Return a hash of the trained tensors."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state.items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _role(self, role: str) -> Role:
        if role not in self.layout.roles:
            raise ValueError(f"checkpoint {self.path} holds the roles {sorted(self.layout.roles)}, not {role!r}")
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
        prefix, middle = f"backbone.trunks.{where.trunk}.", f".{where.adapter}.weight"
        tensors = {
            key.removeprefix(prefix).replace(middle, ".weight"): value
            for key, value in self.state.items()
            if key.startswith(prefix) and key.endswith(middle)
        }
        return LoraSet(self.spec.lora, tensors)

    def role_model(self, role: str, dtype: DType | None = None) -> RoleModel:
        """Return the language model that a role reads, found through the chain of stages.

        Args:
            role: Role name, such as ``actor`` or ``reward``.
            dtype: Dtype of the weights; None means the stage's own.
        """
        where = self._role(role)
        trunk = self.layout.trunks[where.trunk]
        dtype = dtype or self.spec.dtype
        parent = starting_model(replace(self.spec, dtype=dtype), trunk.artefact)
        if trunk.trained:
            model, prefix = parent.merged(), f"backbone.trunks.{where.trunk}."
            tensors = {k.removeprefix(prefix): v for k, v in self.state.items() if k.startswith(prefix)}
            unexpected = model.load_state_dict(tensors, strict=False).unexpected_keys
            if unexpected:
                raise ValueError(f"checkpoint {self.path} does not fit {self.spec.model}: {unexpected[:3]} ...")
            return RoleModel(model, [])
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
        return RoleModel(load_language_model(spec.model, spec.dtype), [])
    if stage.spec.model != spec.model:
        raise ValueError(
            f"checkpoint {stage.path} was trained from model {stage.spec.model!r}, but model is {spec.model!r}"
        )
    role = "reward" if artefact == "reward" and "reward" in stage.layout.roles else "actor"
    return stage.role_model(role, spec.dtype)


def fingerprint_parents(spec: BackboneSpec) -> dict[str, str]:
    """Return the fingerprints of the checkpoints that a stage starts from, by absolute path."""
    paths = {path for path in (spec.policy_checkpoint, spec.reward_checkpoint) if path}
    return {str(Path(path).resolve()): StageCheckpoint.read(path).fingerprint() for path in sorted(paths)}


def check_artefacts(spec: BackboneSpec, layout: Layout) -> None:
    """Raise ValueError where a role needs an artefact that the checkpoints do not hold; loads no model."""
    stages = {path: StageCheckpoint.read(path) for path in {spec.policy_checkpoint, spec.reward_checkpoint} if path}
    if spec.policy_checkpoint and "actor" not in stages[spec.policy_checkpoint].layout.roles:
        raise ValueError(f"policy_checkpoint {spec.policy_checkpoint} holds no policy (no actor role)")
    if "reward" in layout.roles and "reward" not in layout.trained_heads:
        path = spec.checkpoint_of("reward")
        if path is None or stages[path].head_state("reward") is None:
            raise ValueError(
                "the reward role needs a trained reward head: give policy_checkpoint a Hydra-SFT checkpoint "
                "or reward_checkpoint a reward-model checkpoint, or set `reward` to a reward function instead"
            )
        _check_reward_trunk(spec, layout, stages[path])
    if layout.loaded_adapters:
        path = spec.reward_checkpoint
        if path is None or stages[path].lora_set("reward") is None:
            raise ValueError("this layout reads the reward model as a LoRA set: give reward_checkpoint one with lora")
        theirs, ours = stages[path].spec.policy_checkpoint, spec.policy_checkpoint
        if theirs != (str(Path(ours).resolve()) if ours else None):
            raise ValueError(f"reward_checkpoint was trained on policy checkpoint {theirs}, not on {ours}")


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
        raise ValueError(
            f"the reward head of {stage.path} was trained on another trunk than the one this layout "
            "reads: give policy_checkpoint the Hydra-SFT checkpoint that holds both and leave reward_checkpoint "
            "out, or choose a layout with a reward trunk (full, lora, dynamic_lora)"
        )
