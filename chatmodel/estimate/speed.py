"""How fast will a plan train: by what is known of the device, by small models, or by steps of the model itself?"""

import gc
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from accelerate import Accelerator

from chatmodel.devices import COPY_SHARE, Datasheet, measure_copy, measure_matmul, peak_memory_bytes, time_call
from chatmodel.estimate.memory import split_parameters
from chatmodel.estimate.setup import Setup
from chatmodel.model import GPTConfig, GPTForCausalLM
from chatmodel.runtime import logger
from chatmodel.scaling import RunPlan, count_parameters
from chatmodel.train_step import TrainStep

SMALL_DEPTHS = (2, 4)  # of the models that are timed in the place of a deeper one
TRIAL_FLOPS = 2e11  # of a micro-batch of theirs: a second on a slow CPU
TRIAL_STEPS = 4

# Attention, measured on one H200 with FlexAttention forward and backward, windows of 256 to 2,048 at width 768
# (docs/experiments.md): 14 FLOPs for each token, channel and position seen at 449 TFLOP/s, 0.72 of what products of
# that width reach, and 13 ps for each token and channel, the time of 57 bytes.
ATTENTION_FLOPS = 14
ATTENTION_RATE = 0.72
ATTENTION_TRAFFIC = 57
# Bytes moved for each token, layer and channel by norms, residual sums, rotary turn and activation with their
# gradients, compiled, in bf16; and for each token and logit. Counted, not measured.
LAYER_TRAFFIC = 130
LOGIT_TRAFFIC = 10
ADAM_TRAFFIC, MUON_TRAFFIC = 28, 40  # bytes a parameter that an update reads and writes
MUON_FLOPS = 30  # a parameter and channel: five steps of three products (chatmodel/optim/orthogonalization.py)
DEVICE_SHARE = 0.93  # of a device's speed that is left where several exchange gradients; expected, not measured

# How far off the truth may be, as a factor either way.
TRIAL_FACTOR, SMALL_FACTOR, RATES_FACTOR, DATASHEET_FACTOR = 1.15, 1.3, 1.3, 1.5


@dataclass(frozen=True)
class Speed:
    """Seconds of one device for a token of a micro-batch, and for an update of the weights; and how that is known."""

    token_seconds: float
    update_seconds: float
    factor: float
    basis: str
    peak_memory_bytes: int | None = None  # measured


@dataclass(frozen=True)
class Rates:
    """What a device reaches: FLOPs a second in the layers' products and in the head's, bytes a second in copying."""

    layer_flops: float
    head_flops: float
    bytes_per_second: float


def predict_speed(plan: RunPlan, setup: Setup) -> Speed:
    """The speed of another machine's device by its datasheet, of this one's by timing what it will do."""
    sheet, present = setup.device.datasheet, setup.device.present
    if present is None:
        assert sheet is not None
        rates = read_rates(sheet, plan.model_config())
        return predict_from_rates(plan, setup, rates, DATASHEET_FACTOR, f"datasheet of the {setup.device.name}")
    if setup.compiled:
        basis = f"products and copies timed on this {setup.device.name}"
        return predict_from_rates(plan, setup, measure_rates(plan, setup, present), RATES_FACTOR, basis)
    return time_small_models(plan, setup)


def read_rates(sheet: Datasheet, config: GPTConfig) -> Rates:
    """What a datasheet promises for products of a model's width.

    Wider products come nearer to the peak: on the H200 8,192 reaches 782 of 989 TFLOP/s and 768 about 620. For those
    narrower than 640 there is no measurement.
    """
    ratio = config.hidden_size / 768
    by_width = 1 + 0.076 * math.log2(ratio) if ratio >= 1 else ratio**0.4
    flops = sheet.flops * min(0.95, sheet.matmul_share * by_width)
    return Rates(flops, flops, sheet.bytes_per_second * COPY_SHARE)


def measure_rates(plan: RunPlan, setup: Setup, device: torch.device) -> Rates:
    """What a device reaches in the products of a micro-batch, and in copying."""
    config = plan.model_config()
    width, inner = config.hidden_size, config.intermediate_size
    assert inner is not None
    dtype = torch.bfloat16 if setup.precision == "bf16" else torch.float32
    tokens = min(setup.device_batch_size * plan.sequence_length, 2**16)
    # Work of each product in a layer: four of attention, two of the MLP.
    shapes = {(tokens, width, width): 4 * width, (tokens, width, inner): inner, (tokens, inner, width): inner}
    seconds = sum(work / measure_matmul(device, dtype, sizes) for sizes, work in shapes.items())
    head = measure_matmul(device, dtype, (min(tokens, 8192), width, config.vocab_size))
    rates = Rates(sum(shapes.values()) / seconds, head, measure_copy(device))
    release_memory(device)
    return rates


