"""How much has a chat model learned? ChatCORE: the mean centered accuracy over six tasks."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chatmodel.conversations.answers import check_answer
from chatmodel.conversations.datasets import DataAbsent
from chatmodel.conversations.render import Messages
from chatmodel.evaluation.chat_tasks import (
    BASELINES,
    cut_prompt,
    example_letters,
    is_categorical,
    load_chat_examples,
    render_chat_prompts,
)
from chatmodel.evaluation.decisions import KeptDecisions, hash_values
from chatmodel.evaluation.humaneval import build_program, run_programs
from chatmodel.evaluation.scoring import (
    evaluation_mode,
    find_hard_limit,
    fits_context,
    get_device,
    pad_right,
    plan_batches,
    share_decisions,
)
from chatmodel.evaluation.statistics import log_task, summarize_score, summarize_task
from chatmodel.generation import generate_replies
from chatmodel.progress import ItemProgress
from chatmodel.runtime import UserError, logger


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
    kept: KeptDecisions | None = None,
) -> dict[str, Any]:
    """ChatCORE and per task accuracy and centered accuracy, each with its standard error, and examples and seconds.

    A task whose data is absent is `not_run` and how to get it; then `chatcore` and its `stderr` are None.

    Args:
        folder: files of the data sets, looked in before the Hub.
        run_generated_code: HumanEval runs programs that the model wrote, contained but not in a sandbox that keeps
            evil out (see `chatmodel.execution`), so it wants to be asked for.
        kept: decisions of an earlier start, which are not made again, and where new ones are kept.
    """
    limits = limits or ChatLimits()
    tasks: dict[str, dict[str, Any]] = {}
    for name, baseline in BASELINES.items():
        if name == "HumanEval" and not run_generated_code:
            reason = "programs that the model wrote are only run when asked for"
            tasks[name] = {"not_run": reason, "how": "evaluate again with `--run_generated_code`"}
            continue
        try:
            right, seconds = _decide_once(name, model, tokenizer, folder=folder, limits=limits, kept=kept)
            tasks[name] = summarize_task(right, baseline=baseline, seconds=seconds)
            log_task(name, tasks[name])
        except DataAbsent as absent:
            tasks[name] = {"not_run": f"data absent: {absent.reason}", "how": absent.how}
    return {**_take_mean(tasks), "max_per_task": limits.max_per_task, "tasks": tasks}


def _decide_once(
    name: str, model: Any, tokenizer: Any, *, folder: Path | None, limits: ChatLimits, kept: KeptDecisions | None
) -> tuple[list[bool], float]:
    """(whether each example is right, seconds), as kept from an earlier start, or new."""
    kept = kept or KeptDecisions.nowhere()
    examples = load_chat_examples(name, folder=folder, max_per_task=limits.max_per_task)
    key = hash_values([name, limits.max_new_tokens, [example.messages for example in examples]])
    found = kept.find(key)
    if found is not None:
        logger.info("%s: decided already, as %s says", name, kept.path)
        return found
    started = time.perf_counter()
    right = decide_chat_task(name, model, tokenizer, folder=folder, limits=limits)
    seconds = time.perf_counter() - started
    kept.keep(key, name, right, seconds)
    return right, seconds


def _take_mean(tasks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    missing = [name for name, task in tasks.items() if "not_run" in task]
    if missing:
        logger.info("ChatCORE: not known without %s", ", ".join(missing))
        return {"chatcore": None, "stderr": None}
    summary = summarize_score(tasks)
    logger.info("ChatCORE %.4f ± %.4f", summary["score"], summary["stderr"])
    return {"chatcore": summary.pop("score"), **summary}


def decide_chat_task(name: str, model: Any, tokenizer: Any, *, folder: Path | None, limits: ChatLimits) -> list[bool]:
    """Whether the model is right on each example of a task; the ranks share the work and all know the answer.

    Raises:
        DataAbsent: the task's data is neither in the folder nor on a Hub in reach.
    """
    examples = load_chat_examples(name, folder=folder, max_per_task=limits.max_per_task)

    def decide(indices: range) -> list[bool]:
        chosen = [examples[index].messages for index in indices]
        if is_categorical(name):
            letters = [example_letters(name, examples[index]) for index in indices]
            answers = choose_letters(model, tokenizer, chosen, letters, batch_tokens=limits.batch_tokens, label=name)
            return [answer == messages[-1]["content"] for answer, messages in zip(answers, chosen, strict=True)]
        replies = write_replies(model, tokenizer, chosen, limits=limits, label=name)
        if name == "HumanEval":
            programs = [
                build_program(examples[index].row, reply) for index, reply in zip(indices, replies, strict=True)
            ]
            with ItemProgress("HumanEval tests", unit="program", total=len(programs)) as progress:
                return [result.success for result in run_programs(programs, progress=progress)]
        return [check_answer(messages, reply) for messages, reply in zip(chosen, replies, strict=True)]

    return share_decisions(len(examples), decide, device=get_device(model))


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
    context = getattr(model.config, "max_position_embeddings", None)
    limit = find_hard_limit(model)
    prompts = [cut_prompt(ids, context, hard_limit=limit) for ids in render_chat_prompts(tokenizer, conversations)]
    chosen = [""] * len(prompts)
    columns = {letter: column for column, letter in enumerate(letter_ids)}
    wanted = torch.tensor(list(letter_ids.values()), device=get_device(model))
    batches = plan_batches([len(ids) for ids in prompts], batch_tokens=batch_tokens)
    found = []
    with evaluation_mode(model), ItemProgress(label, unit="example", total=len(prompts)) as progress:
        for batch in batches:
            found.append(_predict_next(model, [prompts[index] for index in batch], wanted))
            progress.update(len(batch))
    # Fetched together at the end, so that a GPU is never waited for in between.
    for batch, logits in zip(batches, found, strict=True):
        for index, row in zip(batch, logits.cpu(), strict=True):
            allowed = row[[columns[letter] for letter in letters[index]]]
            chosen[index] = letters[index][int(allowed.argmax())]
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


def _predict_next(model: nn.Module, prompts: Sequence[list[int]], wanted: Tensor) -> Tensor:
    """(B, tokens) logits behind each prompt, of the `wanted` tokens alone."""
    device = get_device(model)
    last = torch.tensor([len(ids) - 1 for ids in prompts], device=device)
    positions, places = torch.unique(last, return_inverse=True)
    input_ids = pad_right(prompts, device=device)
    logits = model(input_ids=input_ids, use_cache=False, logits_to_keep=positions).logits  # (B, K, V)
    return logits[torch.arange(len(prompts), device=device), places][:, wanted].float()


def write_replies(
    model: Any, tokenizer: Any, conversations: Sequence[Messages], *, limits: ChatLimits, label: str
) -> list[str]:
    """The model's greedy reply to each conversation in place of its last message; "" where the prompt is too long."""
    prompts = render_chat_prompts(tokenizer, conversations)
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
