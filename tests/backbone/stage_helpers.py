"""Settings of small stages, and the outputs of their backbones."""

import torch

from lit_rlhf.backbone import LoraArgs

ROLES = ("actor", "critic", "reference", "reward")
SFT = {"actor": "lm"}
REWARD = {"reward": "reward"}
HYDRA = {"actor": "lm", "reward": "reward"}


def lora(r=4, **changes):
    return LoraArgs(r=r, alpha=2 * r, **changes)


def close(ours, expected):
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def read(backbone, roles, batch):
    return backbone(roles, *batch)


@torch.no_grad()
def logits(model, batch):
    """Of the first row, which has no padding."""
    return model(input_ids=batch.tokens[:1]).logits
