"""Centered accuracy as a metric of `evaluate`."""

from typing import Any

import datasets
import evaluate

from chatmodel.evaluation.statistics import binomial_stderr, center_accuracy

DESCRIPTION = """Accuracy on a scale where 0 is chance and 1 is perfect, so that tasks can be averaged:

    centered accuracy = (accuracy - baseline) / (1 - baseline)

Below chance it is negative. CORE and ChatCORE are plain means of it over their tasks. The standard error is that of
the accuracy, sqrt(p (1 - p) / n), divided by (1 - baseline).
Source: arXiv 2406.11794 (DCLM), section 3.5."""

INPUTS = """Args:
    predictions: answers, as texts or as whole numbers.
    references: the right answers.
    baseline: accuracy by chance, a fraction; also given once, to `evaluate.load` or the class.
Returns:
    accuracy, centered_accuracy, centered_accuracy_stderr: floats."""


class CenteredAccuracy(evaluate.Metric):  # type: ignore[misc]
    """Accuracy above chance."""

    def __init__(self, *args: Any, baseline: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.baseline = baseline

    def _info(self) -> evaluate.MetricInfo:
        features = [
            datasets.Features({"predictions": datasets.Value(kind), "references": datasets.Value(kind)})
            for kind in ("string", "int64")
        ]
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features)

    def _compute(
        self, predictions: list[Any], references: list[Any], baseline: float | None = None, **others: Any
    ) -> dict[str, float]:
        """`others` are inputs of metrics that this one is combined with."""
        chance = self.baseline if baseline is None else baseline
        right = [answer == expected for answer, expected in zip(predictions, references, strict=True)]
        accuracy = sum(right) / len(right)
        return {
            "accuracy": accuracy,
            "centered_accuracy": center_accuracy(accuracy, chance),
            "centered_accuracy_stderr": binomial_stderr(accuracy, len(right)) / (1.0 - chance),
        }
