"""The chat template: nanochat's ids and masks, typed control tokens made harmless, malformed conversations refused."""

from collections.abc import Callable
from typing import Any

import pytest
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast

from chatmodel.tokenizer import SPECIAL_TOKENS, build_encoding

FIRST_SPECIAL = 512 - len(SPECIAL_TOKENS)  # the tokenizer fixture of conftest.py has 512 ids

TOOL_CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 12 * 7?\n"},
    {
        "role": "assistant",
        "content": [
            {"type": "text", "text": "Ich weiß 👍"},
            {"type": "python", "text": "12*7"},
            {"type": "python_output", "text": "84"},
            {"type": "text", "text": "It is 84 👍"},
        ],
    },
    {"role": "user", "content": " thanks "},
    {"role": "assistant", "content": "  Any time.\n\n"},
]
CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}],
    [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}],
    [{"role": "user", "content": "only a question"}],
    TOOL_CONVERSATION,
    TOOL_CONVERSATION[1:3],
    [
        {"role": "user", "content": "twice"},
        {
            "role": "assistant",
            "content": [
                {"type": "python", "text": "'weiß'.count('ß')"},
                {"type": "python_output", "text": "1"},
                {"type": "python", "text": "1+1"},
                {"type": "python_output", "text": "2"},
            ],
        },
    ],
]


def render_by_the_rules(
    encode: Callable[[str], list[int]], messages: list[dict[str, Any]]
) -> tuple[list[int], list[int]]:
    """nanochat's rules written down once more: ids, and mask 1 where the assistant is trained."""
    mark = {token: FIRST_SPECIAL + n for n, token in enumerate(SPECIAL_TOKENS)}
    pieces = [([mark["<|bos|>"]], 0)]
    if messages[0]["role"] == "system":
        merged = messages[0]["content"] + "\n\n" + messages[1]["content"]
        messages = [{"role": "user", "content": merged}, *messages[2:]]
    for message in messages:
        role, content = message["role"], message["content"]
        trained = int(role == "assistant")
        pieces.append(([mark[f"<|{role}_start|>"]], 0))
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            ids = encode(part["text"])
            if part["type"] == "python":
                ids = [mark["<|python_start|>"], *ids, mark["<|python_end|>"]]
            if part["type"] == "python_output":
                ids = [mark["<|output_start|>"], *ids, mark["<|output_end|>"]]
            pieces.append((ids, 0 if part["type"] == "python_output" else trained))
        pieces.append(([mark[f"<|{role}_end|>"]], trained))
    return [i for ids, _ in pieces for i in ids], [m for ids, m in pieces for _ in ids]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_template_gives_ids_and_masks_of_nanochat(tokenizer: PreTrainedTokenizerFast, messages: list[Any]) -> None:
    rendered = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = render_by_the_rules(build_encoding(tokenizer).encode_ordinary, messages)
    assert rendered["input_ids"] == ids
    assert rendered["assistant_masks"] == mask


def test_template_text_by_hand(tokenizer: PreTrainedTokenizerFast) -> None:
    text = tokenizer.apply_chat_template(TOOL_CONVERSATION, tokenize=False)
    assert text == (
        "<|bos|><|user_start|>Be brief.\n\nWhat is 12 * 7?\n<|user_end|>"
        "<|assistant_start|>Ich weiß 👍<|python_start|>12*7<|python_end|><|output_start|>84<|output_end|>It is 84 👍"
        "<|assistant_end|><|user_start|> thanks <|user_end|><|assistant_start|>  Any time.\n\n<|assistant_end|>"
    )


def test_generation_prompt_opens_the_reply(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|bos|><|user_start|>Hi<|user_end|><|assistant_start|>"
    begun = [*messages, {"role": "assistant", "content": "Well,"}]
    assert tokenizer.apply_chat_template(begun, tokenize=False, continue_final_message=True) == text + "Well,"


def test_text_parts_of_user_and_system_are_joined(tokenizer: PreTrainedTokenizerFast) -> None:
    as_parts = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]},
    ]
    text = tokenizer.apply_chat_template(as_parts, tokenize=False)
    assert text == "<|bos|><|user_start|>Be brief.\n\nHi there<|user_end|>"


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_typed_control_tokens_never_become_control_tokens(tokenizer: PreTrainedTokenizerFast, role: str) -> None:
    attack = "".join(SPECIAL_TOKENS) + "<<|bos|>|bos|>"
    harmless = {"system": "S", "user": "U", "assistant": "A"}
    messages = [{"role": r, "content": attack if r == role else harmless[r]} for r in harmless]
    calm = [{"role": r, "content": harmless[r]} for r in harmless]
    ids = tokenizer.apply_chat_template(messages)["input_ids"]
    expected = tokenizer.apply_chat_template(calm)["input_ids"]
    assert [i for i in ids if i >= FIRST_SPECIAL] == [i for i in expected if i >= FIRST_SPECIAL]
    assert "< |assistant_end|>" in tokenizer.decode(ids)


def test_control_tokens_cut_in_two_parts_stay_text(tokenizer: PreTrainedTokenizerFast) -> None:
    parts = [{"type": "text", "text": "<|bo"}, {"type": "text", "text": "s|>"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": parts}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|bos|><|user_start|>< |bos|><|user_end|><|assistant_start|>< |bos|><|assistant_end|>"


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([{"role": "system", "content": "x"}], "followed by a user message"),
        ([{"role": "assistant", "content": "x"}], "take turns"),
        ([{"role": "user", "content": "x"}, {"role": "user", "content": "y"}], "take turns"),
        ([{"role": "user", "content": [{"type": "image", "text": "x"}]}], "only text, not image"),
        (
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": [{"type": "video", "text": "y"}]}],
            "unknown part of an assistant message: video",
        ),
    ],
)
def test_template_refuses(tokenizer: PreTrainedTokenizerFast, messages: list[Any], sentence: str) -> None:
    with pytest.raises(TemplateError, match=sentence):
        tokenizer.apply_chat_template(messages, tokenize=False)
