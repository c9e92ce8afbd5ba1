"""How much has a base model learned? CORE: the mean centered accuracy over 22 tasks."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from chatmodel.evaluation.core_tasks import (
    HOW_TO_GET_BUNDLE,
    CoreTask,
    build_requests,
    load_core_tasks,
    render_prompts,
)
from chatmodel.evaluation.scoring import Score, encode_texts, get_device, get_rank, score_requests
from chatmodel.evaluation.statistics import mean_stderr, summarize_task
from chatmodel.runtime import logger

# Examples that are encoded and sorted by length together: bounds the memory that token ids take.
CHUNK_EXAMPLES = 512


def evaluate_core(
    model: nn.Module,
    tokenizer: Any,
    bundle: Path | None,
    *,
    max_per_task: int | None = None,
    batch_tokens: int = 16384,
    max_length: int | None = None,
) -> dict[str, Any]:
    """CORE, its standard error, and per task accuracy, centered accuracy, its standard error, examples and seconds.

    The standard error takes the tasks as independent, though two of them share the HellaSwag questions.

    Args:
        bundle: nanochat's evaluation bundle, a zip file or a folder; None gives `not_run` and how to get it.
        max_per_task: examples per task; None takes all.
        batch_tokens: tokens in a padded batch.
        max_length: keep only the last so many tokens of each prompt, for models with short contexts.

    Raises:
        UserError: the bundle is missing, incomplete or damaged.
    """
    if bundle is None:
        return {"not_run": "data absent: no evaluation bundle was given", "how": HOW_TO_GET_BUNDLE}
    tasks: dict[str, dict[str, Any]] = {}
    for task in load_core_tasks(bundle, max_per_task=max_per_task):
        started = time.perf_counter()
        right = decide_task(model, tokenizer, task, batch_tokens=batch_tokens, max_length=max_length)
        tasks[task.label] = summarize_task(right, baseline=task.baseline, seconds=time.perf_counter() - started)
        _log_task(task.label, tasks[task.label])
    core = sum(task["centered"] for task in tasks.values()) / len(tasks)
    stderr = mean_stderr([task["stderr"] for task in tasks.values()])
    logger.info("CORE %.4f ± %.4f", core, stderr)
    return {"core": core, "stderr": stderr, "max_per_task": max_per_task, "tasks": tasks}


def decide_task(
    model: nn.Module, tokenizer: Any, task: CoreTask, *, batch_tokens: int, max_length: int | None = None
) -> list[bool]:
    """Whether the model is right on each example; the ranks share the work and all know the answer."""
    rank, world_size = get_rank()
    right = torch.zeros(len(task.examples), dtype=torch.int32, device=get_device(model))
    with tqdm(desc=task.label, unit=" prompts", disable=None if rank == 0 else True, leave=False) as progress:
        for chunk in _chunks(range(rank, len(task.examples), world_size)):
            prompts = [render_prompts(task, index) for index in chunk]
            encoded = iter(encode_texts(tokenizer, [text for texts in prompts for text in texts]))
            requests = [
                build_requests(task.kind, [next(encoded) for _ in texts], max_length=max_length) for texts in prompts
            ]
            flat = [request for group in requests for request in group]
            scores = iter(score_requests(model, flat, batch_tokens=batch_tokens, progress=progress))
            for index, group in zip(chunk, requests, strict=True):
                right[index] = is_right(task.kind, [next(scores) for _ in group], task.examples[index].get("gold"))
    if world_size > 1:
        dist.all_reduce(right)
    return [bool(value) for value in right.tolist()]


def is_right(kind: str, scores: list[Score], gold: int | None) -> bool:
    """Language modelling: every token was the likeliest. Else: the choice with the lowest mean loss is the right one.

    The first of equal choices wins, and a choice without tokens of its own (NaN) only if it is the first.
    """
    if kind == "language_modeling":
        return scores[0].is_greedy
    losses = [score.mean_loss for score in scores]
    return losses.index(min(losses)) == gold


def _chunks(indices: range) -> Iterator[range]:
    for begin in range(0, len(indices), CHUNK_EXAMPLES):
        yield indices[begin : begin + CHUNK_EXAMPLES]


def _log_task(label: str, task: dict[str, Any]) -> None:
    rate = task["n"] / max(task["seconds"], 1e-9)
    values = (label, task["accuracy"], task["centered"], task["stderr"], task["n"], rate)
    logger.info("%s: accuracy %.4f, centered %.4f ± %.4f, %d examples, %.1f examples/s", *values)
