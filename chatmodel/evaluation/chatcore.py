"""How much has a chat model learned? ChatCORE: the mean centered accuracy over six tasks.

Questions, prompts, subsets and baselines are nanochat's, so that the metric is comparable with its.
Source: karpathy/nanochat scripts/chat_eval.py and tasks/*.py@c75fe54.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chatmodel.conversations.answers import check_answer
from chatmodel.conversations.datasets import (
    DataAbsent,
    load_task_rows,
    load_word_list,
    task_letters,
    task_messages,
)
from chatmodel.conversations.generated import generate_conversation
from chatmodel.conversations.render import Messages, render_prompt
from chatmodel.evaluation.humaneval import build_program, run_programs
from chatmodel.evaluation.scoring import (
    evaluation_mode,
    fits_context,
    get_device,
    pad_right,
    plan_batches,
    share_decisions,
    show_progress,
)
from chatmodel.evaluation.statistics import log_task, mean_stderr, summarize_task
from chatmodel.generation import generate_replies
from chatmodel.runtime import UserError, logger

# Accuracy by chance: one of four letters, or an open answer.
BASELINES = {"ARC-Easy": 0.25, "ARC-Challenge": 0.25, "MMLU": 0.25, "GSM8K": 0.0, "HumanEval": 0.0, "SpellingBee": 0.0}
SPELLING_BEE_SIZE = 256


@dataclass(frozen=True)
class ChatLimits:
    """What bounds the evaluation: examples per task (None: all), batches, and the length of generated replies."""

    max_per_task: int | None = None
    batch_tokens: int = 16384
    batch_size: int = 32
    max_new_tokens: int = 512


def evaluate_chatcore(
    model: Any,
    tokenizer: Any,
    *,
    folder: Path | None = None,
    limits: ChatLimits | None = None,
    run_generated_code: bool = False,
) -> dict[str, Any]:
    """ChatCORE and per task accuracy and centered accuracy, each with its standard error, and examples and seconds.

    A task whose data is absent is `not_run` and how to get it; then `chatcore` and its `stderr` are None.

    Args:
        folder: files of the data sets, looked in before the Hub.
        run_generated_code: HumanEval runs programs that the model wrote, contained but not in a sandbox that keeps
            evil out (see `chatmodel.execution`), so it wants to be asked for.
    """
    limits = limits or ChatLimits()
    if limits.max_per_task is not None and limits.max_per_task < 1:
        raise UserError(f"max_per_task is {limits.max_per_task}; give a number from 1 on, or leave it out for all")
    tasks: dict[str, dict[str, Any]] = {}
    for name, baseline in BASELINES.items():
        if name == "HumanEval" and not run_generated_code:
            reason = "programs that the model wrote are only run when asked for"
            tasks[name] = {"not_run": reason, "how": "evaluate again with --run_generated_code"}
            continue
        try:
            started = time.perf_counter()
            right = decide_chat_task(name, model, tokenizer, folder=folder, limits=limits)
            tasks[name] = summarize_task(right, baseline=baseline, seconds=time.perf_counter() - started)
            log_task(name, tasks[name])
        except DataAbsent as absent:
            tasks[name] = {"not_run": f"data absent: {absent.reason}", "how": absent.how}
    return {**_take_mean(tasks), "max_per_task": limits.max_per_task, "tasks": tasks}


def _take_mean(tasks: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    missing = [name for name, task in tasks.items() if "not_run" in task]
    if missing:
        logger.info("ChatCORE: not known without %s", ", ".join(missing))
        return {"chatcore": None, "stderr": None}
    chatcore = sum(task["centered"] for task in tasks.values()) / len(tasks)
    stderr = mean_stderr([task["centered_stderr"] for task in tasks.values()])
    logger.info("ChatCORE %.4f ± %.4f", chatcore, stderr)
    return {"chatcore": chatcore, "stderr": stderr}


def decide_chat_task(name: str, model: Any, tokenizer: Any, *, folder: Path | None, limits: ChatLimits) -> list[bool]:
    """Whether the model is right on each example of a task; the ranks share the work and all know the answer.

    Raises:
        DataAbsent: the task's data is neither in the folder nor on a Hub in reach.
    """
    if name == "SpellingBee":
        words = load_word_list(folder)
        rows: Sequence[dict[str, Any]] = []
        conversations = [
            generate_conversation(name, index, split="test", words=words)
            for index in range(min(SPELLING_BEE_SIZE, limits.max_per_task or SPELLING_BEE_SIZE))
        ]
    else:
        every = load_task_rows(name, "test", folder)
        rows = [every[index] for index in range(min(len(every), limits.max_per_task or len(every)))]
        conversations = [task_messages(name, row) for row in rows]

    def decide(indices: range) -> list[bool]:
        chosen = [conversations[index] for index in indices]
        if BASELINES[name] > 0:
            letters = [task_letters(name, rows[index]) for index in indices]
            answers = choose_letters(model, tokenizer, chosen, letters, batch_tokens=limits.batch_tokens, label=name)
            return [answer == messages[-1]["content"] for answer, messages in zip(answers, chosen, strict=True)]
        replies = write_replies(model, tokenizer, chosen, limits=limits, label=name)
        if name == "HumanEval":
            programs = [build_program(rows[index], reply) for index, reply in zip(indices, replies, strict=True)]
            with show_progress("HumanEval tests", unit="program", total=len(programs)) as progress:
                return [result.success for result in run_programs(programs, progress=progress)]
        return [check_answer(messages, reply) for messages, reply in zip(chosen, replies, strict=True)]

    return share_decisions(len(conversations), decide, device=get_device(model))


def choose_letters(
    model: nn.Module,
    tokenizer: Any,
    conversations: Sequence[Messages],
    letters: Sequence[Sequence[str]],
    *,
    batch_tokens: int,
    label: str = "letters",
) -> list[str]:
    """The likeliest of the allowed letters as the first token of each reply; the first of equal ones wins.

    A prompt beyond the model's context loses its end, as nanochat's beyond 2,048 tokens do.
    """
    letter_ids = find_letter_ids(tokenizer, {letter for allowed in letters for letter in allowed})
    prompts = [_cut_prompt(ids, model) for ids in _render_prompts(tokenizer, conversations)]
    chosen = [""] * len(prompts)
    with evaluation_mode(model), show_progress(label, unit="example", total=len(prompts)) as progress:
        for batch in plan_batches([len(ids) for ids in prompts], batch_tokens=batch_tokens):
            logits = _predict_next(model, [prompts[index] for index in batch])
            for index, row in zip(batch, logits, strict=True):
                ids = [letter_ids[letter] for letter in letters[index]]
                chosen[index] = letters[index][int(row[ids].argmax())]
            progress.update(len(batch))
    return chosen


def find_letter_ids(tokenizer: Any, letters: set[str]) -> dict[str, int]:
    """The token of each letter.

    Raises:
        UserError: a letter is more than one token.
    """
    found = {}
    for letter in sorted(letters):
        ids = tokenizer.encode(letter, add_special_tokens=False)
        if len(ids) != 1:
            raise UserError(f"the tokenizer makes {len(ids)} tokens of the letter {letter}, but answers must be one")
        found[letter] = ids[0]
    return found


def _render_prompts(tokenizer: Any, conversations: Sequence[Messages]) -> list[list[int]]:
    return [render_prompt(tokenizer, messages[:-1]) for messages in conversations]


def _cut_prompt(ids: list[int], model: Any) -> list[int]:
    context = getattr(model.config, "max_position_embeddings", None)
    return ids if context is None or len(ids) <= context else [*ids[:context], ids[-1]]


def _predict_next(model: nn.Module, prompts: Sequence[list[int]]) -> Tensor:
    """(B, V) logits behind each prompt."""
    device = get_device(model)
    last = torch.tensor([len(ids) - 1 for ids in prompts], device=device)
    positions, places = torch.unique(last, return_inverse=True)
    input_ids = pad_right(prompts, device=device)
    logits = model(input_ids=input_ids, use_cache=False, logits_to_keep=positions).logits  # (B, K, V)
    return logits[torch.arange(len(prompts), device=device), places].float().cpu()


def write_replies(
    model: Any, tokenizer: Any, conversations: Sequence[Messages], *, limits: ChatLimits, label: str
) -> list[str]:
    """The model's greedy reply to each conversation in place of its last message; "" where the prompt is too long."""
    prompts = _render_prompts(tokenizer, conversations)
    fitting = [index for index, ids in enumerate(prompts) if fits_context(model, ids)]
    if len(fitting) < len(prompts):
        logger.warning(
            "%s: %d of %d prompts do not fit into the model's context and count as wrong",
            *(label, len(prompts) - len(fitting), len(prompts)),
        )
    replies = [""] * len(prompts)
    generated = generate_replies(
        model,
        tokenizer,
        [prompts[index] for index in fitting],
        max_new_tokens=limits.max_new_tokens,
        batch_size=limits.batch_size,
        progress=label,
    )
    for index, samples in zip(fitting, generated, strict=True):
        replies[index] = tokenizer.decode(samples[0])
    return replies
