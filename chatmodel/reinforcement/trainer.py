"""What is ours in a step of TRL's GRPOTrainer? Sampling, the choice of rows, log-probabilities, and what is noted."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from chatmodel.conversations.render import render_prompt
from chatmodel.reinforcement.micro_batches import Batch, mask_choices, split_rows
from chatmodel.rollouts import Sampler
from chatmodel.runtime import logger

# Losses in which a completion counts the same whichever others share its micro-batch.
WHOLE_BATCH_LOSSES = frozenset({"dapo", "cispo", "vespo"})
ROUNDING = 1e-6  # what may be left of equal rewards less their mean
DRY_ROUNDS = 10  # rounds of completions without anything to learn, after which that is said
SHOWN_SAMPLES = 2  # completions kept of a round
SHOWN_ROUNDS = 8  # rounds of a run of which some are kept


class LearnFromCompletions:
    """Mixed into TRL's GRPOTrainer: samples by the decoding engine, and trains on what can be learnt from.

    In the default mode with a loss of `WHOLE_BATCH_LOSSES`, completions whose group earned the same reward throughout
    are left out: their advantage is 0, so they cost time and only water the mean down. The rest is sorted by length,
    so that little padding is computed. In mode "nanochat" micro-batches are the rows in their order, as there.

    Args:
        mode: "default" or "nanochat".
        sampler: draws the completions; None leaves them to TRL (vLLM).
    """

    _step: int
    _metrics: Any
    _buffered_inputs: Any
    reward_weights: torch.Tensor
    args: Any
    model: Any
    state: Any
    accelerator: Any
    processing_class: Any

    def __init__(self, *args: Any, mode: str, sampler: Sampler | None, **kwargs: Any) -> None:
        self.mode, self.sampler = mode, sampler
        self.dry_rounds = 0
        self.nothing_to_learn = False
        self._last_logps: torch.Tensor | None = None
        kwargs["rollout_func"] = sample_completions if sampler else None
        super().__init__(*args, **kwargs)

    def _log_number(self, name: str, value: float) -> None:
        self._metrics["train"][name].append(value)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """As TRL's, but for how rows are chosen and divided."""
        args, whole = self.args, self._is_whole_step()
        if not self.model.training or not (self.mode == "nanochat" or whole):
            return super()._prepare_inputs(generation_batch)  # type: ignore[misc]
        if self._step % (args.steps_per_generation * args.num_iterations) == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)  # type: ignore[attr-defined]
            rows = list(range(len(batch["advantages"]))) if self.mode == "nanochat" else self._choose_rows(batch)
            self._buffered_inputs = split_rows(batch, rows, args.steps_per_generation)
        return self._buffered_inputs[self._step % args.steps_per_generation]

    def _is_whole_step(self) -> bool:
        """Whether the weights' next step sees all completions of a round, each counting for itself."""
        args = self.args
        return (
            args.loss_type in WHOLE_BATCH_LOSSES
            and args.beta == 0
            and args.entropy_coef == 0
            and not args.use_adaptive_entropy
            and args.num_iterations == 1
            and args.steps_per_generation == args.gradient_accumulation_steps
        )

    def _choose_rows(self, batch: Batch) -> list[int]:
        """Rows with an advantage, the longest first, which are all that counts; one without if there is none."""
        useful = batch["advantages"].abs() > ROUNDING
        mask = batch["completion_mask"] * batch.get("tool_mask", 1) * useful[:, None]
        trained = self.accelerator.gather(mask.sum()).sum()
        batch["num_items_in_batch"] = trained
        self.nothing_to_learn = int(trained) == 0
        lengths = (batch["prompt_mask"].sum(1) + batch["completion_mask"].sum(1)).tolist()
        rows = sorted(useful.nonzero()[:, 0].tolist(), key=lambda row: -lengths[row])
        return rows or [min(range(len(lengths)), key=lambda row: lengths[row])]

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> torch.Tensor:
        """As TRL's; keeps some completions for the report, and says so once when nothing can be learnt."""
        began = time.perf_counter()
        rewards: torch.Tensor = super()._calculate_rewards(  # type: ignore[misc]
            inputs, prompts, completions, completion_ids_list
        )
        self._log_number("reward_seconds", time.perf_counter() - began)
        totals = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        self._notice_drought(totals)
        step = self.state.global_step
        every = max(1, self.state.max_steps // SHOWN_ROUNDS)
        if self._step % self.args.gradient_accumulation_steps == 0 and step % every == 0:
            samples = [
                {
                    "step": step + 1,
                    "prompt": prompts[row][-1]["content"],
                    "completion": self.processing_class.decode(completion_ids_list[row]),
                    "reward": float(totals[self.accelerator.process_index * len(prompts) + row]),
                }
                for row in range(min(SHOWN_SAMPLES, len(prompts)))
            ]
            # Kept in the Trainer's state, and so in its checkpoints.
            self.state.log_history.append({"step": step + 1, "samples": samples})
        return rewards

    def _notice_drought(self, totals: torch.Tensor) -> None:
        groups = totals.view(-1, self.args.num_generations)
        self.dry_rounds = self.dry_rounds + 1 if bool((groups == groups[:, :1]).all()) else 0
        if self.dry_rounds == DRY_ROUNDS:
            logger.warning(
                "in %d rounds every completion of a problem earned the same (%.2f on average): there is nothing to "
                "learn from; choose %s task, or sample hotter (temperature) and more (num_generations)",
                DRY_ROUNDS,
                float(totals.mean()),
                "a harder" if float(totals.mean()) > 0.5 else "an easier",
            )

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """As TRL's for text, (B, logits_to_keep) each, but with the padding on the right, where no mask is needed.

        So attention takes its fast path, and no row sees nothing, which some backward passes cannot bear.
        """
        parts = [torch.split(each, batch_size or len(each)) for each in (input_ids, attention_mask)]
        found = [
            self._score_rows(model, ids, mask, logits_to_keep, compute_entropy)
            for ids, mask in zip(*parts, strict=True)
        ]
        logps = torch.cat([each[0] for each in found])
        if model is not getattr(self, "ref_model", None):
            self._last_logps = logps.detach()
        return logps, torch.cat([each[1] for each in found]) if compute_entropy else None, None

    def _score_rows(
        self, model: Any, ids: torch.Tensor, mask: torch.Tensor, kept: int, entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        width = ids.shape[1]
        left = width - kept - mask[:, :-kept].sum(1, keepdim=True)  # padding before each prompt
        places = torch.arange(width, device=ids.device)[None]
        index = (places + left).clamp(max=width - 1)
        moved = ids.gather(1, index)
        scored = mask.gather(1, index).bool() & (places >= width - kept - left) & (places < width - left)
        labels = moved.masked_fill(~scored, -100)
        with self.accelerator.autocast():
            outputs = model(input_ids=moved, labels=labels, fused_lm_head=True)
        # The first completion token's place is that of the prompt's end; scores stand one before their token.
        back = places[:, :kept] + (width - kept - left) - 1
        logps = outputs.log_probs.gather(1, back)
        return logps, outputs.entropy.gather(1, back) if entropy else logps

    def _compute_loss(self, model: Any, inputs: Batch) -> torch.Tensor:
        """As TRL's; nothing for an empty micro-batch. Measures how far the engine's probabilities are from these."""
        if not inputs:
            return torch.zeros((), device=self.accelerator.device, requires_grad=True)
        loss: torch.Tensor = super()._compute_loss(model, inputs)  # type: ignore[misc]
        sampled = inputs.get("sampling_per_token_logps")
        if sampled is not None and self._last_logps is not None:
            mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
            gap = ((self._last_logps - sampled).abs() * mask).sum() / mask.sum().clamp(min=1)
            self._log_number("sampling_logp_difference", float(gap))
        return loss


def sample_completions(prompts: Sequence[Any], trainer: Any) -> dict[str, Any]:
    """TRL's rollout function: completions by `trainer.sampler`, and which of their tokens are trained."""
    sampler = trainer.sampler
    began, tokens = time.perf_counter(), sampler.tokens
    prompt_ids = [render_prompt(trainer.processing_class, prompt) for prompt in prompts]
    accumulation = trainer.args.gradient_accumulation_steps
    place = f"{trainer.accelerator.process_index} {trainer.state.global_step} {trainer._step % accumulation}"
    completions = sampler.sample(prompt_ids, place)
    seconds = time.perf_counter() - began
    trainer._log_number("rollout_seconds", seconds)
    trainer._log_number("rollout_tokens_per_second", (sampler.tokens - tokens) / max(seconds, 1e-9))
    table = trainer.model.config.calculator
    train_end = trainer.mode != "nanochat"
    scored = all(completion.logps for completion in completions)
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": [completion.ids for completion in completions],
        "logprobs": [completion.logps for completion in completions] if scored else None,
        "env_mask": [mask_choices(each.ids, table, sampler.ends, train_end=train_end) for each in completions],
    }


class SkipEmptySteps(TrainerCallback):  # type: ignore[misc]
    """Leaves the weights alone in a step with nothing to learn: momentum would move them by a full Muon step."""

    def __init__(self, is_empty: Callable[[], bool]) -> None:
        self.is_empty = is_empty

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer before each update."""
        if self.is_empty():
            for parameter in kwargs["model"].parameters():
                parameter.grad = None
