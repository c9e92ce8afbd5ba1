"""Which problems reinforcement learning practises on, and what share of them the model gets right."""

from typing import Any

from datasets import Dataset

from chatmodel.conversations.answers import reference_answer
from chatmodel.conversations.generated import check_reply
from chatmodel.conversations.mixtures import Source
from chatmodel.conversations.render import render_prompt
from chatmodel.generation import generate_replies
from chatmodel.runtime import UserError


def build_problems(source: Source) -> Dataset:
    """Rows of `prompt` (messages) and what the reward compares with: `word` for SimpleSpelling, else `answer`.

    Raises:
        UserError: a conversation of the task has no "#### answer".
    """
    conversations = [source.read(index) for index in range(source.count)]
    columns: dict[str, list[Any]] = {"prompt": [messages[:-1] for messages in conversations]}
    if source.name == "SimpleSpelling":
        columns["word"] = [messages[-1]["content"].partition(":")[0] for messages in conversations]
    else:
        columns["answer"] = [reference_answer(messages) for messages in conversations]
        if None in columns["answer"]:
            raise UserError(f"task={source.name!r} has no '#### answer' to reward; choose one that has")
    return Dataset.from_dict(columns)


def measure_pass(
    model: Any, tokenizer: Any, source: Source, *, max_new_tokens: int, batch_size: int
) -> dict[str, Any]:
    """pass@1: `correct` of `n` problems whose greedy completion is right, `accuracy`, and the first `completions`."""
    conversations = [source.read(index) for index in range(source.count)]
    prompts = [render_prompt(tokenizer, messages[:-1]) for messages in conversations]
    replies = generate_replies(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress="pass@1",
    )
    texts = [tokenizer.decode(reply[0]) for reply in replies]
    right = [
        check_reply(source.name, messages, tokenizer.decode(reply[0], skip_special_tokens=True))
        for messages, reply in zip(conversations, replies, strict=True)
    ]
    completions = [
        {"prompt": messages[-2]["content"], "completion": text, "reward": float(success)}
        for messages, text, success in zip(conversations, texts, right, strict=True)
    ]
    return {
        "correct": sum(right),
        "n": len(right),
        "accuracy": sum(right) / len(right),
        "completions": completions[:8],
    }
