"""How far above chance is a score, and how much of it could be noise?

Noise here is the draw of the examples: another set of questions of the same kind would give another score. Standard
errors are the bootstrap's over examples, in closed form where there is one; `resample_sum` draws it for intervals.
What another training seed would change is a second kind of noise, see `combine_seeds`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from chatmodel.runtime import UserError, logger

NUM_RESAMPLES = 10_000
# CORE tasks that ask the same questions in the same order: their answers are resampled together.
SHARED_QUESTIONS = (("hellaswag_zeroshot", "hellaswag"),)
Values = np.ndarray[Any, np.dtype[np.float64]]


def center_accuracy(accuracy: float, baseline: float) -> float:
    """Accuracy on a scale where 0 is chance (`baseline`, a fraction) and 1 is perfect; below chance is negative."""
    return (accuracy - baseline) / (1.0 - baseline)


def convert_to_bits_per_byte(nats: float, num_bytes: int) -> float:
    """Code length in bits per byte of text whose tokens have so many nats of negative log-likelihood.

    Raises:
        UserError: there are no bytes.
    """
    if num_bytes < 1:
        raise UserError(f"bits per byte need text, but there are {num_bytes} bytes of it; give more")
    return nats / (math.log(2) * num_bytes)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The unbiased estimate of the chance that one of `k` samples is right, from `num_correct` of `num_samples`.

    Raises:
        UserError: fewer samples than `k`, or more right ones than samples.

    Source: arXiv 2107.03374, section 2.1.
    """
    if not 1 <= k <= num_samples or not 0 <= num_correct <= num_samples:
        raise UserError(
            f"pass@{k} cannot be estimated from {num_correct} right ones of {num_samples} samples; draw at least {k}"
        )
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def binomial_stderr(accuracy: float, n: int) -> float:
    """Standard error of a share of right answers among `n` independent ones."""
    return math.sqrt(accuracy * (1.0 - accuracy) / n)


def mean_stderr(stderrs: Sequence[float]) -> float:
    """Standard error of the plain mean of independent numbers with these standard errors."""
    return math.sqrt(sum(stderr**2 for stderr in stderrs)) / len(stderrs)


def sum_stderr(blocks: Iterable[Values]) -> float:
    """Standard error of the sum of the means of independent blocks of values: the bootstrap's, in closed form.

    Args:
        blocks: each (examples,), what each example adds to the sum, times the number of examples.
    """
    return math.sqrt(sum(float(np.var(block)) / len(block) for block in blocks))