def predict_from_rates(plan: RunPlan, setup: Setup, rates: Rates, factor: float, basis: str) -> Speed:
    """The sum of products, attention, and what only moves data."""
    config = plan.model_config()
    assert config.layer_types is not None
    assert config.head_dim is not None
    width, layers, vocabulary = config.hidden_size, config.num_hidden_layers, config.vocab_size
    _, multiplied = count_parameters(config)
    head = vocabulary * width
    seconds = 6 * (multiplied - head) / rates.layer_flops + 6 * head / rates.head_flops
    length = plan.sequence_length
    windows = [
        min(config.sliding_window or length, length) if kind == "sliding_attention" else length
        for kind in config.layer_types
    ]
    positions = sum(window - window**2 / (2 * length) for window in windows)  # that a token sees on average
    channels = config.num_attention_heads * config.head_dim
    seconds += ATTENTION_FLOPS * channels * positions / (ATTENTION_RATE * rates.layer_flops)
    traffic = layers * (ATTENTION_TRAFFIC * channels + LAYER_TRAFFIC * width) + LOGIT_TRAFFIC * vocabulary
    seconds += traffic * setup.value_bytes / 2 / rates.bytes_per_second
    adam, muon, _ = split_parameters(config)
    update = (ADAM_TRAFFIC * adam + MUON_TRAFFIC * muon) / rates.bytes_per_second
    update += MUON_FLOPS * width * muon / rates.layer_flops
    return Speed(seconds, update / setup.num_devices, factor, basis)


def time_small_models(plan: RunPlan, setup: Setup) -> Speed:
    """The speed of a model by that of two shallower ones, which the layers between them tell apart from the rest.

    Every rank calls this.
    """
    rows = max(1, min(setup.device_batch_size, int(TRIAL_FLOPS / (plan.flops_per_token * plan.sequence_length))))
    if plan.depth <= max(SMALL_DEPTHS):
        with quiet():
            micro_batch, update, _ = time_steps(plan, setup, rows)
        basis = f"steps of this model timed on this {describe_load(setup)}"
        return Speed(micro_batch / (rows * plan.sequence_length), update, SMALL_FACTOR, basis)
    times = []
    with quiet():
        for depth in SMALL_DEPTHS:
            small = replace(plan, depth=depth, model=plan.model | {"num_hidden_layers": depth})
            times.append(time_steps(small, setup, rows)[:2])
    low, high = SMALL_DEPTHS
    layers = (plan.depth - low) / (high - low)
    micro_batch, update = (max(small, small + layers * (large - small)) for small, large in zip(*times, strict=True))
    basis = f"models of {low} and {high} layers timed on this {describe_load(setup)}"
    return Speed(micro_batch / (rows * plan.sequence_length), update, SMALL_FACTOR, basis)


def time_model(plan: RunPlan, setup: Setup) -> Speed:
    """The speed of the model itself, by some steps of a single micro-batch; every rank calls this."""
    rows = setup.device_batch_size
    micro_batch, update, peak = time_steps(plan, setup, rows)
    basis = f"steps of this model timed on this {describe_load(setup)}"
    return Speed(micro_batch / (rows * plan.sequence_length), update, TRIAL_FACTOR, basis, peak)


def time_steps(plan: RunPlan, setup: Setup, rows: int) -> tuple[float, float, int]:
    """Seconds of a micro-batch of `rows` random rows and of an update, and the most bytes, with a new model.

    Nothing is left of it. Ranks exchange gradients, so the number of steps must be the same on all.
    """
    accelerator = Accelerator(mixed_precision=setup.precision)  # a new one: what registers with it is no run's
    batch_tokens = rows * plan.sequence_length * accelerator.num_processes
    one = replace(plan, total_batch_tokens=batch_tokens)
    with torch.random.fork_rng(devices=[]):
        model = GPTForCausalLM(plan.model_config())
        ids = torch.randint(plan.model["vocab_size"], (rows, plan.sequence_length)).to(accelerator.device)
    step = TrainStep(model, one, accelerator, device_batch_size=rows, compile=setup.compiled)
    batch = {"input_ids": ids, "shift_labels": ids}
    micro_batches: list[float] = []
    updates: list[float] = []
    for number in range(TRIAL_STEPS):
        micro_batches.append(time_call(partial(step.accumulate, batch), accelerator.device))
        updates.append(time_call(partial(step.finish, number), accelerator.device))
    peak = peak_memory_bytes(accelerator.device)
    del step, model
    release_memory(accelerator.device)
    # The first step sets up; of the others the fastest is the least disturbed.
    return min(micro_batches[1:]), min(updates[1:]), peak


def release_memory(device: torch.device) -> None:
    """Let a run begin with a device's memory, and its record of the most used, as if nothing had been tried."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def describe_load(setup: Setup) -> str:
    """The device's name, and that others use its cores, which makes the prediction that of a busy machine."""
    name, cores = setup.device.name, os.cpu_count() or 1
    if setup.device.kind != "cpu" or not hasattr(os, "getloadavg"):
        return name
    load = os.getloadavg()[0]
    return name if load < cores / 2 else f"{name} while it was busy (load {load:.1f} on {cores} cores)"


@contextmanager
def quiet() -> Iterator[None]:
    """Without what the parts of a run say of themselves when they are built."""
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
