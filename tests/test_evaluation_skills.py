"""Taught skills with scripted replies: what is counted, what is held out, what chance is."""

from itertools import product

import pytest

from chatmodel.conversations.generated import GENERATED_TASKS, check_reply
from chatmodel.data.words import is_held_out
from chatmodel.evaluation import skills
from chatmodel.evaluation.chatcore import ChatLimits
from chatmodel.evaluation.skills import (
    draw_conversations,
    evaluate_skills,
    measure_chance,
    measure_reply,
    write_reference,
)
from chatmodel.runtime import UserError


@pytest.fixture(scope="module")
def words():
    """600 made-up words, of which about a fifth are held out."""
    return ["".join(letters) for letters in product("bcdfghlmpr", "aeiou", "lmnrst", ("ing", "er"))]


def script_replies(monkeypatch, script):
    asked = []

    def write(model, tokenizer, conversations, *, limits, label):
        asked.extend((label, messages, limits.max_new_tokens) for messages in conversations)
        return [script(messages) for messages in conversations]

    monkeypatch.setattr(skills, "write_replies", write)
    return asked


def test_reference_replies_are_all_right(monkeypatch, chat_model, tokenizer, words):
    asked = script_replies(monkeypatch, write_reference)
    result = evaluate_skills(chat_model, tokenizer, num_examples=12, words=words)
    assert list(result) == list(GENERATED_TASKS)
    for name, skill in result.items():
        assert skill["correct"] == skill["n"], name
        assert (skill["accuracy"], skill["stderr"]) == (1.0, 0.0)
        assert 1 / skill["n"] <= skill["chance"] < 1
    questions = [(label, messages[0]["content"]) for label, messages, _ in asked]
    assert len(questions) == len(set(questions))


def test_words_are_held_out(monkeypatch, chat_model, tokenizer, words):
    asked = script_replies(monkeypatch, lambda messages: "")
    result = evaluate_skills(chat_model, tokenizer, names=["SimpleSpelling"], num_examples=30, words=words)
    assert result["SimpleSpelling"]["correct"] == 0
    spelled = [messages[-1]["content"].partition(":")[0] for _, messages, _ in asked]
    assert len(set(spelled)) == 30
    assert all(is_held_out(word) for word in spelled)


def test_half_right_has_its_standard_error(monkeypatch, chat_model, tokenizer):
    count = iter(range(100))
    script_replies(monkeypatch, lambda messages: write_reference(messages) if next(count) % 2 else "no idea")
    skill = evaluate_skills(chat_model, tokenizer, names=["Arithmetic"], num_examples=100)["Arithmetic"]
    assert (skill["correct"], skill["n"], skill["accuracy"]) == (50, 100, 0.5)
    assert skill["stderr"] == pytest.approx(0.05)


def test_chance_is_the_best_single_reply():
    def count_question(answer):
        content = [{"type": "python", "text": "call"}, {"type": "text", "text": f"#### {answer}"}]
        return [{"role": "user", "content": "?"}, {"role": "assistant", "content": content}]

    conversations = [count_question(answer) for answer in (1, 2, 1, 3, 1, 0, 2, 1)]
    assert measure_chance("LetterCounting", conversations) == 4 / 8
    assert write_reference(conversations[0]) == "call#### 1"
    assert check_reply("LetterCounting", conversations[0], "#### 1")


def test_replies_get_twice_the_room_of_the_longest_reference(monkeypatch, chat_model, tokenizer):
    asked = script_replies(monkeypatch, lambda messages: "")
    evaluate_skills(chat_model, tokenizer, names=["Arithmetic"], num_examples=5)
    longest = max(measure_reply(tokenizer, messages) for _, messages, _ in asked)
    assert {room for _, _, room in asked} == {2 * longest}
    asked.clear()
    limits = ChatLimits(max_new_tokens=4)
    evaluate_skills(chat_model, tokenizer, names=["Arithmetic"], num_examples=5, limits=limits)
    assert {room for _, _, room in asked} == {4}


def test_a_task_with_few_questions_is_not_stretched():
    conversations = draw_conversations("Identity", 1000, words=(), identity=None)
    assert 10 < len(conversations) < 1000
    assert len({messages[0]["content"] for messages in conversations}) == len(conversations)


def test_a_random_model_goes_through(chat_model, tokenizer, words):
    limits = ChatLimits(max_new_tokens=5)
    result = evaluate_skills(
        chat_model, tokenizer, names=["LetterCounting"], num_examples=3, words=words, limits=limits
    )
    assert result["LetterCounting"]["n"] == 3


def test_bad_requests(chat_model, tokenizer):
    with pytest.raises(UserError, match="no skill 'Juggling'"):
        evaluate_skills(chat_model, tokenizer, names=["Juggling"])
    with pytest.raises(UserError, match="num_skill_examples is 0"):
        evaluate_skills(chat_model, tokenizer, num_examples=0)
