"""What is a model asked in reinforcement learning? The questions of a mixture, with the answers that rewards need."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from chatmodel.conversations.answers import reference_answer
from chatmodel.conversations.mixtures import count_rows, mix_rows, open_entry, parse_mixture
from chatmodel.conversations.render import check_messages
from chatmodel.runtime import UserError


def load_problems(
    entries: Sequence[Any],
    *,
    split: str = "train",
    seed: int = 42,
    chatcore_folder: Path | None = None,
    words: Sequence[str] | None = None,
) -> Dataset:
    """Rows of `prompt` (messages up to the last reply), `answer` and `source`; arguments as in `load_mixture`.

    `answer` is the number behind "#### " in the last reply, or the whole reply where it gives none.

    Raises:
        UserError: an entry is wrong, or a conversation does not end with the assistant.
    """
    parsed = parse_mixture(entries)
    sources = [open_entry(entry, split=split, folder=chatcore_folder, words=words) for entry in parsed]
    rows = []
    for member, number in mix_rows(count_rows(parsed, sources), seed=seed):
        source = sources[member]
        row = number % source.count
        try:
            messages = source.read(row)
            check_messages(messages)
            if messages[-1]["role"] != "assistant":
                raise UserError("the conversation does not end with a reply that could be rewarded; add one")
        except UserError as error:
            raise UserError(f"{source.locate(row)}: {error}") from None
        prompt = [{"role": message["role"], "content": _plain_text(message["content"])} for message in messages[:-1]]
        answer = reference_answer(messages) or _plain_text(messages[-1]["content"])
        rows.append({"prompt": prompt, "answer": answer, "source": source.name})
    return Dataset.from_list(rows)


def _plain_text(content: str | list[dict[str, str]]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
