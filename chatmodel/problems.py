"""Which problems reinforcement learning practises on, and how many of those held out does the model solve?"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from chatmodel.conversations.answers import reference_answer
from chatmodel.conversations.datasets import PUBLIC_TASKS
from chatmodel.conversations.generated import GENERATED_TASKS, check_reply
from chatmodel.conversations.mixtures import count_rows, mix_rows
from chatmodel.conversations.render import Messages, check_messages, render_prompt
from chatmodel.conversations.sources import MixtureEntry, Source, open_entry, parse_mixture, suggest_name
from chatmodel.evaluation.statistics import Values, binomial_stderr, pack_decisions, pass_at_k, unpack_decisions
from chatmodel.generation import generate_replies
from chatmodel.runtime import UserError

SHOWN_COMPLETIONS = 8
ANSWERED = ("GSM8K", "Arithmetic", "WordProblems", "LetterCounting", "SpellingBee", "SimpleSpelling")


def open_problems(
    tasks: Sequence[Any], *, num_held_out: int, folder: Path | None = None
) -> tuple[list[Source], list[Source]]:
    """What is practised on, and the held-out problems: equal parts of each task of a mixture.

    A file of the user's own has no part that is held out, so its last rows are (at most a fifth).

    Args:
        tasks: what `parse_mixture` takes.

    Raises:
        UserError: an unknown task, or one without answers that could be rewarded.
    """
    entries = check_tasks(tasks)
    share = -(-num_held_out // len(entries))
    pairs = [_open_both(entry, share, folder) for entry in entries]
    return [train for train, _ in pairs], [held_out for _, held_out in pairs]


def check_tasks(tasks: Sequence[Any]) -> list[MixtureEntry]:
    """The entries of a mixture of tasks, as far as can be said without opening them; raises as `open_problems`."""
    entries = parse_mixture(tasks)
    for entry in entries:
        _check_task(entry)
    return entries


def _check_task(entry: MixtureEntry) -> None:
    own = entry.path is not None or "/" in entry.name
    if entry.name not in ANSWERED and (entry.name in (*GENERATED_TASKS, *PUBLIC_TASKS) or not own):
        known = entry.name in (*GENERATED_TASKS, *PUBLIC_TASKS)
        problem = "has no '#### answer' to reward" if known else f"is not known{suggest_name(entry.name, ANSWERED)}"
        raise UserError(f"task={entry.name!r} {problem}; choose one of {', '.join(ANSWERED)}")
    if entry.streaming:
        raise UserError(
            f"task={entry.name!r} is streamed, but problems are drawn again and again; leave streaming out"
        )


def _open_both(entry: MixtureEntry, share: int, folder: Path | None) -> tuple[Source, Source]:
    train = open_entry(entry, folder=folder)
    own = entry.name in PUBLIC_TASKS and entry.path is not None and Path(entry.path).is_file()
    if entry.name in ANSWERED and not own:
        return train, open_entry(replace(entry, rows=share, split=None), split="validation", folder=folder)
    count = max(1, min(share, train.count // 5))
    begin = train.count - count
    if begin < 1:
        raise UserError(f"{entry.name} holds a single problem; give at least one to practise on and one to measure by")
    held_out = replace(
        train,
        count=count,
        read=lambda index: train.read(begin + index),
        locate=lambda index: train.locate(begin + index),
    )
    return replace(train, count=begin), held_out


def build_problems(tasks: Sequence[Any], sources: Sequence[Source], *, seed: int) -> Dataset:
    """Rows of `prompt` (messages), `task`, and the `answer` that the reward compares with, mixed.

    The answer of SimpleSpelling is the word. With one task the order is its own.

    Args:
        tasks, sources: a mixture, and what of it is practised on (`open_problems`).

    Raises:
        UserError: a conversation of a task has no "#### answer".
    """
    order = mix_rows(count_rows(parse_mixture(tasks), sources), seed=seed)
    if len(sources) == 1:
        order.sort()
    columns: dict[str, list[Any]] = {"prompt": [], "task": [], "answer": []}
    for number, row in order:
        source = sources[number]
        messages = read_problem(source, row % source.count)
        columns["prompt"].append(messages[:-1])
        columns["task"].append(source.name)
        columns["answer"].append(_find_answer(source, row % source.count, messages))
    return Dataset.from_dict(columns)


def read_problem(source: Source, row: int) -> Messages:
    """A problem and, as its last message, the reply with the answer; the error of a wrong one names its row."""
    try:
        messages = source.read(row)
        check_messages(messages)
        if messages[-1]["role"] != "assistant":
            raise UserError("the last message is not the assistant's, which gives the answer; add it")
    except UserError as error:
        raise UserError(f"{source.locate(row)}: {error}") from None
    return messages


def _find_answer(source: Source, row: int, messages: list[dict[str, Any]]) -> str:
    if source.name == "SimpleSpelling":
        word: str = messages[-1]["content"].partition(":")[0]
        return word
    answer = reference_answer(messages)
    if answer is None:
        raise UserError(f"{source.locate(row)} has no '#### answer' to reward; choose one of {', '.join(ANSWERED)}")
    return answer


def measure_prompts(tokenizer: Any, problems: Dataset, held_out: Sequence[Source]) -> int:
    """Tokens of the longest prompt, of those that are practised on and of those that are measured by."""
    measured = (read_problem(source, row)[:-1] for source in held_out for row in range(source.count))
    return max(len(render_prompt(tokenizer, prompt)) for prompt in chain(problems["prompt"], measured))


def measure_pass(
    model: Any,
    tokenizer: Any,
    sources: Sequence[Source],
    *,
    max_new_tokens: int,
    batch_size: int,
    ks: Sequence[int] = (),
    num_samples: int = 0,
    top_k: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """How many problems the model solves: greedily, and with `num_samples` replies at temperature 1 (and top_k).

    Returns:
        `correct` of `n` greedy replies, `accuracy`, `stderr`, `decisions` (`pack_decisions`), some `completions`,
        right and wrong by turns, and with samples `sampled`: right ones of each problem (`counts`) and `pass_at_k`.
    """
    problems = [(source, read_problem(source, index)) for source in sources for index in range(source.count)]
    prompts = [render_prompt(tokenizer, messages[:-1]) for _, messages in problems]
    limits: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}

    def check(replies: Sequence[list[list[int]]]) -> list[list[bool]]:
        return [
            [check_reply(source.name, messages, tokenizer.decode(ids, skip_special_tokens=True)) for ids in some]
            for (source, messages), some in zip(problems, replies, strict=True)
        ]

    replies = generate_replies(model, tokenizer, prompts, progress="greedy", **limits)
    right = [some[0] for some in check(replies)]
    accuracy = sum(right) / len(right)
    measured = {
        "correct": sum(right),
        "n": len(right),
        "accuracy": accuracy,
        "stderr": binomial_stderr(accuracy, len(right)),
        "decisions": pack_decisions(right),
        "completions": [
            {
                "prompt": problems[index][1][-2]["content"],
                "completion": tokenizer.decode(replies[index][0]),
                "reward": float(right[index]),
            }
            for index in _choose_shown(right)
        ],
    }
    if num_samples:
        options: dict[str, Any] = {
            "temperature": 1.0,
            "top_k": top_k,
            "num_samples": num_samples,
            "seed": seed,
            "progress": "samples",
        }
        counts = [sum(some) for some in check(generate_replies(model, tokenizer, prompts, **limits, **options))]
        measured["sampled"] = summarize_samples(counts, num_samples, ks)
    return measured


def _choose_shown(right: Sequence[bool]) -> list[int]:
    """Right and wrong ones by turns, as far as there are both."""
    kinds = [[index for index, success in enumerate(right) if success is kind] for kind in (True, False)]
    turns = [index for pair in zip_longest(*kinds) for index in pair if index is not None]
    return turns[:SHOWN_COMPLETIONS]


def summarize_samples(counts: Sequence[int], num_samples: int, ks: Sequence[int]) -> dict[str, Any]:
    """Unbiased pass@k with standard errors over problems, from the right ones of `num_samples` for each problem."""
    estimates = {k: np.array([pass_at_k(num_samples, count, k) for count in counts]) for k in ks}
    return {
        "num_samples": num_samples,
        "counts": list(counts),
        "pass_at_k": {str(k): {"value": float(v.mean()), "stderr": _mean_error(v)} for k, v in estimates.items()},
    }


def compare_pass(before: dict[str, Any], after: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What training changed on the same problems: `difference` and its paired standard error, "greedy" and by k."""
    return {
        name: {"difference": float(values.mean()), "stderr": _mean_error(values)}
        for name, values in find_differences(before, after).items()
    }


