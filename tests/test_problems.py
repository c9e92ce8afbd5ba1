"""The problems of reinforcement learning carry their answers, and pass@1 counts right completions."""

import pytest

from chatmodel import problems
from chatmodel.conversations.mixtures import MixtureEntry, open_entry
from chatmodel.problems import build_problems, measure_pass
from chatmodel.runtime import UserError

WORDS = ["banana", "cherry", "apple", "grape", "lemon", "melon", "peach", "plum", "pear", "orange"] * 3


def test_problems_hold_question_and_answer():
    source = open_entry(MixtureEntry("Arithmetic", rows=5))
    rows = build_problems(source)
    assert len(rows) == 5
    for index, row in enumerate(rows):
        assert row["prompt"] == source.read(index)[:-1]
        assert source.read(index)[-1]["content"][-1]["text"].endswith(f"#### {row['answer']}")


def test_spelling_holds_the_word():
    rows = build_problems(open_entry(MixtureEntry("SimpleSpelling", rows=4), words=WORDS))
    assert all(row["prompt"][0]["content"] == f"Spell the word: {row['word']}" for row in rows)


def test_a_task_without_answers_is_refused():
    with pytest.raises(UserError, match="Identity"):
        build_problems(open_entry(MixtureEntry("Identity", rows=4)))


def test_pass_counts_right_completions(tokenizer, monkeypatch):
    source = open_entry(MixtureEntry("Arithmetic", rows=4), split="validation")
    answers = build_problems(source)["answer"]
    texts = [f"#### {answers[0]}", "#### 1234567", f"so #### {answers[2]}", "no"]
    replies = [[tokenizer.encode(text, add_special_tokens=False)] for text in texts]
    monkeypatch.setattr(problems, "generate_replies", lambda *args, **kwargs: replies)
    measured = measure_pass(None, tokenizer, source, max_new_tokens=8, batch_size=4)
    assert (measured["correct"], measured["n"], measured["accuracy"]) == (2, 4, 0.5)
    assert [each["reward"] for each in measured["completions"]] == [1.0, 0.0, 1.0, 0.0]
