"""Which of two replies is preferred: how pairs are read and rendered for DPO, and does a model agree with them?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from chatmodel.conversations.datasets import read_hub_rows, shuffled_order
from chatmodel.conversations.files import ENDINGS, BadRow, read_rows
from chatmodel.conversations.generated import GENERATED_TASKS, check_reply
from chatmodel.conversations.render import Messages, check_messages, render_conversation, render_prompt
from chatmodel.conversations.sources import MixtureEntry, open_entry
from chatmodel.runtime import UserError

COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids", "chosen_mask", "rejected_mask")
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
FORMS = "give 'prompt', 'chosen' and 'rejected' (texts or messages), or whole conversations as 'chosen' and 'rejected'"
TRIES = 100  # of other conversations, to find a wrong reply among theirs


@dataclass(frozen=True)
class Pair:
    """Messages up to a reply, and two ways to go on."""

    prompt: Messages
    chosen: Messages
    rejected: Messages


@dataclass(frozen=True)
class PairSource:
    """`count` pairs by number, and how an error names one."""

    count: int
    read: Callable[[int], Pair]
    locate: Callable[[int], str]


def open_pairs(name: str, *, rows: int | None = None, split: str = "train", skip_invalid: bool = False) -> PairSource:
    """Pairs from a file or folder, from a data set "owner/name" on the Hub, or from a generated task.

    Of a generated task the right reply is preferred to one that another conversation of the task ends with.

    Args:
        rows: at most so many, after a shuffle; a generated task makes exactly so many (1000 unless said).

    Raises:
        UserError: no such thing.
    """
    if name in GENERATED_TASKS:
        source = open_entry(MixtureEntry(name, rows=rows), split=split)
        read = source.read
        return PairSource(source.count, lambda n: _mispair(name, read, n, source.count), source.locate)
    is_hub = name.count("/") == 1 and not Path(name).exists() and not name.endswith(ENDINGS)
    found = read_hub_rows(name, split) if is_hub else read_rows(Path(name), keep_bad=skip_invalid)
    order = shuffled_order(len(found.rows))
    count = min(len(order), rows or len(order))
    return PairSource(count, lambda n: convert_pair(found.rows[int(order[n])]), lambda n: found.locate(int(order[n])))


def _mispair(task: str, read: Callable[[int], Messages], number: int, count: int) -> Pair:
    messages = read(number)
    for step in range(1, TRIES):
        other = read((number + step * 7919) % max(count, TRIES))[-1]
        content = other["content"]
        text = content if isinstance(content, str) else "".join(part["text"] for part in content)
        if not check_reply(task, messages, text):
            return Pair(messages[:-1], messages[-1:], [other])
    raise UserError(f"no other reply is wrong for number {number} of {task}; ask for more rows")


def convert_pair(row: Any) -> Pair:
    """The pair in a row of a preference file, checked.

    Raises:
        UserError: it has not the columns, a conversation in it is wrong, or there is nothing to prefer.
    """
    if isinstance(row, BadRow):
        raise UserError(row.problem)
    if not isinstance(row, dict) or "chosen" not in row or "rejected" not in row:
        columns = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"the row has no pair of replies in it (found: {columns}); {FORMS}")
    prompt = _read_messages("prompt", row.get("prompt") or [], role="user")
    whole = [_complete(prompt, _read_messages(key, row[key], role="assistant")) for key in ("chosen", "rejected")]
    for key, messages in zip(("chosen", "rejected"), whole, strict=True):
        try:
            check_messages(messages)
        except UserError as error:
            raise UserError(f"in '{key}', {error}") from None
        if messages[-1]["role"] != "assistant":
            raise UserError(f"'{key}' does not end with a reply of the assistant")
    chosen, rejected = whole
    if chosen == rejected:
        raise UserError("'chosen' and 'rejected' are the same, so there is nothing to prefer")
    shared = 0
    while chosen[shared] == rejected[shared]:
        shared += 1
        if shared == min(len(chosen), len(rejected)):
            raise UserError("one of 'chosen' and 'rejected' is the beginning of the other; let both end with a reply")
    if chosen[shared]["role"] != "assistant":
        raise UserError(f"'chosen' and 'rejected' differ in message {shared + 1}, which is not the assistant's")
    return Pair(chosen[:shared], chosen[shared:], rejected[shared:])


def _read_messages(key: str, value: Any, *, role: str) -> Messages:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise UserError(f"'{key}' is {value!r:.60}, neither a text nor a list of messages; {FORMS}")
    kept = ("role", "content", "tool_calls")
    return [{key: message[key] for key in kept if message.get(key) is not None} for message in value]


def _complete(prompt: Messages, reply: Messages) -> Messages:
    """The whole conversation: `reply` already is one where it does not begin with the assistant."""
    return prompt + reply if reply and reply[0]["role"] == "assistant" else reply


def render_pairs(
    source: PairSource, tokenizer: Any, *, max_length: int, skip_invalid: bool = False
) -> tuple[Dataset, dict[str, int]]:
    """Rows of `COLUMNS`: ids of the prompt and of both continuations, with masks as in SFT; and what became of all.

    What the calculator wrote has mask 0. A pair with a conversation longer than `max_length` is left out: cut, its
    replies would no longer be what was judged.

    Returns:
        The data set and counts of `rows`, `tokens`, `skipped` (invalid) and `too_long`.

    Raises:
        UserError: a pair is wrong, or none is left.
    """
    counts = dict.fromkeys(("rows", "tokens", "skipped", "too_long"), 0)
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    for number in range(source.count):
        try:
            pair = source.read(number)
        except UserError as error:
            if not skip_invalid:
                raise UserError(f"{source.locate(number)}: {error} (skip_invalid leaves such rows out)") from None
            counts["skipped"] += 1
            continue
        row = _render_pair(pair, tokenizer)
        lengths = [len(row["prompt_ids"]) + len(row[key]) for key in ("chosen_ids", "rejected_ids")]
        if max(lengths) > max_length:
            counts["too_long"] += 1
            continue
        counts["rows"] += 1
        for name in COLUMNS:
            columns[name].append(row[name])
    if not counts["rows"]:
        raise UserError(
            f"none of {source.count} pairs can be trained on ({counts['skipped']} invalid, {counts['too_long']} longer"
            f" than max_length={max_length}); raise max_length, or give others"
        )
    counts["tokens"] = _count_tokens(columns)
    return Dataset.from_dict(columns), counts


def _count_tokens(columns: dict[str, list[Any]]) -> int:
    """Of both conversations of each pair."""
    prompt, *replies = (sum(map(len, columns[name])) for name in COLUMNS[:3])
    return 2 * prompt + sum(replies)


def _render_pair(pair: Pair, tokenizer: Any) -> dict[str, list[int]]:
    prompt_ids = render_prompt(tokenizer, pair.prompt)
    row = {"prompt_ids": prompt_ids}
    for key, reply in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        whole = render_conversation(tokenizer, pair.prompt + reply)
        assert whole.input_ids[: len(prompt_ids)] == prompt_ids
        row[f"{key}_ids"] = whole.input_ids[len(prompt_ids) :]
        row[f"{key}_mask"] = whole.mask[len(prompt_ids) :]
    return row


def hold_out(rows: Dataset, count: int) -> tuple[Dataset, Dataset]:
    """(for training, held out): the last `count` rows, but at most a fifth of them and at least one."""
    if len(rows) < 2:
        raise UserError("one pair is too few: some are held out to be measured on; give at least two")
    count = max(1, min(count, len(rows) // 5))
    return rows.select(range(len(rows) - count)), rows.select(range(len(rows) - count, len(rows)))


@dataclass(frozen=True)
class PairCollator:
    """Batches in the layout of TRL's DPOTrainer: all chosen conversations, then all rejected ones, padded right."""

    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `completion_mask`, each (2B, T), and the reference's sums if known."""
        ids = [row["prompt_ids"] + row[f"{key}_ids"] for key in ("chosen", "rejected") for row in rows]
        masks = [[0] * len(row["prompt_ids"]) + row[f"{key}_mask"] for key in ("chosen", "rejected") for row in rows]
        width = max(map(len, ids))
        batch = {
            "input_ids": [each + [self.pad_token_id] * (width - len(each)) for each in ids],
            "attention_mask": [[1] * len(each) + [0] * (width - len(each)) for each in ids],
            "completion_mask": [mask + [0] * (width - len(mask)) for mask in masks],
        }
        tensors = {name: torch.tensor(values) for name, values in batch.items()}
        known = [name for name in REFERENCE_COLUMNS if name in rows[0]]
        return tensors | {name: torch.tensor([row[name] for row in rows]) for name in known}