def combine_pass(runs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """The same over (before, after) of several seeds on the same problems.

    The difference of a problem is its mean over seeds; `stderr` is that over problems, `seed_stderr` that over seeds.

    Raises:
        UserError: the runs were measured on different numbers of problems.
    """
    found = [find_differences(before, after) for before, after in runs]
    if len({(name, len(values)) for each in found for name, values in each.items()}) != len(found[0]):
        raise UserError("the runs were not measured alike; give runs of the same task, pass_examples and pass_k")
    combined = {}
    for name in found[0]:
        stacked = np.stack([each[name] for each in found])  # (seeds, problems)
        mean = stacked.mean(axis=0)
        combined[name] = {
            "difference": float(mean.mean()),
            "stderr": _mean_error(mean),
            "seed_stderr": _mean_error(stacked.mean(axis=1)),
            "num_seeds": len(found),
        }
    return combined


def find_differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Values]:
    """Each problem's change (n,), "greedy" and "pass@k"."""
    first, second = (np.array(unpack_decisions(each["decisions"], each["n"]), dtype=float) for each in (before, after))
    differences = {"greedy": second - first}
    for k in before.get("sampled", {}).get("pass_at_k", {}):
        one, two = (
            np.array([pass_at_k(each["num_samples"], count, int(k)) for count in each["counts"]])
            for each in (before["sampled"], after["sampled"])
        )
        differences[f"pass@{k}"] = two - one
    return differences


def _mean_error(values: Values) -> float:
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
