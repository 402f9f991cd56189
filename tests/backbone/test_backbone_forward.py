"""What a role computes equals the plain Hugging Face model, row by row, without padding."""

import copy

import pytest
import torch
from transformers import LlamaForCausalLM

from lit_rlhf.backbone import LoraArgs, Role
from lit_rlhf.backbone.language_head import LogitTransform, read_logit_transform

FAMILIES = [
    "llama", "opt", "opt_projected", "gpt2", "gpt_neox", "qwen2", "qwen3", "bloom", "falcon",
    "gemma2", "granite", "cohere",
]  # fmt: skip
ROLES = ("actor", "critic", "reference", "reward")


def score(head, hidden):
    return (hidden.double() @ head.weight.double().T + head.bias.double()).squeeze(-1)


def close(ours, expected, tolerance=2e-5):
    torch.testing.assert_close(ours.double(), expected.double(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_role_equals_the_plain_model_without_padding(
    family, make_model, make_backbone, merged_by_hand, read_by_hand, padded, batch
):
    plain = make_model(family)
    backbone = make_backbone("hydra", model=plain)
    with torch.no_grad():
        read = backbone(ROLES, *batch)

    heads = backbone.heads
    log_probs, _, _ = read_by_hand(merged_by_hand(plain, backbone, "hydra", "actor"), batch)
    close(read["actor"], padded(log_probs, batch.mask))
    log_probs, _, last = read_by_hand(merged_by_hand(plain, backbone, "hydra", None), batch)
    close(read["reference"], padded(log_probs, batch.mask))
    close(read["reward"], score(heads["reward"], torch.stack(last)))
    _, before, _ = read_by_hand(merged_by_hand(plain, backbone, "hydra", "critic"), batch)
    close(read["critic"], padded([score(heads["value"], hidden) for hidden in before], batch.mask))
    # The sets differ from the trunk and from one another, so the comparison above can fail.
    assert (read["actor"] - read["reference"]).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_content_changes_nothing(family, make_backbone, batch):
    backbone = make_backbone("hydra", family)
    other = copy.deepcopy(batch)
    junk = torch.randint(0, 128, batch.tokens.shape, generator=torch.Generator().manual_seed(3))
    other.tokens = torch.where(batch.attention_mask, batch.tokens, junk)
    assert not torch.equal(other.tokens, batch.tokens)
    with torch.no_grad():
        ours, theirs = backbone(ROLES, *batch), backbone(ROLES, *other)
    for role in ROLES:
        torch.testing.assert_close(ours[role], theirs[role], atol=1e-6, rtol=1e-6)


def test_more_padding_changes_nothing(make_backbone, batch):
    """GPT-2 has absolute positions: without position_ids this differs by whole nats."""
    backbone = make_backbone("hydra", "gpt2")
    wide = copy.deepcopy(batch)
    wide.tokens = torch.nn.functional.pad(batch.tokens, (5, 3), value=2)
    wide.attention_mask = torch.nn.functional.pad(batch.attention_mask, (5, 3))
    wide.mask = torch.nn.functional.pad(batch.mask, (0, 3))
    with torch.no_grad():
        ours, theirs = backbone(ROLES, *batch), backbone(ROLES, *wide)
    for role in ("actor", "critic", "reference"):
        close(theirs[role][:, :5], ours[role])
        assert theirs[role][:, 5:].eq(0).all()
    close(theirs["reward"], ours["reward"])


def test_positions_outside_the_response_are_exactly_zero(make_backbone, batch):
    read = make_backbone("hydra")(ROLES, *batch)
    for role in ("actor", "critic", "reference"):
        assert read[role][~batch.mask].eq(0).all(), role
        assert read[role][batch.mask].ne(0).all(), role


def test_reward_is_read_at_the_first_eos_even_where_eos_pads(
    make_backbone, batch, read_by_hand, merged_by_hand, make_model
):
    """Reading at ``ids != pad`` would take the token before EOS: another number."""
    plain = make_model()
    backbone = make_backbone("hydra", model=plain)
    ours = backbone(("reward",), *batch)["reward"]
    _, before, last = read_by_hand(merged_by_hand(plain, backbone, "hydra", None), batch)
    ended = [1, 2, 3]  # rows whose response is padded; their last real token is EOS
    off_by_one = score(backbone.heads["reward"], torch.stack([rows[-1] for rows in before]))
    close(ours, score(backbone.heads["reward"], torch.stack(last)))
    assert (ours - off_by_one)[ended].abs().min() > 1e-3


def test_lm_mask_chooses_the_positions_of_log_probs_only(make_backbone, batch):
    backbone = make_backbone("hydra")
    lm_mask = batch.mask & torch.tensor([True, False, True, False]).unsqueeze(1)
    everything, some = backbone(ROLES, *batch), backbone(ROLES, *batch, lm_mask=lm_mask)
    torch.testing.assert_close(some["actor"], everything["actor"] * lm_mask)
    assert torch.equal(some["reward"], everything["reward"])
    assert torch.equal(some["critic"], everything["critic"])
    nothing = backbone(("actor",), *batch, lm_mask=torch.zeros_like(batch.mask))["actor"]
    assert nothing.eq(0).all()


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_temperature_and_entropy_are_those_of_the_sampled_policy(
    family, make_model, make_backbone, merged_by_hand, read_by_hand, padded, batch
):
    plain = make_model(family)
    backbone = make_backbone("hydra", model=plain, temperature=0.6)
    with torch.no_grad():
        read = backbone(("actor",), *batch, entropy=True)
    merged = merged_by_hand(plain, backbone, "hydra", "actor")
    log_probs, _, _ = read_by_hand(merged, batch, temperature=0.6)
    close(read["actor"], padded(log_probs, batch.mask), 5e-5)
    entropies = []
    with torch.no_grad():
        for _, tokens, n in batch.rows():
            logits = merged(input_ids=tokens).logits[0, -n - 1 : -1] / 0.6
            entropies.append(torch.distributions.Categorical(logits=logits).entropy())
    close(read["entropy"], padded(entropies, batch.mask), 5e-5)


def test_no_entropy_unless_asked(make_backbone, batch):
    assert set(make_backbone("hydra")(("actor",), *batch)) == {"actor"}


def test_unknown_role_names_the_known_ones(make_backbone, batch):
    backbone = make_backbone("hydra", roles=["actor", "reference"])
    with pytest.raises(KeyError, match=r"\['actor', 'reference'\], not 'critic'"):
        backbone(("critic",), *batch)
    with pytest.raises(KeyError, match="critic"), backbone.use("critic"):
        pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trunk_keeps_lora_heads_and_outputs_in_float32(dtype, make_model, make_backbone, batch):
    plain = make_model(dtype=dtype)
    backbone = make_backbone("hydra", model=plain)
    trained = set(backbone.trainable_names)
    for name, parameter in backbone.named_parameters():
        small = name in trained or name.startswith("heads.")
        assert parameter.dtype == (torch.float32 if small else dtype), name
    read = backbone(ROLES, *batch, entropy=True)
    assert {value.dtype for value in read.values()} == {torch.float32}
    # Log-probs that went through half precision at the end would all be representable in it.
    real = read["actor"][batch.mask]
    assert not torch.equal(real.to(dtype).float(), real)
    sum(value.sum() for value in read.values()).backward()
    grads = {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}
    assert {g.dtype for g in grads.values()} == {torch.float32}
    assert all(g.isfinite().all() for g in grads.values())


def test_bfloat16_trunk_is_near_the_float32_one(make_model, make_backbone, batch):
    rough = make_backbone("hydra", model=make_model(dtype=torch.bfloat16))(ROLES, *batch)
    exact = make_backbone("hydra", model=make_model())(ROLES, *batch)
    for role in ROLES:
        assert (rough[role] - exact[role]).abs().max() < 0.3, role


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", LogitTransform()),
        ("gemma2", LogitTransform(softcap=3.0)),
        ("granite", LogitTransform(scale=4.0)),
        ("cohere", LogitTransform(scale=0.25)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logit_transform_is_read_from_the_config(family, expected, dtype, make_model):
    assert read_logit_transform(make_model(family, dtype)) == expected


class Doubled(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output


class Shifted(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + torch.arange(output.logits.shape[-1]) * 0.05
        return output


@pytest.mark.parametrize("kind", [Doubled, Shifted])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unexplained_logits_are_refused(kind, dtype, make_model, make_backbone):
    model = kind(make_model().config).to(dtype)
    with pytest.raises(ValueError, match=f"{kind.__name__} changes its logits"):
        make_backbone("hydra", model=model)


def test_a_config_that_promises_a_scale_its_model_ignores_is_refused(make_model, make_backbone):
    model = make_model("llama", logit_scale=0.5)
    with pytest.raises(ValueError, match=r"scale=0\.5"):
        make_backbone("hydra", model=model)


def test_model_in_train_mode_is_read_without_dropout(make_model, make_backbone, batch):
    """``from_config`` gives models in train mode; GPT-2's dropout would make the logit probe fail."""
    expected = make_backbone("hydra", model=make_model("gpt2"))(ROLES, *batch)
    read = make_backbone("hydra", model=make_model("gpt2").train())(ROLES, *batch)
    for role in ROLES:
        assert torch.equal(read[role], expected[role])


def test_lora_on_the_output_embedding_is_refused(make_backbone):
    """Log-probs read the embedding's plain weight: generation and scoring would silently disagree."""
    with pytest.raises(ValueError, match="output embedding"):
        make_backbone("hydra", lora=LoraArgs(r=2, target_modules=["q_proj", "lm_head"]))


def test_heads_are_as_wide_as_the_last_hidden_state(make_backbone):
    backbone = make_backbone("hydra", "opt_projected")
    assert backbone.heads["value"].in_features == backbone.heads["reward"].in_features == 16


def test_roles_are_plain_data():
    assert Role("hydra", None, "lm") == Role("hydra", None, "lm")