def resample_sum(blocks: Iterable[Values], *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> Values:
    """(num_resamples,) bootstrap draws of the sum of the means of `blocks`, as `sum_stderr` takes them.

    The values of a block are few and different (right or wrong), so one multinomial draw stands for drawing every
    example: exact, and 22 tasks take a fraction of a second.
    """
    generator = np.random.default_rng(seed)
    total: Values = np.zeros(num_resamples)
    for block in blocks:
        # Rounded so that equal values reached by different roundings are one.
        values, counts = np.unique(np.round(block, 12), return_counts=True)
        total += generator.multinomial(len(block), counts / len(block), size=num_resamples) @ values / len(block)
    return total


def find_interval(draws: Values) -> list[float]:
    """The middle 95 % of bootstrap draws."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return [float(low), float(high)]


def pack_decisions(right: Sequence[bool]) -> str:
    """Right and wrong as a hexadecimal string, four examples a digit, the first example in its highest bit."""
    return np.packbits(np.asarray(right, dtype=np.uint8)).tobytes().hex()


def unpack_decisions(packed: str, n: int) -> list[bool]:
    """The `n` decisions that `pack_decisions` packed."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(packed), dtype=np.uint8))[:n]
    return [bool(bit) for bit in bits]


def summarize_task(right: Sequence[bool], *, baseline: float, seconds: float) -> dict[str, Any]:
    """What results keep of one task; the standard error of the centered accuracy is scaled as the accuracy is.

    `decisions` are those of each example (`pack_decisions`), so that two results can be compared example by example.
    """
    accuracy = sum(right) / len(right)
    stderr = binomial_stderr(accuracy, len(right))
    return {
        "accuracy": accuracy,
        "stderr": stderr,
        "centered": center_accuracy(accuracy, baseline),
        "centered_stderr": stderr / (1.0 - baseline),
        "baseline": baseline,
        "n": len(right),
        "seconds": round(seconds, 3),
        "decisions": pack_decisions(right),
    }


def score_blocks(tasks: Mapping[str, Mapping[str, Any]]) -> list[Values]:
    """What each example adds to the mean centered accuracy, in blocks that can be resampled independently.

    Args:
        tasks: summaries by name, each of at least one example.
    """
    parts: dict[str, Values] = {}
    for name, task in tasks.items():
        right = np.asarray(unpack_decisions(task["decisions"], task["n"]), dtype=np.float64)
        parts[name] = (right - task["baseline"]) / (1.0 - task["baseline"]) / len(tasks)
    return join_shared(parts)


def join_shared(parts: Mapping[str, Values]) -> list[Values]:
    """Blocks of values by task, those of tasks with the same questions added up."""
    blocks = dict(parts)
    for first, second in SHARED_QUESTIONS:
        if first in blocks and second in blocks and len(blocks[first]) == len(blocks[second]):
            blocks[first] = blocks[first] + blocks.pop(second)
    return list(blocks.values())


def summarize_score(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Mean centered accuracy (`score`), its standard error, and the middle 95 % of its bootstrap (`interval`)."""
    blocks = score_blocks(tasks)
    return {
        "score": sum(task["centered"] for task in tasks.values()) / len(tasks),
        "stderr": sum_stderr(blocks),
        "interval": find_interval(resample_sum(blocks)),
    }


def combine_seeds(scores: Sequence[float], example_stderr: float) -> dict[str, float | int]:
    """The mean of several training seeds' scores, their spread, and the mean's standard error from both noises.

    Variances of the two are added: the seeds' shrinks with their number, that of the examples, which all seeds share,
    does not. It errs on the high side, because the spread between seeds already holds a part of the examples' noise.

    Args:
        example_stderr: standard error of the mean over the draw of examples.
    """
    spread = float(np.std(scores, ddof=1)) if len(scores) > 1 else math.nan
    seed_variance = spread**2 / len(scores) if len(scores) > 1 else 0.0
    return {
        "mean": float(np.mean(scores)),
        "spread": spread,
        "stderr": math.sqrt(seed_variance + example_stderr**2),
        "num_seeds": len(scores),
    }


def normal_p_value(difference: float, stderr: float) -> float:
    """Two-sided p-value of a difference that is normal around zero with this standard error."""
    if stderr == 0.0:
        return 1.0 if difference == 0.0 else 0.0
    return math.erfc(abs(difference) / stderr / math.sqrt(2.0))


def mcnemar_p_value(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value of two systems that differ on so many examples: is it a fair coin?

    Source: McNemar 1947, the exact (binomial) form.
    """
    n = only_first + only_second
    k = np.arange(1, min(only_first, only_second) + 1)
    log_binomials = np.concatenate([[0.0], np.cumsum(np.log((n - k + 1) / k))])
    return min(1.0, 2.0 * float(np.exp(log_binomials - n * math.log(2.0)).sum()))


def holm_adjust(p_values: Sequence[float]) -> list[float]:
    """P-values raised so that, below 0.05, the chance of even one false finding among all of them is 5 %.

    Source: Holm 1979, the step-down Bonferroni method.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for position, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - position) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def log_task(name: str, task: Mapping[str, Any]) -> None:
    """One line about a task that `summarize_task` describes."""
    rate = task["n"] / max(task["seconds"], 1e-9)
    values = (name, task["accuracy"], task["stderr"], task["centered"], task["n"], rate)
    logger.info("%s: accuracy %.4f ± %.4f, centered %.4f, %d examples, %.1f examples/s", *values)
