"""Engines of the PPO module: static cache, one of the user's own, and vLLM's interface."""

import importlib.machinery
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import count_e, make_ppo, make_trainer
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lit_rlhf import FunctionReward, LoraArgs, PromptData, ReMax
from lit_rlhf.rollout import Engine, Experience, Sampling, TransformersEngine, VLLMEngine, generate
from lit_rlhf.rollout.vllm_engine import active_lora

PAD, EOS = 0, list(range(900, 980))


class LoRARequest:
    def __init__(self, lora_name: str, lora_int_id: int, lora_path: str = "") -> None:
        assert lora_int_id > 0
        self.lora_name, self.lora_int_id, self.lora_path = lora_name, lora_int_id, lora_path


class SamplingParams:
    def __init__(
        self, n: int = 1, temperature: float = 1.0, top_p: float = 1.0, top_k: int = -1, seed: int | None = None,
        stop_token_ids: list[int] | None = None, max_tokens: int | None = 16, min_tokens: int = 0,
        detokenize: bool = True,
    ) -> None:  # fmt: skip
        assert temperature > 0 or n == 1
        assert top_k == -1 or top_k > 0
        self.__dict__.update(locals())


class LLM:
    """What vLLM's class of this name takes and returns, by transformers and PEFT on the files it is given."""

    made: list["LLM"]

    def __init__(
        self, model: str, *, skip_tokenizer_init: bool = False, dtype: str = "auto", seed: int | None = None,
        gpu_memory_utilization: float = 0.9, enforce_eager: bool = False, **kwargs: Any,
    ) -> None:  # fmt: skip
        assert skip_tokenizer_init
        assert kwargs == {"enable_lora": True, "max_loras": 1, "max_lora_rank": 8}
        self.folder, self.enforce_eager = model, enforce_eager
        self.requests: list[LoRARequest] = []
        LLM.made.append(self)

    def generate(
        self, prompts: Any, sampling_params: Any = None, *, use_tqdm: bool = True, lora_request: Any = None
    ) -> list[Any]:
        self.requests.append(lora_request)
        base = AutoModelForCausalLM.from_pretrained(self.folder)
        self.model = PeftModel.from_pretrained(base, lora_request.lora_path).eval()
        assert len(prompts) == len(sampling_params)
        return [self._answer(p["prompt_token_ids"], s) for p, s in zip(prompts, sampling_params, strict=True)]

    def _answer(self, ids: list[int], params: SamplingParams) -> Any:
        assert all(isinstance(i, int) for i in ids)
        assert params.detokenize is False
        with torch.random.fork_rng():
            torch.manual_seed(params.seed or 0)
            chances = {"do_sample": False}
            if params.temperature:
                top_k = max(params.top_k, 0)
                chances = {"do_sample": True, "temperature": params.temperature, "top_p": params.top_p, "top_k": top_k}
            done = self.model.generate(
                input_ids=torch.tensor([ids] * params.n), attention_mask=torch.ones(params.n, len(ids)).long(),
                max_new_tokens=params.max_tokens, min_new_tokens=params.min_tokens, pad_token_id=1023,
                eos_token_id=params.stop_token_ids, **chances,
            )  # fmt: skip
        outputs = []
        for index, row in enumerate(done[:, len(ids) :].tolist()):
            ends = [i for i, token in enumerate(row) if token in params.stop_token_ids]
            outputs.append(types.SimpleNamespace(index=index, token_ids=tuple(row[: ends[0] + 1] if ends else row)))
        return types.SimpleNamespace(outputs=outputs[::-1])


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> type[LLM]:
    LLM.made = []
    vllm, lora, request = (types.ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request"))
    for module in (vllm, lora, request):
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    vllm.LLM, vllm.SamplingParams, request.LoRARequest = LLM, SamplingParams, LoRARequest  # type: ignore[attr-defined]
    return LLM


def prompt_batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.tensor([[PAD, PAD, 40, 41], [50, 51, 52, 53], [PAD, 60, 61, 62]])
    return tokens, torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]], dtype=torch.bool)


def ready(**kwargs: Any) -> Any:
    module = make_ppo(**kwargs)
    module.configure_model()
    with torch.no_grad():
        for name, parameter in module.backbone.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return module


def test_vllm_reads_the_trunk_once_and_the_actors_adapter_every_time(fake_vllm: type[LLM]) -> None:
    module, engine = ready(layout="j_hydra"), VLLMEngine(options={"enforce_eager": True})
    settings = Sampling(max_new_tokens=9, min_new_tokens=2)
    for round_ in (1, 2):
        with module.backbone.use("actor") as model, torch.no_grad():
            ours = generate(model, *prompt_batch(), settings, PAD, EOS, samples=0, greedy=True)
            theirs = engine.generate(model, *prompt_batch(), settings, PAD, EOS, samples=0, greedy=True)
        assert torch.equal(ours.tokens, theirs.tokens)
        assert torch.equal(ours.mask, theirs.mask)
        assert torch.equal(ours.truncated, theirs.truncated)
        (llm,) = fake_vllm.made
        assert llm.enforce_eager
        assert [r.lora_int_id for r in llm.requests] == list(range(1, round_ + 1))
        with torch.no_grad():
            for name, parameter in module.backbone.named_parameters():
                if "lora_A.actor" in name:
                    parameter.neg_()
    assert [p.name for p in Path(llm.folder).parent.glob("actor_*")] == ["actor_2"]


