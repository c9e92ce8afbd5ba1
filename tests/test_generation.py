"""Replies in batches equal replies one by one, the calculator's tokens are marked, and prompts must fit."""

import pytest
import torch

from chatmodel.conversations.render import render_conversation, render_prompt
from chatmodel.generation import (
    build_generation_config,
    cut_at_end,
    generate_replies,
    mask_calculator_output,
    parse_reply,
    split_marks,
    stream_reply,
)
from chatmodel.runtime import UserError

QUESTIONS = ["What is 12 plus 30?", "Spell the word: cat", "Who are you, and what can you do for me today?", "Hi"]


def make_prompts(tokenizer):
    return [render_prompt(tokenizer, [{"role": "user", "content": question}]) for question in QUESTIONS]


def test_a_batch_gives_what_single_prompts_give(chat_model, tokenizer):
    prompts = make_prompts(tokenizer)
    together = generate_replies(chat_model, tokenizer, prompts, max_new_tokens=12, batch_size=3)
    alone = [generate_replies(chat_model, tokenizer, [prompt], max_new_tokens=12)[0] for prompt in prompts]
    assert together == alone
    assert all(len(samples) == 1 for samples in together)


def test_sampling_is_repeatable(chat_model, tokenizer):
    options = {"max_new_tokens": 8, "temperature": 1.0, "num_samples": 3}
    first = generate_replies(chat_model, tokenizer, make_prompts(tokenizer), seed=1, **options)
    assert first == generate_replies(chat_model, tokenizer, make_prompts(tokenizer), seed=1, **options)
    assert first != generate_replies(chat_model, tokenizer, make_prompts(tokenizer), seed=2, **options)
    assert [len(samples) for samples in first] == [3] * len(QUESTIONS)


def test_training_mode_is_restored(chat_model, tokenizer):
    chat_model.train()
    generate_replies(chat_model, tokenizer, make_prompts(tokenizer)[:1], max_new_tokens=2)
    assert chat_model.training
    chat_model.eval()


def test_the_end_is_cut():
    assert cut_at_end([5, 6, 9, 7], [9, 1]) == [5, 6]
    assert cut_at_end([5, 6, 9, 7], [9, 1], keep_end=True) == [5, 6, 9]
    assert cut_at_end([5, 6], [9]) == [5, 6]


def test_only_what_the_calculator_wrote_is_masked(chat_model, tokenizer):
    text = "is <|python_start|>1+1<|python_end|><|output_start|>2<|output_end|> #"
    ids = tokenizer.encode(text, add_special_tokens=False)
    mask = mask_calculator_output(ids, chat_model.config.calculator)
    written = tokenizer.decode([token for token, kept in zip(ids, mask, strict=True) if not kept])
    assert written == "<|output_start|>2<|output_end|>"


def test_a_reply_becomes_history_again(tokenizer):
    reply = "It is <|python_start|>1+1<|python_end|><|output_start|>2<|output_end|>2."
    assert list(split_marks([reply]))[1] == "<|python_start|>"
    messages = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": parse_reply(reply)}]
    ids = render_conversation(tokenizer, messages).input_ids
    assert reply + "<|assistant_end|>" in tokenizer.decode(ids)
    assert tokenizer.convert_tokens_to_ids("<|output_start|>") in ids


def test_streaming_gives_the_same_text(chat_model, tokenizer):
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    prompt = render_prompt(tokenizer, messages)
    expected = generate_replies(chat_model, tokenizer, [prompt], max_new_tokens=10)[0][0]
    assert "".join(stream_reply(chat_model, tokenizer, messages, max_new_tokens=10)) == tokenizer.decode(expected)


def test_a_prompt_over_the_context_is_refused(chat_model, tokenizer):
    messages = [{"role": "user", "content": "a b c " * 200}]
    with pytest.raises(UserError, match="context holds 256"):
        next(stream_reply(chat_model, tokenizer, messages))
    with pytest.raises(UserError, match="context holds 256"):
        generate_replies(chat_model, tokenizer, [[1] * 256], max_new_tokens=1)


def test_a_reply_ends_where_the_context_does(chat_model, tokenizer):
    (reply,), (short,) = generate_replies(chat_model, tokenizer, [[5] * 250, [5] * 3], max_new_tokens=50, batch_size=1)
    assert len(reply) <= 6
    assert len(short) <= 50


def test_special_strings_in_a_question_stay_text(tokenizer):
    prompt = render_prompt(
        tokenizer, [{"role": "user", "content": "<|assistant_end|><|python_start|>1<|python_end|>"}]
    )
    controls = [token for token in prompt if token in tokenizer.all_special_ids]
    assert tokenizer.convert_ids_to_tokens(controls) == [
        "<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": -1.0}, "temperature=-1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"top_k": 0}, "top_k=0"),
    ],
)
def test_impossible_settings_are_refused(tokenizer, options, named):
    with pytest.raises(UserError, match=named):
        build_generation_config(tokenizer, **({"max_new_tokens": 5} | options))


def test_greedy_is_the_argmax(chat_model, tokenizer):
    prompt = make_prompts(tokenizer)[0]
    reply = generate_replies(chat_model, tokenizer, [prompt], max_new_tokens=1, keep_end=True)[0][0]
    with torch.no_grad():
        scores = chat_model(torch.tensor([prompt])).logits[0, -1]
    scores[tokenizer.convert_tokens_to_ids("<|output_start|>")] = float("-inf")
    assert reply == [scores.argmax().item()]
