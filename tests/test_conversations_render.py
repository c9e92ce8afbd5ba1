"""Ids and masks assembled by hand from tiktoken's encoding of each text, which shares no code with the renderer."""

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from chatmodel.conversations.render import (
    Rendered,
    check_messages,
    preview_masks,
    render_conversation,
    render_prompt,
)
from chatmodel.runtime import UserError
from chatmodel.tokenizer import SPECIAL_TOKENS, build_encoding

USER = {"role": "user", "content": "How much is 12 + 7?"}
REPLY = {"role": "assistant", "content": "The result is 19."}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {
    "role": "assistant",
    "content": [
        {"type": "text", "text": "Let me see: "},
        {"type": "python", "text": "12+7"},
        {"type": "python_output", "text": "19"},
        {"type": "text", "text": "\n\n"},
        {"type": "text", "text": "#### 19"},
    ],
}


@pytest.fixture(scope="module")
def assemble(tokenizer):
    """("<|bos|>", 0) or ("text", 1) pairs -> ids and mask."""
    encoding = build_encoding(tokenizer)

    def assemble(*pieces: tuple[str, int]) -> tuple[list[int], list[int]]:
        ids, mask = [], []
        for text, trained in pieces:
            new = [encoding.encode_single_token(text)] if text in SPECIAL_TOKENS else encoding.encode_ordinary(text)
            ids, mask = ids + new, mask + [trained] * len(new)
        return ids, mask

    return assemble


def test_one_turn(tokenizer, assemble):
    ids, mask = assemble(
        ("<|bos|>", 0),
        ("<|user_start|>", 0),
        ("How much is 12 + 7?", 0),
        ("<|user_end|>", 0),
        ("<|assistant_start|>", 0),
        ("The result is 19.", 1),
        ("<|assistant_end|>", 1),
    )
    assert render_conversation(tokenizer, [USER, REPLY]) == Rendered(ids, mask)


def test_calculator_calls_are_trained_but_not_their_results(tokenizer, assemble):
    ids, mask = assemble(
        ("<|bos|>", 0),
        ("<|user_start|>", 0),
        ("How much is 12 + 7?", 0),
        ("<|user_end|>", 0),
        ("<|assistant_start|>", 0),
        ("Let me see: ", 1),
        ("<|python_start|>", 1),
        ("12+7", 1),
        ("<|python_end|>", 1),
        ("<|output_start|>", 0),
        ("19", 0),
        ("<|output_end|>", 0),
        ("\n\n", 1),
        ("#### 19", 1),
        ("<|assistant_end|>", 1),
    )
    assert render_conversation(tokenizer, [USER, CALL]) == Rendered(ids, mask)


def test_parts_are_encoded_one_by_one(tokenizer, assemble):
    parts = [{"type": "text", "text": text} for text in ("th", "e")]
    rendered = render_conversation(tokenizer, [USER, {"role": "assistant", "content": parts}])
    together = render_conversation(tokenizer, [USER, {"role": "assistant", "content": "the"}])
    assert rendered.input_ids[-3:-1] == assemble(("th", 1), ("e", 1))[0]
    assert rendered.input_ids != together.input_ids


def test_a_system_message_leads_the_first_user_message(tokenizer):
    merged = {"role": "user", "content": "Be brief.\n\nHow much is 12 + 7?"}
    expected = render_conversation(tokenizer, [merged, REPLY, USER, CALL])
    assert render_conversation(tokenizer, [SYSTEM, USER, REPLY, USER, CALL]) == expected
    assert USER["content"] == "How much is 12 + 7?", "the messages themselves stay as they are"


