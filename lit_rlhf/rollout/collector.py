"""The collector: prompts in, experience out. Sample, score, check, estimate, measure, in this order."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_rlhf.errors import ConfigError
from lit_rlhf.functional import kl_estimate, masked_sum
from lit_rlhf.rollout.engines import Engine
from lit_rlhf.rollout.experience import Experience, PromptBatch, Sample
from lit_rlhf.rollout.length_groups import join, map_groups
from lit_rlhf.rollout.non_finite import check_rollout, explain_sampling
from lit_rlhf.rollout.phases import phase
from lit_rlhf.rollout.policy import Policy
from lit_rlhf.rollout.rewards import Reward, Scored
from lit_rlhf.rollout.sampling import Sampling
from lit_rlhf.strategies.ranks import fail_together, sum_over_ranks, trainer_of, world_size


@dataclass
class Collector:
    """Collects one iteration's experience with the current policy.

    Args:
        engine: What samples responses.
        sampling: How.
        reward: What scores them.
        batch_size: Responses sampled and scored at once.
        group_size: Score responses of similar length together, this many at once, without the padding they share; None
            scores them as they come.
        keep_log_probs: Take the old log-probs from sampling; None does so where both agree.
        sampling_agrees: Whether decoding and a forward pass over the response compute the same log-probs, as far as
            the model's dtype goes.
        trained_as_one: The rollout is a single minibatch in a single inner epoch.
        skip_non_finite: Skip a rollout that holds a number that is not finite, rather than raise.
    """

    engine: Engine
    sampling: Sampling
    reward: Reward
    batch_size: int
    group_size: int | None = None
    keep_log_probs: bool | None = None
    sampling_agrees: bool = False
    trained_as_one: bool = False
    skip_non_finite: bool = False

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that scoring a response needs."""
        return ("reward",) if self.reward.needs_reward_role else ()

    def problems(self) -> list[str]:
        """Return what is wrong with the settings, one line each."""
        found = self.sampling.problems()
        if self.batch_size < 1:
            found.append(f"rollout_batch_size must be positive, got {self.batch_size}")
        if self.keep_log_probs and not self.engine.gives_log_probs:
            found.append(
                f"keep_log_probs: {type(self.engine).__name__} returns no log-probs; remove it, or set it to false"
            )
        return found

    @torch.no_grad()
    def collect(self, policy: Policy, prompts: PromptBatch) -> tuple[Experience, list[Sample]]:
        """Collect one iteration's experience, and log its means under ``rollout/``.

        Args:
            policy: The module in training; its hooks ``sample``, ``score`` and ``estimate`` are called.
            prompts: A prompt batch: ``tokens`` [N, P] long, ``attention_mask`` [N, P] bool, ``prompts``, ``columns``.

        Returns:
            The experience, ready for the loss, and its samples as text.
        """
        with phase(policy, "generation"), fail_together(policy):
            experience = self._sample(policy, prompts)
        with phase(policy, "scoring"):
            with fail_together(policy):
                self._record_first_pass(policy, experience)
                scored = policy.score(experience, prompts)
            check_rollout(policy, experience, scored, self.skip_non_finite)
            if not experience.left_out:
                policy.reward_scaler.update(experience.scores, lambda tensor: sum_over_ranks(policy, tensor))
            policy.estimate(experience)
            _check_advantages(experience, type(policy).__name__)
        metrics = self.measure(policy, experience)
        policy.log_all("rollout", {**metrics, "kl_coef": policy.kl.value})
        if not experience.left_out:
            policy.kl.update(metrics["kl"], len(experience) * world_size(policy))
        experience.greedy = None  # type: ignore[assignment]
        texts = zip(scored.prompts, scored.responses, experience.scores.tolist(), strict=True)
        return experience, [{"prompt": p, "response": r, "score": s} for p, r, s in texts]

    def _sample(self, policy: Policy, prompts: PromptBatch) -> Experience:
        try:
            return _checked(policy.sample(prompts), type(policy).__name__, type(self.engine).__name__)
        except RuntimeError as error:
            if "probability tensor" not in str(error):  # our and torch's wording for logits that are not finite
                raise
            raise explain_sampling(policy, policy.backbone.named_parameters(prefix="backbone")) from error

    def generate(self, policy: Policy, prompts: PromptBatch, samples: int = 1, greedy: bool = False) -> Experience:
        """Sample responses with the current actor; see :meth:`lit_rlhf.rollout.Engine.generate`."""
        with policy.backbone.use("actor") as model:
            return self.engine.generate(
                model,
                prompts["tokens"],
                prompts["attention_mask"],
                self.sampling,
                policy.pad_id,
                policy.eos_ids,
                samples=samples,
                greedy=greedy,
                batch_size=self.batch_size,
                in_step=policy.backbone.in_step,
                keep_log_probs=self._keeps_log_probs(policy),
            )

    def _keeps_log_probs(self, policy: Policy) -> bool:
        if self.keep_log_probs is not None:
            return self.keep_log_probs
        trainer = trainer_of(policy)
        precision = "32-true" if trainer is None else str(trainer.precision)
        exact = torch.get_float32_matmul_precision() == "highest" and precision == "32-true"
        return self.engine.gives_log_probs and self.sampling_agrees and exact

    @torch.no_grad()
    def score(self, policy: Policy, experience: Experience, prompts: PromptBatch) -> Scored:
        """Fill log-probs and values (unless they are known), reference log-probs and scores.

        One forward pass per (trunk, adapter). Greedy responses get their scores only. Returns what was scored.
        """
        known = {"actor": hasattr(experience, "log_probs"), "critic": hasattr(experience, "values")}
        outputs = self._run_roles(
            policy, tuple(r for r in policy.backbone.layout.roles if not known.get(r)), experience
        )
        if "actor" in outputs:
            experience.log_probs = outputs["actor"]
        experience.ref_log_probs = outputs["reference"]
        if "critic" in outputs:
            experience.values = outputs["critic"]
        if hasattr(experience, "greedy"):
            greedy = experience.greedy
            rated = self._run_roles(policy, ("reward",), greedy) if self.reward.needs_reward_role else {}
            self._rate(policy, greedy, prompts, rated.get("reward"))
        return self._rate(policy, experience, prompts, outputs.get("reward"))

    def _record_first_pass(self, policy: Policy, experience: Experience) -> None:
        """Run the loss's first forward pass now, and keep it, where the loss uses the very batch that is scored."""
        policy.backbone.forget()
        roles = policy.loss_passes()[0]
        fields = {"actor": "log_probs", "critic": "values"}
        wanted = any(role in fields and not hasattr(experience, fields[role]) for role in roles)
        at_once = self.trained_as_one and self.batch_size >= len(experience)
        if not (wanted and at_once) or trainer_of(policy) is None:
            return
        outputs = policy.backbone.record(roles, *experience.inputs, **policy.pass_options())
        for role, output in outputs.items():
            if role in fields and not hasattr(experience, fields[role]):
                setattr(experience, fields[role], output)

    def _run_roles(self, policy: Policy, roles: tuple[str, ...], experience: Experience) -> dict[str, Tensor]:
        def run(part: Experience) -> dict[str, Tensor]:
            return policy.backbone(roles, *part.inputs)

        if self.group_size is not None:
            return map_groups(run, experience, self.group_size)
        return join([run(chunk) for chunk in experience.split(self.batch_size)])

    def _rate(self, policy: Policy, experience: Experience, prompts: PromptBatch, role_scores: Tensor | None) -> Scored:
        copies = len(experience) // len(prompts["prompts"])
        texts = [text for text in prompts["prompts"] for _ in range(copies)]
        columns = {name: [v for v in values for _ in range(copies)] for name, values in prompts["columns"].items()}
        scored = Scored(texts, experience.decode(policy.tokenizer), columns, role_scores)
        experience.scores = self.reward.score(scored).to(experience.tokens.device)
        return scored

    def measure(self, policy: Policy, experience: Experience) -> dict[str, float]:
        """Return the rollout's means over all ranks.

        ``kl`` is the sum over a response's tokens (k1), ``kl_penalty`` the same by the chosen estimator.
        """
        e = experience
        length = e.mask.sum(dim=1).float()
        columns = {
            "score": e.scores,
            "kl": masked_sum(kl_estimate(e.log_probs, e.ref_log_probs, e.mask, "k1"), e.mask, dim=1),
            "kl_penalty": masked_sum(policy.kl_penalty(e), e.mask, dim=1),
            "response_length": length,
            "truncated": e.truncated.float(),
            "entropy": -masked_sum(e.log_probs, e.mask, dim=1) / length.clamp_min(1.0),
        }
        if hasattr(e, "greedy"):
            columns["greedy_score"] = e.greedy.scores
        sums = [column.double().sum() for column in columns.values()]
        counts = [sums[0].new_tensor(len(column)) for column in columns.values()]
        totals, rows = sum_over_ranks(policy, torch.stack([torch.stack(sums), torch.stack(counts)])).tolist()
        return {name: total / n for name, total, n in zip(columns, totals, rows, strict=True)}

    @torch.no_grad()
    def evaluate(self, policy: Policy, prompts: PromptBatch, prefix: str) -> None:
        """Sample one response to each prompt and score it; log their means over all ranks under ``prefix/``."""
        with phase(policy, "evaluation"):
            experience = self.generate(policy, prompts)
            policy.score(experience, prompts)
        metrics = self.measure(policy, experience)
        policy.log_all(prefix, metrics, batch_size=len(experience), on_step=False, on_epoch=True)


def _checked(experience: object, module: str, engine: str) -> Experience:
    """Return what ``sample`` gave, if it is an experience."""
    if not isinstance(experience, Experience):
        raise ConfigError(
            f"{module}.sample (engine {engine}) must return an Experience, got {type(experience).__name__}"
        )
    return experience


def _check_advantages(experience: Experience, module: str) -> None:
    """Refuse advantages of another shape than ``[N, T]``; a loss of one's own may do without."""
    advantages, shape = getattr(experience, "advantages", None), tuple(experience.mask.shape)
    if isinstance(advantages, Tensor) and tuple(advantages.shape) != shape:
        raise ConfigError(
            f"{module}.estimate must fill advantages of shape [N, T] = {list(shape)}, one a token; got "
            f"{list(advantages.shape)}. Of one number a response make advantages[:, None] * experience.mask"
        )
