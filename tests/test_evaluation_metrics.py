"""Our metrics in Hugging Face's `evaluate`: values worked by hand, loaded by path, combined, nothing fetched."""

import itertools
import math
import socket

import evaluate
import pytest

from chatmodel.evaluation.metrics import METRICS
from chatmodel.evaluation.metrics.bits_per_byte import BitsPerByte
from chatmodel.evaluation.metrics.centered_accuracy import CenteredAccuracy
from chatmodel.evaluation.metrics.pass_at_k import PassAtK
from chatmodel.evaluation.statistics import pass_at_k
from chatmodel.runtime import UserError


@pytest.fixture(autouse=True, scope="module")
def offline(tmp_path_factory):
    """No network, and caches of its own, so that nothing fetched earlier can help."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_EVALUATE_CACHE", "HF_METRICS_CACHE", "HF_MODULES_CACHE"):
            patch.setattr(evaluate.config, name, tmp_path_factory.mktemp(name))
        patch.setattr(socket.socket, "connect", lambda *args: pytest.fail("a metric reached for the network"))
        yield


@pytest.fixture(params=["by path", "imported"])
def load(request):
    classes = {"bits_per_byte": BitsPerByte, "centered_accuracy": CenteredAccuracy, "pass_at_k": PassAtK}
    if request.param == "imported":
        return lambda name, **options: classes[name](keep_in_memory=True, **options)
    return lambda name, **options: evaluate.load(str(METRICS / f"{name}.py"), keep_in_memory=True, **options)


def test_bits_per_byte(load):
    # "a" at P = 1/4 (2 bits, 1 byte) and "bcd" at P = 1/16 (4 bits, 3 bytes): 6 bits over 4 bytes.
    result = load("bits_per_byte").compute(nats=[math.log(4), math.log(16)], num_bytes=[1, 3])
    assert result == {"bits_per_byte": pytest.approx(1.5)}
    with pytest.raises(UserError, match="0 bytes"):
        load("bits_per_byte").compute(nats=[1.0], num_bytes=[0])


def test_centered_accuracy(load):
    metric = load("centered_accuracy", baseline=0.25)
    # 3 of 4 right: (0.75 - 0.25) / 0.75, and sqrt(0.75 * 0.25 / 4) / 0.75
    expected = {"accuracy": 0.75, "centered_accuracy": pytest.approx(2 / 3)}
    expected["centered_accuracy_stderr"] = pytest.approx(math.sqrt(0.75 * 0.25 / 4) / 0.75)
    assert metric.compute(predictions=["A", "B", "C", "D"], references=["A", "B", "C", "A"]) == expected
    below = metric.compute(predictions=[1, 0], references=[0, 0], baseline=0.62)
    assert below["centered_accuracy"] == pytest.approx(-0.12 / 0.38)


def test_pass_at_k(load):
    # Of 5 samples 2 are right: C(3, 2) / C(5, 2) = 3 / 10 of all pairs have none; and 4 right leave no such pair.
    result = load("pass_at_k").compute(num_samples=[5, 5], num_correct=[2, 4], k=[1, 2])
    assert result == {"pass@1": pytest.approx((0.4 + 0.8) / 2), "pass@2": pytest.approx((0.7 + 1.0) / 2)}
    with pytest.raises(UserError, match="draw at least 3"):
        load("pass_at_k").compute(num_samples=[2], num_correct=[1], k=[3])


def test_pass_at_k_is_the_share_of_all_draws():
    outcomes = [True, False, False, True, False, False]
    for k in range(1, 7):
        draws = list(itertools.combinations(outcomes, k))
        assert pass_at_k(6, 2, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_they_combine(load):
    inputs = {
        "predictions": ["A", "B"],
        "references": ["A", "C"],
        "nats": [math.log(2)] * 3,
        "num_bytes": [1, 1, 2],
        "num_samples": [4],
        "num_correct": [1],
    }
    names = ("bits_per_byte", "centered_accuracy", "pass_at_k")
    expected = {"bits_per_byte": pytest.approx(0.75), "accuracy": 0.5, "centered_accuracy": pytest.approx(1 / 3)}
    expected |= {"centered_accuracy_stderr": pytest.approx(math.sqrt(0.125) / 0.75), "pass@1": 0.25}
    at_once = evaluate.combine([load(name) for name in names])
    assert at_once.compute(**inputs, baseline=0.25) == expected
    # Batch by batch, each metric takes what it knows; so they go with metrics that refuse other inputs.
    metrics = [load("bits_per_byte"), load("centered_accuracy", baseline=0.25), load("pass_at_k")]
    in_batches = evaluate.combine(metrics)
    in_batches.add_batch(**inputs)
    assert in_batches.compute() == expected


def test_each_says_what_it_is(load):
    for module, source in {
        "bits_per_byte": "2101.00027",
        "centered_accuracy": "2406.11794",
        "pass_at_k": "2107.03374",
    }.items():
        metric = load(module)
        assert source in metric.description
        assert all(f"{name}:" in metric.inputs_description for name in metric._feature_names())
