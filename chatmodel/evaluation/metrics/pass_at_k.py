"""pass@k as a metric of `evaluate`."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from chatmodel.evaluation.statistics import pass_at_k

DESCRIPTION = """The chance that one of k samples solves a problem, averaged over problems; without bias, from n
samples of which c are right:

    pass@k = 1 - C(n - c, k) / C(n, k)

Source: arXiv 2107.03374 (Codex), section 2.1. It needs outcomes only: running programs is left to the caller, for
example to `chatmodel.execution`."""

INPUTS = """Args:
    num_samples: for each problem, how many samples were drawn (n), at least the largest k.
    num_correct: for each problem, how many of them are right (c).
    k: numbers of tries, by default [1].
Returns:
    pass@1 and so on: floats."""


class PassAtK(evaluate.Metric):  # type: ignore[misc]
    """The unbiased estimate of solving a problem within k tries."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"num_samples": datasets.Value("int64"), "num_correct": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation="", inputs_description=INPUTS, features=datasets.Features(features)
        )

    def _compute(
        self, num_samples: list[int], num_correct: list[int], k: Sequence[int] = (1,), **others: Any
    ) -> dict[str, float]:
        """`others` are inputs of metrics that this one is combined with."""
        problems = list(zip(num_samples, num_correct, strict=True))
        return {f"pass@{tries}": sum(pass_at_k(n, c, tries) for n, c in problems) / len(problems) for tries in k}
