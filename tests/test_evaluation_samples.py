"""Sample completions and conversations: what is asked, and how replies are read."""

from chatmodel.conversations.render import render_prompt
from chatmodel.evaluation import samples
from chatmodel.evaluation.samples import SAMPLE_PROMPTS, complete_sample_prompts, hold_sample_chats, split_reply


def script_replies(monkeypatch, tokenizer, replies):
    """Let generation give these texts, in order; returns what it was asked."""
    queue, asked = iter(replies), []

    def generate(model, _, prompts, *, max_new_tokens):
        asked.extend((ids, max_new_tokens) for ids in prompts)
        return [[tokenizer.encode(next(queue), add_special_tokens=False)] for _ in prompts]

    monkeypatch.setattr(samples, "generate_replies", generate)
    return asked


def test_seven_prompts_begin_with_bos_and_get_16_tokens(monkeypatch, chat_model, tokenizer):
    asked = script_replies(monkeypatch, tokenizer, [f" reply {n}" for n in range(7)])
    completions = complete_sample_prompts(chat_model, tokenizer)
    assert [sample["prompt"] for sample in completions] == list(SAMPLE_PROMPTS)
    assert [sample["completion"] for sample in completions] == [f" reply {n}" for n in range(7)]
    for (ids, room), prompt in zip(asked, SAMPLE_PROMPTS, strict=True):
        assert tokenizer.decode(ids) == f"<|bos|>{prompt}"
        assert room == 16


def test_a_random_model_completes(chat_model, tokenizer):
    greedy = complete_sample_prompts(chat_model, tokenizer, max_new_tokens=4)
    assert greedy == complete_sample_prompts(chat_model, tokenizer, max_new_tokens=4)
    assert any(sample["completion"] for sample in greedy)
    chats = hold_sample_chats(chat_model, tokenizer, max_new_tokens=4)
    assert len(chats) == len(samples.SAMPLE_QUESTIONS)


def test_conversations_take_turns(monkeypatch, chat_model, tokenizer):
    calls = "It is <|python_start|>1+1<|python_end|><|output_start|>2<|output_end|>#### 2"
    asked = script_replies(monkeypatch, tokenizer, ["I am a model.", "", calls, "2", "Fine."])
    questions = [("Who are you?", "What is 1 + 1?"), ("Hello?", "Anybody?"), ("Calculate.", "Thanks.")]
    first, second, third = (chat["messages"] for chat in hold_sample_chats(chat_model, tokenizer, questions=questions))
    # The second reply is empty, so that conversation ends.
    assert [message["role"] for message in first] == ["user", "assistant", "user", "assistant"]
    assert [message["content"] for message in second] == ["Hello?", ""]
    parts = [
        {"type": "text", "text": "It is "},
        {"type": "python", "text": "1+1"},
        {"type": "python_output", "text": "2"},
        {"type": "text", "text": "#### 2"},
    ]
    assert third[1]["content"] == parts
    assert first[1]["content"] == "I am a model."
    assert (first[3]["content"], third[3]["content"]) == ("2", "Fine.")
    # What was said before is in the prompt, calls included.
    assert asked[4][0] == render_prompt(tokenizer, third[:3])


def test_a_full_context_ends_a_conversation(chat_model, tokenizer):
    (chat,) = hold_sample_chats(chat_model, tokenizer, questions=[("why " * 400, "and?")], max_new_tokens=2)
    assert [message["role"] for message in chat["messages"]] == ["user"]


def test_replies_without_calls_are_text(tokenizer):
    def split(text):
        return split_reply(tokenizer, tokenizer.encode(text, add_special_tokens=False))

    assert split("plain") == "plain"
    assert split("") == ""
    assert split("cut <|python_start|>1+") == "cut <|python_start|>1+"
    assert split("<|python_start|>1+1<|python_end|>") == [{"type": "python", "text": "1+1"}]
