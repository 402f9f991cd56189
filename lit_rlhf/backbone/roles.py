"""Roles and layouts as data: which trunk, adapter and head each role uses.

A layout is one table entry. Algorithms name roles only, so that the same algorithm runs on every layout.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Literal, get_args

from lit_rlhf.errors import ConfigError
from lit_rlhf.renamed import renamed

HeadName = Literal["lm", "reward", "value"]
ArtifactName = Literal["policy", "reward"]

# Algorithms use these roles with these heads; other role names are free.
HEAD_OF_ROLE: dict[str, HeadName] = {"actor": "lm", "reference": "lm", "critic": "value", "reward": "reward"}
# The adapter that holds what earlier stages trained, where it cannot be merged into a quantized trunk.
START_ADAPTER = "start"


@dataclass(frozen=True)
class Role:
    """What one role uses.

    Args:
        trunk: Name of the trunk (a whole transformer).
        adapter: Name of the adapter that is switched on, or None for the trunk alone.
        head: ``lm`` (the trunk's own output embedding), ``reward`` or ``value`` (scalar, float32).
    """

    trunk: str
    adapter: str | None
    head: HeadName


@renamed(artefact="artifact")
@dataclass(frozen=True)
class Trunk:
    """Where a trunk's weights start, and whether they are trained.

    Args:
        artifact: ``policy`` starts from the policy checkpoint, ``reward`` from the reward checkpoint
            (or from the policy checkpoint where no reward checkpoint is given).
        trained: True for full fine-tuning; adapters need a frozen trunk.
    """

    artifact: ArtifactName = "policy"
    trained: bool = False


@dataclass(frozen=True)
class Layout:
    """Roles, the trunks they use, and the heads that are trained.

    Args:
        roles: Role name to :class:`Role`. ``actor`` and ``reference`` use the head ``lm``, ``critic`` uses ``value``,
            ``reward`` uses ``reward``; other role names are free.
        trunks: Trunk name to :class:`Trunk`; exactly those the roles use.
        trained_heads: Scalar heads that receive gradients.
        loaded_adapters: Adapters that are not trained here but loaded, frozen, from the reward checkpoint.

    Raises:
        ValueError: The parts contradict each other; everything wrong is listed.
    """

    roles: Mapping[str, Role]
    trunks: Mapping[str, Trunk]
    trained_heads: frozenset[str] = field(default_factory=lambda: frozenset({"value"}))
    loaded_adapters: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        problems = _shape_problems(self) or _meaning_problems(self)
        if problems:
            raise ConfigError("\n".join(f"layout: {problem}" for problem in problems))

    @property
    def trained_adapters(self) -> list[str]:
        """The adapters that are trained, in the order of the roles."""
        names = [r.adapter for r in self.roles.values() if r.adapter is not None]
        return [name for name in dict.fromkeys(names) if name not in self.loaded_adapters]

    @property
    def trains_lora(self) -> bool:
        """Whether some adapter is trained, so that the stage needs LoRA settings."""
        return bool(self.trained_adapters)

    @property
    def trained_trunks(self) -> list[str]:
        """The trunks that are trained as a whole."""
        return [name for name, trunk in self.trunks.items() if trunk.trained]

    def restricted_to(self, roles: Collection[str]) -> "Layout":
        """Return the layout with only these roles, and only the trunks they use.

        Raises:
            KeyError: A role is not in this layout.
        """
        if missing := [name for name in roles if name not in self.roles]:
            raise KeyError(f"the layout has the roles {sorted(self.roles)}, not {', '.join(map(repr, missing))}")
        kept = {name: self.roles[name] for name in roles}
        used = {role.trunk for role in kept.values()}
        heads = {role.head for role in kept.values()}
        adapters = {role.adapter for role in kept.values()}
        return Layout(
            roles=kept,
            trunks={name: trunk for name, trunk in self.trunks.items() if name in used},
            trained_heads=frozenset(self.trained_heads & heads),
            loaded_adapters=frozenset(self.loaded_adapters & adapters),
        )

    def adapters(self, trunk: str) -> list[str]:
        """Return the adapters on a trunk, in the order of the roles."""
        names = [role.adapter for role in self.roles.values() if role.trunk == trunk and role.adapter is not None]
        return list(dict.fromkeys(names))


def _shape_problems(layout: Layout) -> list[str]:
    """Return what is wrong with the parts themselves: kinds, names, missing references."""
    roles, trunks = layout.roles, layout.trunks
    found = [f"role {n!r} must be a Role, got {type(r).__name__}" for n, r in roles.items() if not isinstance(r, Role)]
    found += [
        f"trunk {n!r} must be a Trunk, got {type(t).__name__}" for n, t in trunks.items() if not isinstance(t, Trunk)
    ]
    if found:
        return found
    if not roles:
        found.append("it has no roles")
    used = {role.trunk for role in roles.values()}
    if used != set(trunks):
        found.append(f"roles use the trunks {sorted(used)}, but trunks lists {sorted(trunks)}")
    adapters = {role.adapter for role in roles.values() if role.adapter is not None}
    for kind, names in (("trunk", sorted(used)), ("adapter", sorted(adapters))):
        for name in names:
            # They become parts of parameter names.
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) or name.startswith("lora_"):
                found.append(f"{kind} name {name!r} must be letters, digits and '_', and not begin with 'lora_'")
    if START_ADAPTER in adapters:
        found.append(
            f"an adapter cannot be called {START_ADAPTER!r}: quantized trunks keep earlier stages under that name"
        )
    for name, role in roles.items():
        if role.head not in get_args(HeadName):
            found.append(f"role {name!r} has head {role.head!r}; heads are {', '.join(get_args(HeadName))}")
        elif role.head != HEAD_OF_ROLE.get(name, role.head):
            found.append(f"role {name!r} must have head {HEAD_OF_ROLE[name]!r}, not {role.head!r}")
    for name, trunk in trunks.items():
        if trunk.artifact not in get_args(ArtifactName):
            found.append(f"trunk {name!r} starts from {trunk.artifact!r}; artifacts are policy, reward")
    if unknown := sorted(layout.trained_heads - {"reward", "value"}):
        found.append(f"trained_heads lists {unknown}; only the scalar heads reward and value can be listed")
    if unread := sorted(layout.loaded_adapters - adapters):
        found.append(f"loaded_adapters lists {unread}, which no role uses")
    return found


def _meaning_problems(layout: Layout) -> list[str]:
    """Return what is wrong with a well-formed layout: it would train something other than it says."""
    found = []
    for name, role in layout.roles.items():
        trained_trunk = layout.trunks[role.trunk].trained
        if role.adapter is not None and trained_trunk:
            found.append(f"role {name!r} puts adapter {role.adapter!r} on a trained trunk")
        moves = trained_trunk or role.adapter in layout.trained_adapters
        if moves and name == "reference":
            found.append("role 'reference' uses weights that are trained: the KL penalty would chase its own policy")
        if moves and name == "reward" and "reward" not in layout.trained_heads:
            found.append("role 'reward' uses a fixed head on weights that are trained: its scores would drift")
        if role.adapter in layout.loaded_adapters and layout.trunks[role.trunk].artifact != "policy":
            found.append(
                f"role {name!r} uses the reward model's adapter {role.adapter!r} on trunk {role.trunk!r}, which "
                "starts from the reward model and holds it already; that trunk must start from policy"
            )
    return found


# The layouts of Santacroce et al. 2023 (arXiv:2309.00754), and PE-RLHF's (``pe``, arXiv:2403.10704).
LAYOUTS: dict[str, Layout] = {
    "full": Layout(
        roles={
            "actor": Role("actor", None, "lm"),
            "critic": Role("critic", None, "value"),
            "reference": Role("reference", None, "lm"),
            "reward": Role("reward", None, "reward"),
        },
        trunks={
            "actor": Trunk("policy", trained=True),
            "critic": Trunk("reward", trained=True),
            "reference": Trunk("policy"),
            "reward": Trunk("reward"),
        },
    ),
    "lora": Layout(
        roles={
            "actor": Role("sft", "actor", "lm"),
            "critic": Role("reward_model", "critic", "value"),
            "reference": Role("reference", None, "lm"),
            "reward": Role("reward", None, "reward"),
        },
        trunks={
            "sft": Trunk("policy"),
            "reward_model": Trunk("reward"),
            "reference": Trunk("policy"),
            "reward": Trunk("reward"),
        },
    ),
    "dynamic_lora": Layout(
        roles={
            "actor": Role("sft", "actor", "lm"),
            "critic": Role("reward_model", "critic", "value"),
            "reference": Role("sft", None, "lm"),
            "reward": Role("reward_model", None, "reward"),
        },
        trunks={"sft": Trunk("policy"), "reward_model": Trunk("reward")},
    ),
    "pe": Layout(
        roles={
            "actor": Role("sft", "actor", "lm"),
            "critic": Role("sft", "critic", "value"),
            "reference": Role("sft", None, "lm"),
            "reward": Role("sft", "reward", "reward"),
        },
        trunks={"sft": Trunk("policy")},
        loaded_adapters=frozenset({"reward"}),
    ),
    "j_hydra": Layout(
        roles={
            "actor": Role("hydra", "shared", "lm"),
            "critic": Role("hydra", "shared", "value"),
            "reference": Role("hydra", None, "lm"),
            "reward": Role("hydra", None, "reward"),
        },
        trunks={"hydra": Trunk("policy")},
    ),
    "hydra": Layout(
        roles={
            "actor": Role("hydra", "actor", "lm"),
            "critic": Role("hydra", "critic", "value"),
            "reference": Role("hydra", None, "lm"),
            "reward": Role("hydra", None, "reward"),
        },
        trunks={"hydra": Trunk("policy")},
    ),
}


def supervised_layout(heads: Mapping[str, HeadName], lora: bool) -> Layout:
    """Return the layout of a supervised stage: one trunk that every role uses in one pass.

    Args:
        heads: Role name to head, such as ``{"actor": "lm", "reward": "reward"}`` for Hydra-SFT.
        lora: True trains one adapter on a frozen trunk, False trains the trunk itself.
    """
    adapter = "sft" if lora else None
    return Layout(
        roles={role: Role("trunk", adapter, head) for role, head in heads.items()},
        trunks={"trunk": Trunk("policy", trained=not lora)},
        trained_heads=frozenset({head for head in heads.values() if head != "lm"}),
    )


def find_layout(name: str) -> Layout:
    """Return a layout of the table, or one of your own by its import path.

    Args:
        name: ``full``, ``lora``, ``dynamic_lora``, ``pe``, ``j_hydra`` or ``hydra``, or the import path of a
            :class:`Layout`, such as ``my_layouts.SPLIT`` (the command line finds modules in the working directory).

    Raises:
        ValueError: There is no such layout, module or attribute, or the attribute is not a layout.
    """
    if name in LAYOUTS:
        return LAYOUTS[name]
    path, _, attribute = name.rpartition(".")
    if not path or not attribute:
        raise ConfigError(
            f"layout must be one of {', '.join(LAYOUTS)}, or the import path of your own, such as "
            f"my_layouts.SPLIT; got {name!r}"
        )
    try:
        module = import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise  # the module exists; something that it imports does not
        raise ConfigError(f"layout {name!r}: no module named {error.name!r} (searched sys.path)") from error
    if not hasattr(module, attribute):
        own = sorted(key for key, value in vars(module).items() if isinstance(value, Layout))
        raise ConfigError(f"layout {name!r}: module {path} has no {attribute!r}; its layouts are {own}")
    layout = getattr(module, attribute)
    if not isinstance(layout, Layout):
        raise ConfigError(f"layout {name!r} must be a Layout, got {type(layout).__name__}")
    return layout
