"""Where a backbone's weights come from, and the plain-data record by which later stages find them again."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lit_rlhf.backbone.adapters import LoraArgs
from lit_rlhf.backbone.loading import DType
from lit_rlhf.backbone.quantization import Quantization
from lit_rlhf.backbone.roles import LAYOUTS, ArtifactName, Layout, Role, Trunk
from lit_rlhf.checkpoints.records import FORMAT, shorten


@dataclass
class BackboneSpec:
    """Where a backbone's weights come from; plain data, saved in every checkpoint.

    Args:
        model: Base model name (see :func:`lit_rlhf.backbone.loading.resolve_source`).
        tokenizer: Tokenizer name; None means the model's.
        dtype: Dtype of the trunks. Adapters and scalar heads are always float32.
        lora: Settings of the trained adapters; None where trunks are fully trained.
        policy_checkpoint: Stage checkpoint (SFT, Hydra-SFT, an earlier PPO) the policy trunks start from.
        reward_checkpoint: Reward-model checkpoint; None means the policy checkpoint's own reward head.
        fingerprints: What these checkpoints held when the stage started from them, by absolute path.
        quantization: Keep the linear layers of the frozen trunks in 8 (``int8``) or 4 bits (``nf4``); needs
            bitsandbytes and a CUDA device. Adapters of earlier stages stay beside the trunk, frozen and exact, since
            merging them into coarsely rounded weights would lose them. Exports add all adapters to the plain weights.
    """

    model: str
    tokenizer: str | None = None
    dtype: DType = "float32"
    lora: LoraArgs | None = None
    policy_checkpoint: str | None = None
    reward_checkpoint: str | None = None
    fingerprints: dict[str, str] = field(default_factory=dict)
    quantization: Quantization | None = None

    def checkpoint_of(self, artifact: ArtifactName) -> str | None:
        """Return the checkpoint that trunks of this artifact start from; None is the base model."""
        if artifact == "reward" and self.reward_checkpoint is not None:
            return self.reward_checkpoint
        return self.policy_checkpoint

    @property
    def checkpoints(self) -> list[str]:
        """The checkpoints that the stage starts from: none, one or two."""
        return [path for path in dict.fromkeys((self.policy_checkpoint, self.reward_checkpoint)) if path]


def make_record(algorithm: str, spec: BackboneSpec, layout: Layout, trainable_names: list[str]) -> dict[str, Any]:
    """Return the plain-data record that a checkpoint carries under ``RECORD_KEY``."""
    plain = asdict(spec)
    for key in ("policy_checkpoint", "reward_checkpoint"):
        plain[key] = absolute(plain[key])
    return {
        "format": FORMAT,
        "algorithm": algorithm,
        "spec": plain,
        "layout": _plain_layout(layout),
        "trainable_names": list(trainable_names),
    }


def absolute(path: str | None) -> str | None:
    """Return a checkpoint's path as records state it."""
    return str(Path(path).resolve()) if path else None


def read_spec(plain: Mapping[str, Any]) -> BackboneSpec:
    """Return the spec of a record; fields that older versions did not write take their defaults."""
    lora = plain["lora"]
    return BackboneSpec(**{**plain, "lora": LoraArgs(**lora) if lora else None})


def complete_spec(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record's spec with the defaults of all fields that older versions did not write."""
    return asdict(read_spec(plain))


def _plain_layout(layout: Layout) -> dict[str, Any]:
    return {
        "roles": {name: [r.trunk, r.adapter, r.head] for name, r in layout.roles.items()},
        "trunks": {name: [t.artifact, t.trained] for name, t in layout.trunks.items()},
        "trained_heads": sorted(layout.trained_heads),
        "loaded_adapters": sorted(layout.loaded_adapters),
    }


def read_layout(plain: Mapping[str, Any]) -> Layout:
    """Return the layout of a record."""
    return Layout(
        roles={name: Role(*role) for name, role in plain["roles"].items()},
        trunks={name: Trunk(*trunk) for name, trunk in plain["trunks"].items()},
        trained_heads=frozenset(plain["trained_heads"]),
        loaded_adapters=frozenset(plain["loaded_adapters"]),
    )


def layout_names(plain: Mapping[str, Any]) -> list[str]:
    """Return the names of the layouts that equal a record's, as far as its roles go; none for a custom one."""
    roles = list(plain["roles"])
    known = {name: layout for name, layout in LAYOUTS.items() if set(roles) <= set(layout.roles)}
    return [name for name, layout in known.items() if _plain_layout(layout.restricted_to(roles)) == plain]


def describe_part(key: str, value: Any) -> str:
    """Return a part of a record for a message; layouts of the table by their names."""
    names = layout_names(value) if key == "layout" else []
    return shorten(key, " or ".join(names) or value)