class RenderedPairs:
    """Keeps a DPOTrainer it is mixed into from rendering pairs by the template, where text can be control tokens."""

    _signature_columns: list[str] | None

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*COLUMNS, *REFERENCE_COLUMNS]


@torch.no_grad()
def score_pairs(model: Any, rows: Dataset, *, pad_token_id: int, batch_size: int) -> np.ndarray[Any, Any]:
    """(N, 4): log-probability of the chosen and the rejected continuation, and the trained tokens of each."""
    collate = PairCollator(pad_token_id)
    scores = []
    for begin in range(0, len(rows), batch_size):
        batch = collate([rows[n] for n in range(begin, min(begin + batch_size, len(rows)))])
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        mask = batch["completion_mask"][:, 1:]
        logps = logits[:, :-1].float().log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        sums = (logps * mask).sum(-1).chunk(2) + mask.sum(-1).float().chunk(2)
        scores.append(torch.stack(sums, 1).cpu().numpy())
    return np.concatenate(scores)


def measure_preferences(
    scores: np.ndarray[Any, Any], *, reference: np.ndarray[Any, Any] | None = None
) -> dict[str, Any]:
    """How often the chosen continuation has the higher log-probability, summed and per token, over N pairs.

    Args:
        scores: what `score_pairs` gives; `reference` for the model that training began with, then also the share and
            the mean margin of DPO's implicit rewards (log-probabilities above the reference's, without beta).
    """
    chosen, rejected, chosen_tokens, rejected_tokens = scores.T
    measured: dict[str, Any] = {
        "n": len(scores),
        "accuracy": float(np.mean(chosen > rejected)),
        "accuracy_per_token": float(np.mean(chosen / chosen_tokens > rejected / rejected_tokens)),
    }
    if reference is not None:
        margins = (chosen - reference[:, 0]) - (rejected - reference[:, 1])
        measured |= {"reward_accuracy": float(np.mean(margins > 0)), "reward_margin": float(np.mean(margins))}
    return measured
