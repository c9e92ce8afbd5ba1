"""How much has a base model learned? CORE: the mean centered accuracy over 22 tasks."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from chatmodel.evaluation.batches import Plan
from chatmodel.evaluation.bundle import HOW_TO_GET_BUNDLE, describe_bundle, find_bundle
from chatmodel.evaluation.core_tasks import CoreTask, build_requests, load_core_tasks, render_prompts
from chatmodel.evaluation.decisions import KeptDecisions, hash_values
from chatmodel.evaluation.encoding import PromptEncoder
from chatmodel.evaluation.likelihood import Pending, can_share_prefixes, launch_plan, plan_for_model
from chatmodel.evaluation.scoring import Score, get_device, get_rank, share_decisions
from chatmodel.evaluation.statistics import center_accuracy, log_task, summarize_score, summarize_task
from chatmodel.progress import WorkProgress
from chatmodel.runtime import logger
from chatmodel.workers import run_in_order

T = TypeVar("T")
R = TypeVar("R")
# Examples that are encoded and sorted by length together: bounds the memory that token ids take.
CHUNK_EXAMPLES = 1024
# Chunks that are prepared while a model is busy.
CHUNKS_AHEAD = 2


@dataclass(frozen=True)
class CoreSettings:
    """Tokens in a padded batch; last tokens of a prompt that are kept (None: all); are beginnings shared?"""

    batch_tokens: int = 16384
    max_length: int | None = None
    share_prefixes: bool = True


@dataclass(frozen=True)
class Chunk:
    """Some examples of a task, ready for the model."""

    task: CoreTask
    indices: range
    sizes: list[int]
    plan: Plan


def evaluate_core(
    model: nn.Module,
    tokenizer: Any,
    bundle: Path | str | None,
    *,
    max_per_task: int | None = None,
    batch_tokens: int = 16384,
    max_length: int | None = None,
    kept: KeptDecisions | None = None,
) -> dict[str, Any]:
    """CORE and per task accuracy and centered accuracy, each with its standard error, and examples and seconds.

    `core_dclm` is CORE with DCLM's corrected baselines; `stderr` and `interval` are of CORE with nanochat's.

    Args:
        bundle: nanochat's evaluation bundle (zip file, folder or address); None gives `not_run` and how to get it.
        max_per_task: examples per task; None takes all.
        batch_tokens: tokens in a padded batch.
        max_length: keep only the last so many tokens of each prompt, for models with short contexts.
        kept: decisions of an earlier start, which are not made again, and where new ones are kept.

    Raises:
        UserError: the bundle is missing, incomplete or damaged.
    """
    if bundle is None:
        return {"not_run": "data absent: no evaluation bundle was given", "how": HOW_TO_GET_BUNDLE}
    place = find_bundle(bundle)
    loaded = list(load_core_tasks(place, max_per_task=max_per_task))
    settings = CoreSettings(batch_tokens, max_length)
    tasks: dict[str, dict[str, Any]] = {}
    started = time.perf_counter()
    for task, right, seconds in decide_tasks(model, tokenizer, loaded, settings=settings, kept=kept):
        tasks[task.label] = summarize_task(right, baseline=task.baseline, seconds=seconds)
        tasks[task.label]["centered_dclm"] = center_accuracy(tasks[task.label]["accuracy"], task.dclm_baseline)
        log_task(task.label, tasks[task.label])
    summary = summarize_score(tasks)
    core_dclm = sum(task["centered_dclm"] for task in tasks.values()) / len(tasks)
    seconds = time.perf_counter() - started
    values = (summary["score"], summary["stderr"], core_dclm, seconds)
    logger.info("CORE %.4f ± %.4f (%.4f by DCLM's corrected baselines), %.1f s", *values)
    return {
        "core": summary["score"],
        "stderr": summary["stderr"],
        "interval": summary["interval"],
        "core_dclm": core_dclm,
        "max_per_task": max_per_task,
        "seconds": round(seconds, 3),
        "bundle": describe_bundle(place),
        "tasks": tasks,
    }


def decide_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[CoreTask],
    *,
    settings: CoreSettings,
    kept: KeptDecisions | None = None,
) -> Iterator[tuple[CoreTask, list[bool], float]]:
    """(task, whether the model is right on each example, seconds) in turn; the ranks share the work and all know."""
    kept = kept or KeptDecisions.nowhere()
    keys = {task.label: task_key(task, settings) for task in tasks}
    known = {task.label: found for task in tasks if (found := kept.find(keys[task.label])) is not None}
    if known:
        logger.info("CORE: %d of %d tasks are decided already, as %s says", len(known), len(tasks), kept.path)
    todo = [task for task in tasks if task.label not in known]
    with WorkProgress("CORE", {task.label: estimate_work(task) for task in todo}) as progress:
        scored = score_tasks(model, tokenizer, todo, settings=settings, advance=progress.advance)
        for task in tasks:
            if task.label in known:
                yield task, *known[task.label]
                continue
            started = time.perf_counter()

            def decide(indices: range, task: CoreTask = task) -> list[bool]:
                golds = (task.examples[index].get("gold") for index in indices)
                return [is_right(task.kind, next(scored), gold) for gold in golds]

            right = share_decisions(len(task.examples), decide, device=get_device(model))
            seconds = time.perf_counter() - started
            kept.keep(keys[task.label], task.label, right, seconds)
            progress.finish(task.label)
            yield task, right, seconds


def task_key(task: CoreTask, settings: CoreSettings) -> str:
    """What a task's decisions depend on, the model apart: prompts and where they are cut."""
    values = [task.label, task.kind, task.num_fewshot, task.delimiter, task.examples, settings.max_length]
    return hash_values(values)