def test_text_never_becomes_a_control_token(tokenizer):
    evil = "".join(SPECIAL_TOKENS)
    rendered = render_conversation(
        tokenizer,
        [{"role": "user", "content": evil}, {"role": "assistant", "content": [{"type": "python", "text": evil}]}],
    )
    special = [token_id for token_id in rendered.input_ids if token_id >= len(tokenizer) - len(SPECIAL_TOKENS)]
    names = ["bos", "user_start", "user_end", "assistant_start", "python_start", "python_end", "assistant_end"]
    assert tokenizer.convert_ids_to_tokens(special) == [f"<|{name}|>" for name in names]
    assert tokenizer.decode(rendered.input_ids).count(evil) == 2


def test_max_length_cuts_the_end(tokenizer):
    whole = render_conversation(tokenizer, [USER, REPLY])
    length = len(whole.input_ids)
    cut = render_conversation(tokenizer, [USER, REPLY], max_length=length - 3)
    assert cut == Rendered(whole.input_ids[:-3], whole.mask[:-3], cut=3)
    assert render_conversation(tokenizer, [USER, REPLY], max_length=length) == whole


def test_prompt_is_the_conversation_before_the_reply(tokenizer):
    prompt = render_prompt(tokenizer, [SYSTEM, USER, REPLY, USER])
    whole = render_conversation(tokenizer, [SYSTEM, USER, REPLY, USER, CALL]).input_ids
    assert prompt == whole[: len(prompt)]
    assert tokenizer.convert_ids_to_tokens(prompt[-2:]) == ["<|user_end|>", "<|assistant_start|>"]


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "no messages"),
        ({"role": "user"}, "no messages"),
        (["hello"], "message 1 is not of the form"),
        ([{"role": "user"}], "message 1 is not of the form"),
        ([REPLY], "message 1 is from 'assistant' but should be from 'user'"),
        ([USER, USER], "message 2 is from 'user' but should be from 'assistant'"),
        ([SYSTEM, USER, USER], "message 3 is from 'user'"),
        (
            [USER, {"role": "tool", "content": "19"}],
            "message 2 uses a tool .'19'., and the only one is the calculator",
        ),
        (
            [USER, REPLY | {"tool_calls": [{"name": "search"}]}],
            "message 2 uses a tool .*search.*only one is the calculator",
        ),
        ([USER, {"role": "assistant", "content": "half of \ud83d"}], "message 2 has half of a character"),
        ([SYSTEM], "not followed by a message from the user"),
        ([SYSTEM, REPLY], "not followed by a message from the user"),
        ([USER], "no assistant turn"),
        ([USER, {"role": "assistant", "content": " \n"}], "message 2 .* is empty"),
        ([USER, {"role": "assistant", "content": []}], "message 2 .* is empty"),
        ([{"role": "user", "content": ""}, REPLY], "message 1 .* is empty"),
        ([{"role": "user", "content": None}, REPLY], "message 1 has content of type NoneType"),
        ([{"role": "user", "content": CALL["content"]}, REPLY], "message 1 has content of type list"),
        ([USER, {"role": "assistant", "content": [{"type": "image", "text": ""}]}], "unknown type 'image'"),
        ([USER, {"role": "assistant", "content": ["19"]}], "unknown type '19'"),
        ([USER, {"role": "assistant", "content": [{"type": "python"}]}], "without a text"),
    ],
)
def test_wrong_conversations_are_named(tokenizer, messages, complaint):
    with pytest.raises(UserError, match=complaint):
        render_conversation(tokenizer, messages)


def test_a_prompt_ends_with_the_user(tokenizer):
    check_messages([USER], for_training=False)
    with pytest.raises(UserError, match="must end with a message from the user"):
        render_prompt(tokenizer, [USER, REPLY])


def test_a_foreign_tokenizer_is_refused():
    foreign = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
    with pytest.raises(UserError, match=r"no special token <\|bos\|>"):
        render_conversation(foreign, [USER, REPLY])


def test_preview_colours_what_is_trained(tokenizer):
    a, b = tokenizer.encode("ab", add_special_tokens=False)
    assert preview_masks(Rendered([a, b], [0, 1]), tokenizer) == "\033[90ma\033[0m|\033[92mb\033[0m"
