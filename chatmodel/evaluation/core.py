"""How much has a base model learned? CORE: the mean centered accuracy over 22 tasks."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from chatmodel.evaluation.core_tasks import (
    HOW_TO_GET_BUNDLE,
    CoreTask,
    build_requests,
    load_core_tasks,
    render_prompts,
)
from chatmodel.evaluation.scoring import (
    Request,
    Score,
    encode_texts,
    get_device,
    score_requests,
    share_decisions,
    show_progress,
)
from chatmodel.evaluation.statistics import log_task, mean_stderr, summarize_task
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
    """CORE and per task accuracy and centered accuracy, each with its standard error, and examples and seconds.

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
        log_task(task.label, tasks[task.label])
    core = sum(task["centered"] for task in tasks.values()) / len(tasks)
    stderr = mean_stderr([task["centered_stderr"] for task in tasks.values()])
    logger.info("CORE %.4f ± %.4f", core, stderr)
    return {"core": core, "stderr": stderr, "max_per_task": max_per_task, "tasks": tasks}


def decide_task(
    model: nn.Module, tokenizer: Any, task: CoreTask, *, batch_tokens: int, max_length: int | None = None
) -> list[bool]:
    """Whether the model is right on each example; the ranks share the work and all know the answer."""
    with show_progress(task.label, unit="prompt") as progress:

        def decide(indices: range) -> list[bool]:
            chunks = (indices[begin : begin + CHUNK_EXAMPLES] for begin in range(0, len(indices), CHUNK_EXAMPLES))
            requests = ((chunk, _build_chunk(tokenizer, task, chunk, max_length=max_length)) for chunk in chunks)
            score = partial(score_requests, model, batch_tokens=batch_tokens, progress=progress)
            return [right for chunk, groups in requests for right in _decide_chunk(task, chunk, groups, score)]

        return share_decisions(len(task.examples), decide, device=get_device(model))


def _build_chunk(tokenizer: Any, task: CoreTask, indices: range, *, max_length: int | None) -> list[list[Request]]:
    """The requests of each example."""
    prompts = [render_prompts(task, index) for index in indices]
    encoded = iter(encode_texts(tokenizer, [text for texts in prompts for text in texts]))
    return [build_requests(task.kind, [next(encoded) for _ in texts], max_length=max_length) for texts in prompts]


def _decide_chunk(
    task: CoreTask, indices: range, groups: list[list[Request]], score: Callable[[list[Request]], list[Score]]
) -> Iterator[bool]:
    scores = iter(score([request for group in groups for request in group]))
    for index, group in zip(indices, groups, strict=True):
        yield is_right(task.kind, [next(scores) for _ in group], task.examples[index].get("gold"))


def is_right(kind: str, scores: list[Score], gold: int | None) -> bool:
    """Language modelling: every token was the likeliest. Else: the choice with the lowest mean loss is the right one.

    The first of equal choices wins, and a choice without tokens of its own (NaN) only if it is the first.
    """
    if kind == "language_modeling":
        return scores[0].is_greedy
    losses = [score.mean_loss for score in scores]
    return losses.index(min(losses)) == gold
