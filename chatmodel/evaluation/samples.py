"""What does a model say? Greedy completions of fixed prompts, and short conversations."""

from collections.abc import Sequence
from typing import Any

from chatmodel.conversations.render import Messages
from chatmodel.evaluation.chat_tasks import render_chat_prompt
from chatmodel.evaluation.scoring import encode_texts, fits_context
from chatmodel.evaluation.skills import write_reference
from chatmodel.generation import generate_replies

# Source: karpathy/nanochat scripts/base_loss.py@c75fe54, so that samples can be laid beside nanochat's.
SAMPLE_PROMPTS = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "The planets of the solar system are:",
    "My favorite color is",
    "If 5*x + 3 = 13, then x is",
)
# Each list is what the user says in one conversation, turn by turn: three conversations, then ten questions.
SAMPLE_QUESTIONS: tuple[tuple[str, ...], ...] = (
    ("Who are you?", "What can you do?", "Who made you?"),
    ("What is 27 + 48?", "What is 12 times 11?"),
    ("Hello! I like football. What do you like?", "Why do you like it?"),
    ("Spell the word: garden",),
    ("How many 'r' are in the word 'strawberry'?",),
    ("A box holds 12 eggs. Mary buys 3 boxes and uses 5 eggs. How many eggs are left?",),
    ("What is the capital of France?",),
    ("Why is the sky blue?",),
    ("What do plants need to grow?",),
    ("Who was Albert Einstein?",),
    ("Write a Python function that adds two numbers.",),
    ("Give me three tips for sleeping well.",),
    ("Tell me a short story about a fox.",),
)
CALCULATOR_PARTS = {
    "<|python_start|>": ("python", "<|python_end|>"),
    "<|output_start|>": ("python_output", "<|output_end|>"),
}


def complete_sample_prompts(model: Any, tokenizer: Any, *, max_new_tokens: int = 16) -> list[dict[str, str]]:
    """`prompt` and greedy `completion` of the seven sample prompts."""
    encoded = encode_texts(tokenizer, list(SAMPLE_PROMPTS))
    replies = generate_replies(model, tokenizer, encoded, max_new_tokens=max_new_tokens)
    return [
        {"prompt": prompt, "completion": tokenizer.decode(reply[0])}
        for prompt, reply in zip(SAMPLE_PROMPTS, replies, strict=True)
    ]


def hold_sample_chats(
    model: Any,
    tokenizer: Any,
    *,
    questions: Sequence[Sequence[str]] = SAMPLE_QUESTIONS,
    max_new_tokens: int = 128,
) -> list[dict[str, Messages]]:
    """Conversations as `messages`, side by side, with greedy replies; one stops where it is full or a reply empty."""
    chats: list[Messages] = [[] for _ in questions]
    open_chats = list(range(len(chats)))
    for turn in range(max(len(asked) for asked in questions)):
        prompts: dict[int, list[int]] = {}
        for index in (index for index in open_chats if turn < len(questions[index])):
            chats[index].append({"role": "user", "content": questions[index][turn]})
            prompts[index] = render_chat_prompt(tokenizer, chats[index])
        fitting = [index for index, ids in prompts.items() if fits_context(model, ids)]
        replies = generate_replies(model, tokenizer, [prompts[i] for i in fitting], max_new_tokens=max_new_tokens)
        for index, reply in zip(fitting, replies, strict=True):
            chats[index].append({"role": "assistant", "content": split_reply(tokenizer, reply[0])})
        open_chats = [i for i in fitting if write_reference(chats[i]).strip()]
    return [{"messages": messages} for messages in chats]


def split_reply(tokenizer: Any, ids: Sequence[int]) -> str | list[dict[str, str]]:
    """The content of a generated reply: its text, or its parts where it calls the calculator."""
    marks = {
        tokenizer.convert_tokens_to_ids(start): (kind, tokenizer.convert_tokens_to_ids(end))
        for start, (kind, end) in CALCULATOR_PARTS.items()
    }
    parts: list[tuple[str, list[int]]] = []
    rest = list(ids)
    while rest:
        kind, end = marks.get(rest[0], ("text", None))
        if end is not None and end in rest:
            stop = rest.index(end)
            parts.append((kind, rest[1:stop]))
            rest = rest[stop + 1 :]
            continue
        if not parts or parts[-1][0] != "text":
            parts.append(("text", []))
        parts[-1][1].append(rest.pop(0))
    if all(kind == "text" for kind, _ in parts):
        return tokenizer.decode(list(ids))
    return [{"type": kind, "text": tokenizer.decode(part_ids)} for kind, part_ids in parts]
