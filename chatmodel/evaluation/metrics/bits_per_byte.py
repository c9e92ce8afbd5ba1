"""Bits per byte as a metric of `evaluate`."""

from typing import Any

import datasets
import evaluate

from chatmodel.evaluation.statistics import convert_to_bits_per_byte

DESCRIPTION = """How well a model compresses text, comparable between tokenizers:

    bits per byte = sum of -ln P(token) over all tokens / (ln 2 * UTF-8 bytes of all texts)

All nats over all bytes, so long texts weigh more. Lower is better; 8 is what plain bytes take.
Source: arXiv 2101.00027 (The Pile), section 3.1; nanochat's nanochat/loss_eval.py."""

INPUTS = """Args:
    nats: for each text, the summed negative log-likelihood of its tokens, in nats.
    num_bytes: for each text, its length in UTF-8 bytes.
Returns:
    bits_per_byte: a float."""


class BitsPerByte(evaluate.Metric):  # type: ignore[misc]
    """All nats over all bytes, in bits."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"nats": datasets.Value("float64"), "num_bytes": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation="", inputs_description=INPUTS, features=datasets.Features(features)
        )

    def _compute(self, nats: list[float], num_bytes: list[int], **others: Any) -> dict[str, float]:
        """`others` are inputs of metrics that this one is combined with."""
        return {"bits_per_byte": convert_to_bits_per_byte(sum(nats), sum(num_bytes))}
