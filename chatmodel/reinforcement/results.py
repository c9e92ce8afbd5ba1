"""What is kept of a run of reinforcement learning?"""

from collections.abc import Sequence
from typing import Any

from chatmodel.devices import peak_memory_bytes
from chatmodel.posttraining import pick_history
from chatmodel.problems import compare_pass
from chatmodel.runtime import logger

HISTORY = (
    *("reward", "reward_std", "completions/mean_length", "completions/clipped_ratio", "frac_reward_zero_std"),
    *("entropy", "kl", "loss", "sampling_logp_difference"),
    *("rollout_tokens_per_second", "rollout_seconds", "reward_seconds", "step_time"),
)
KEPT = ("correct", "n", "accuracy", "stderr", "decisions")


def collect_metrics(trainer: Any, problems: Any, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """A finished Trainer's history, rates and completions, with what `measure_pass` found before and after."""
    history = pick_history(trainer.state.log_history, *HISTORY)
    names = trainer.reward_func_names
    if len(names) > 1:
        logged = [entry for entry in trainer.state.log_history if HISTORY[0] in entry]
        for record, entry in zip(history, logged, strict=True):
            record |= {f"rewards/{name}": entry[f"rewards/{name}/mean"] for name in names}
    seconds = sum(entry.get("rollout_seconds", 0.0) for entry in history)
    tokens = sum(entry.get("rollout_seconds", 0.0) * entry.get("rollout_tokens_per_second", 0.0) for entry in history)
    change = compare_pass(before, after)
    for name, moved in change.items():
        logger.info("%s: %+.4f ± %.4f (paired)", name, moved["difference"], moved["stderr"])
    return {
        "task": " + ".join(dict.fromkeys(problems["task"])),
        "mode": trainer.mode,
        "steps": trainer.state.global_step,
        "problems": len(problems),
        "num_generations": trainer.args.num_generations,
        "rewards": dict(zip(names, trainer.args.reward_weights or [1.0] * len(names), strict=True)),
        "history": history,
        "pass_at_1": {when: {key: each[key] for key in KEPT} for when, each in _both(before, after)},
        "sampled": {when: each.get("sampled") for when, each in _both(before, after)},
        "change": change,
        "completions": after["completions"],
        "completions_before": before["completions"],
        "completions_sampled": collect_samples(trainer.state.log_history),
        "lr_fraction": trainer.lr_fraction,
        "rollout_tokens_per_second": tokens / max(seconds, 1e-9),
        "rollout_seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(trainer.args.device),
    }


def _both(before: dict[str, Any], after: dict[str, Any]) -> tuple[tuple[str, dict[str, Any]], ...]:
    return ("before", before), ("after", after)


def collect_samples(log: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The completions that a run kept on its way."""
    return [sample for entry in log for sample in entry.get("samples", ())]