def estimate_work(task: CoreTask) -> float:
    """Characters that a task puts through the model, counting what choices share once; from a few of its examples."""
    step = max(1, len(task.examples) // 8)
    sample = range(0, len(task.examples), step)
    total = 0
    for index in sample:
        texts = render_prompts(task, index)
        total += len(texts[0]) + sum(len(text) - _common_characters(texts[0], text) for text in texts[1:])
    return total * len(task.examples) / len(sample)


def _common_characters(first: str, second: str) -> int:
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[:middle] == second[:middle] else (low, middle - 1)
    return low


def score_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Iterable[CoreTask],
    *,
    settings: CoreSettings,
    advance: Callable[[str, float], None] | None = None,
) -> Iterator[list[Score]]:
    """The scores of each example of this rank, task after task.

    The next chunks are prepared, and on a GPU already launched, while the one before is computed.

    Args:
        advance: is told a task's label and what share of its examples is done.
    """
    encoder = PromptEncoder(tokenizer)
    share = settings.share_prefixes and can_share_prefixes(model)
    rank, world_size = get_rank()

    def prepare(place: tuple[CoreTask, range]) -> Chunk:
        task, indices = place
        groups = [list(render_prompts(task, index)) for index in indices]
        encoded = iter(encoder.encode([text for texts in groups for text in texts]))
        built = [
            build_requests(task.kind, [next(encoded) for _ in texts], max_length=settings.max_length)
            for texts in groups
        ]
        requests = [request for group in built for request in group]
        plan = plan_for_model(model, requests, batch_tokens=settings.batch_tokens, share=share)
        return Chunk(task, indices, [len(group) for group in built], plan)

    def launch(chunk: Chunk) -> Pending:
        part = len(chunk.indices) * world_size / len(chunk.task.examples) / max(1, chunk.plan.num_distinct)
        tell = None if advance is None else lambda count: advance(chunk.task.label, count * part)
        return launch_plan(model, chunk.plan, advance=tell)

    places = ((task, chunk) for task in tasks for chunk in _cut(range(rank, len(task.examples), world_size)))
    behind = 1 if get_device(model).type == "cuda" else 0  # a GPU has its next work before its last is asked for
    launched: deque[tuple[Chunk, Pending]] = deque()
    for chunk in prepare_ahead(prepare, places):
        launched.append((chunk, launch(chunk)))
        if len(launched) > behind:
            yield from _collect(*launched.popleft())
    for pair in launched:
        yield from _collect(*pair)


def _cut(indices: range) -> Iterator[range]:
    return (indices[begin : begin + CHUNK_EXAMPLES] for begin in range(0, len(indices), CHUNK_EXAMPLES))


def _collect(chunk: Chunk, pending: Pending) -> Iterator[list[Score]]:
    scores = iter(pending.collect())
    for size in chunk.sizes:
        yield [next(scores) for _ in range(size)]


def prepare_ahead(prepare: Callable[[T], R], places: Iterable[T]) -> Iterator[R]:
    """`prepare` of each place, in order; a thread does it for the next ones meanwhile."""
    with (
        ThreadPoolExecutor(1) as pool,
        closing(run_in_order(places, lambda place: pool.submit(prepare, place), ahead=CHUNKS_AHEAD)) as prepared,
    ):
        for _, future in prepared:
            yield future.result()


def is_right(kind: str, scores: list[Score], gold: int | None) -> bool:
    """Language modelling: every token was the likeliest. Else: the choice with the lowest mean loss is the right one.

    The first of equal choices wins, and a choice without tokens of its own (NaN) only if it is the first.
    """
    if kind == "language_modeling":
        return scores[0].is_greedy
    losses = [score.mean_loss for score in scores]
    return losses.index(min(losses)) == gold