def test_vllm_samples_stand_together_end_with_eos_and_follow_torchs_seed(fake_vllm: type[LLM]) -> None:
    module, engine = ready(), VLLMEngine()
    settings = Sampling(max_new_tokens=30)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with module.backbone.use("actor") as model:
            runs.append(engine.generate(model, *prompt_batch(), settings, PAD, EOS, samples=3, greedy=True))
    out = runs[0]
    assert torch.equal(out.tokens, runs[1].tokens)
    assert out.tokens.shape != runs[2].tokens.shape or not torch.equal(out.tokens, runs[2].tokens)
    assert torch.equal(out.tokens[:, :4], prompt_batch()[0].repeat_interleave(3, dim=0))
    assert len({tuple(row) for row in out.tokens.tolist()}) == 9
    assert out.greedy is not None
    assert out.greedy.tokens.shape == (3, out.tokens.shape[1])
    assert not out.truncated.all()
    for row in range(9):
        response, length = out.tokens[row, 4:].tolist(), int(out.mask[row].sum())
        assert out.truncated[row] or response[length - 1] in EOS
        assert not any(token in EOS for token in response[: length - 1])
        assert all(token == PAD for token in response[length:])


def test_a_remax_run_on_vllm_scores_its_log_probs(fake_vllm: type[LLM], prompts: PromptData, tmp_path: Path) -> None:
    module = make_ppo(ReMax, inner_epochs=1, engine=VLLMEngine())  # type: ignore[type-var]
    seen: list[Experience] = []
    sample = module.sample
    module.sample = lambda p: (seen.append(sample(p)), seen[-1])[1]  # type: ignore[method-assign]
    make_trainer(tmp_path, 2).fit(module, prompts)
    assert len(seen) == 2
    assert [r.lora_int_id for r in fake_vllm.made[0].requests] == [1, 1, 2, 2]
    for e in seen:
        with torch.no_grad():
            read = module.backbone(("reference",), e.tokens, e.attention_mask, e.mask)["reference"]
        torch.testing.assert_close(e.ref_log_probs, read)
        assert e.log_probs is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"layout": "full", "reward": FunctionReward(count_e)},
            "one plain adapter on a frozen trunk; this one uses none",
        ),
        ({"lora": LoraArgs(r=4, use_dora=True)}, "is DoRA"),
    ],
)
def test_vllm_refuses_actors_that_it_cannot_read(fake_vllm: type[LLM], settings: dict, message: str) -> None:
    module = make_ppo(**settings, engine=VLLMEngine())
    module.configure_model()
    with module.backbone.use("actor") as model, pytest.raises(ValueError, match=message):
        active_lora(model)


def test_vllm_refuses_what_it_does_not_do(fake_vllm: type[LLM]) -> None:
    module, engine = ready(), VLLMEngine()
    with module.backbone.use("actor") as model:
        arguments = (model, *prompt_batch(), Sampling(), PAD, EOS)
        with pytest.raises(ValueError, match="one process on one GPU"):
            engine.generate(*arguments, in_step=True)
        with pytest.raises(ValueError, match="keep_log_probs to false"):
            engine.generate(*arguments, keep_log_probs=True)
    with pytest.raises(ValueError, match="keep_log_probs: VLLMEngine returns no log-probs"):
        make_ppo(engine=engine, keep_log_probs=True).check_settings()


def test_without_vllm_the_error_says_so() -> None:
    with pytest.raises(ImportError, match="VLLMEngine needs vLLM: pip install vllm"):
        VLLMEngine()


def test_compile_wants_the_static_cache() -> None:
    with pytest.raises(ValueError, match=r"engine\.compile needs engine.cache: static"):
        TransformersEngine(compile=True)


class Parrot(Engine):
    """Repeats the prompt's last token."""

    def generate(
        self, model: Any, tokens: Any, attention_mask: Any, sampling: Any, *args: Any, **kw: Any
    ) -> Experience:
        from lit_rlhf.rollout.generation import as_experience

        responses = tokens[:, -1:].repeat(1, 3)
        return as_experience(tokens, attention_mask, responses, torch.tensor(args[1]))


def test_an_engine_of_ones_own_is_asked_and_its_log_probs_are_scored(prompts: PromptData, tmp_path: Path) -> None:
    module = make_ppo(engine=Parrot())
    seen: list[Experience] = []
    estimate = module.estimate
    module.estimate = lambda e: (seen.append(e), estimate(e))[1]  # type: ignore[method-assign]
    make_trainer(tmp_path, 1).fit(module, prompts)
    (e,) = seen
    assert (e.tokens[:, -3:] == e.tokens[:, -4:-3]).all()
    torch.testing.assert_close(e.log_probs, e.ref_log_probs)


def test_a_run_on_a_static_cache_repeats_the_run_on_a_dynamic_one(prompts: PromptData, tmp_path: Path) -> None:
    ends = []
    for cache in ("dynamic", "static"):
        module = make_ppo(engine=TransformersEngine(cache=cache))  # type: ignore[arg-type]
        make_trainer(tmp_path / cache, 2).fit(module, prompts)
        ends.append(module.state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], atol=1e-4, rtol=0)
