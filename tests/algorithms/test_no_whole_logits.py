"""No phase of an iteration ever holds the logits of whole sequences: allocations are tracked, not argued about."""

from pathlib import Path
from typing import Any

import pytest
from helpers import OPENINGS, make_ppo, make_trainer, write_jsonl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lit_rlhf import GRPO, PPO, OnPolicyModule, PromptData, ReMax, Sampling

ROWS, RESPONSES = 32, 16


class LargestWithVocabulary(TorchDispatchMode):
    """Keeps the largest storage among the results whose last axis is the vocabulary, weights left out."""

    def __init__(self, vocabulary: int, known: set[int]) -> None:
        super().__init__()
        self.vocabulary, self.known = vocabulary, known
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.dim() and tensor.shape[-1] == self.vocabulary:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.rows = max(self.rows, storage.nbytes() // 4 // self.vocabulary)
        return result


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(("kind", "settings"), [(PPO, {}), (PPO, {"entropy_coef": 0.01}), (ReMax, {}), (GRPO, {})])
def test_logits_exist_for_a_chunk_of_tokens_at_a_time(
    kind: type[OnPolicyModule], settings: dict[str, Any], keep: bool, hydra_checkpoint: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"{opening} number {i}"} for i in range(3) for opening in OPENINGS]
    data = PromptData(train=write_jsonl(tmp_path / "prompts.jsonl", rows), validation_size=0)
    module: Any = make_ppo(
        kind, policy_checkpoint=str(hydra_checkpoint), rollout_size=ROWS, minibatch_size=ROWS, inner_epochs=1,
        samples_per_prompt=4 if kind is GRPO else 1, keep_log_probs=keep,
        sampling=Sampling(max_new_tokens=RESPONSES, min_new_tokens=RESPONSES), **settings,
    )  # fmt: skip
    module.configure_model()
    weights = {p.untyped_storage().data_ptr() for p in module.backbone.parameters()}
    vocabulary = module.backbone.language_model("hydra").get_output_embeddings().weight.shape[0]
    with LargestWithVocabulary(vocabulary, weights) as largest:
        make_trainer(tmp_path, 1).fit(module, data)
    # A decoding step is [rows, V] (with ReMax's greedy rows, twice as many), a chunk of the log-prob step [128, V]; the
    # responses alone would be [ROWS * RESPONSES, V].
    assert ROWS <= largest.rows <= 128 < ROWS * RESPONSES
