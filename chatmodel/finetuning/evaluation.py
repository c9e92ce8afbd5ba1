"""How does a chat model come along while it is trained? Loss per source, samples, some tasks, at little cost."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed import ReduceOp, all_reduce, is_initialized

from chatmodel.conversations.generated import GENERATED_TASKS
from chatmodel.evaluation.chat_tasks import BASELINES, is_categorical, load_chat_examples
from chatmodel.evaluation.chatcore import ChatLimits, decide_chat_task
from chatmodel.evaluation.samples import hold_sample_chats
from chatmodel.evaluation.scoring import get_rank
from chatmodel.evaluation.skills import evaluate_skills
from chatmodel.finetuning.loss import PackedLoss
from chatmodel.finetuning.rows import ConversationRows
from chatmodel.runtime import UserError, logger
from chatmodel.tokenizer import token_byte_lengths

SAMPLE_TOKENS = 64  # of each early sample
QUESTIONS = (("Who are you?",), ("How many 'r' are in the word 'strawberry'?",), ("Why is the sky blue?",))


@dataclass(frozen=True)
class TaskCheck:
    """A few examples of tasks, asked every so many steps: ChatCORE's multiple choice by default, as it is quick.

    Args:
        tasks: of ChatCORE or generated ones; those that write answers take far longer than those that choose.
        folder: files of the data sets, looked in before the Hub.
    """

    every: int | None = None
    examples: int = 100
    tasks: Sequence[str] = field(default_factory=lambda: [name for name in BASELINES if is_categorical(name)])
    folder: Path | None = None

    def check(self) -> None:
        """Refuse what cannot be, before hours are spent; the data is fetched here.

        Raises:
            UserError: an unknown task, a number that makes no sense; `DataAbsent` where data is missing.
        """
        if self.every is None:
            return
        for name, value in (("chatcore_every", self.every), ("chatcore_examples", self.examples)):
            if value < 1:
                raise UserError(f"{name}={value} must be at least 1")
        known = [*(name for name in BASELINES if name != "HumanEval"), *GENERATED_TASKS]
        for name in self.tasks:
            if name not in known:
                raise UserError(f"chatcore_tasks names {name!r}, which cannot be asked here; choose from {known}")
            if name in BASELINES:
                load_chat_examples(name, folder=self.folder, max_per_task=self.examples)

    def is_due(self, step: int, *, is_last: bool) -> bool:
        """Whether tasks are asked at this step; the last one is left to the evaluation that follows the stage."""
        return self.every is not None and not is_last and step % self.every == 0


class ValidationLoss:
    """Loss and bits per byte of the trained tokens of held-out conversations, all and by source; ranks share them."""

    def __init__(self, rows: ConversationRows, tokenizer: Any) -> None:
        self.rows = rows
        self.token_bytes = token_byte_lengths(tokenizer)

    def measure(self, loss: PackedLoss) -> dict[str, Any]:
        """`loss` (nats a token), `bits_per_byte` (special tokens left out), and `sources`, the loss by their names."""
        device = loss.head.device
        rank, world_size = get_rank()
        names, size = self.rows.names, self.rows.batch_size
        sums = torch.zeros(2, len(names), dtype=torch.float64, device=device)  # nats and tokens
        totals = torch.zeros(2, dtype=torch.float64, device=device)  # nats and bytes, special tokens left out
        token_bytes = self.token_bytes.to(device)
        begins = range(0, len(self.rows.rows), size)
        with loss.evaluating(packed=True):
            for begin in list(begins)[rank::world_size]:
                batch = self.rows.lay_out(self.rows.rows[begin : begin + size], with_sources=True)
                batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
                nats = loss.measure(batch).double().flatten()
                labels, sources = batch["shift_labels"].flatten(), batch["sources"].flatten()
                sums[0].index_add_(0, sources, nats)
                sums[1].index_add_(0, sources, (labels >= 0).double())
                lengths = token_bytes[labels.clamp(min=0)] * (labels >= 0)
                totals += torch.stack(((nats * (lengths > 0)).sum(), lengths.sum()))
        if is_initialized():
            all_reduce(sums, ReduceOp.SUM)
            all_reduce(totals, ReduceOp.SUM)
        nats, tokens = sums.tolist()
        return {
            "loss": sum(nats) / max(1, sum(tokens)),
            "bits_per_byte": float(totals[0] / totals[1].clamp(min=1) / math.log(2)),
            "sources": {name: n / t for name, n, t in zip(names, nats, tokens, strict=True) if t},
        }


def answer_samples(loss: PackedLoss, tokenizer: Any) -> list[dict[str, Any]]:
    """Short greedy answers to a few fixed questions, as `messages`."""
    with loss.evaluating(packed=False) as model:
        return hold_sample_chats(model, tokenizer, questions=QUESTIONS, max_new_tokens=SAMPLE_TOKENS)


def ask_tasks(loss: PackedLoss, tokenizer: Any, check: TaskCheck) -> dict[str, float]:
    """The accuracy in each task of `check`; every rank must call it."""
    limits = ChatLimits(max_per_task=check.examples)
    with loss.evaluating(packed=False) as model:
        accuracies = {}
        for name in (name for name in check.tasks if name in BASELINES):
            right = decide_chat_task(name, model, tokenizer, folder=check.folder, limits=limits)
            accuracies[name] = sum(right) / len(right)
        taught = [name for name in check.tasks if name in GENERATED_TASKS]
        if taught:
            skills = evaluate_skills(model, tokenizer, names=taught, num_examples=check.examples, limits=limits)
            accuracies |= {name: skills[name]["accuracy"] for name in taught}
    logger.info("tasks: %s", ", ".join(f"{name} {value:.3f}" for name, value in accuracies.items()))
    return accuracies
