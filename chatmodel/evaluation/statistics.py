"""How far above chance is a score, and how much of it could be noise?"""

import math
from collections.abc import Mapping, Sequence

from chatmodel.runtime import logger


def center_accuracy(accuracy: float, baseline: float) -> float:
    """Accuracy on a scale where 0 is chance (`baseline`, a fraction) and 1 is perfect; below chance is negative."""
    return (accuracy - baseline) / (1.0 - baseline)


def binomial_stderr(accuracy: float, n: int) -> float:
    """Standard error of a share of right answers among `n` independent ones."""
    return math.sqrt(accuracy * (1.0 - accuracy) / n)


def mean_stderr(stderrs: Sequence[float]) -> float:
    """Standard error of the plain mean of independent numbers with these standard errors."""
    return math.sqrt(sum(stderr**2 for stderr in stderrs)) / len(stderrs)


def summarize_task(right: Sequence[bool], *, baseline: float, seconds: float) -> dict[str, float | int]:
    """What results keep of one task; the standard error of the centered accuracy is scaled as the accuracy is."""
    accuracy = sum(right) / len(right)
    stderr = binomial_stderr(accuracy, len(right))
    return {
        "accuracy": accuracy,
        "stderr": stderr,
        "centered": center_accuracy(accuracy, baseline),
        "centered_stderr": stderr / (1.0 - baseline),
        "n": len(right),
        "seconds": round(seconds, 3),
    }


def log_task(name: str, task: Mapping[str, float | int]) -> None:
    """One line about a task that `summarize_task` describes."""
    rate = task["n"] / max(task["seconds"], 1e-9)
    values = (name, task["accuracy"], task["stderr"], task["centered"], task["n"], rate)
    logger.info("%s: accuracy %.4f ± %.4f, centered %.4f, %d examples, %.1f examples/s", *values)
