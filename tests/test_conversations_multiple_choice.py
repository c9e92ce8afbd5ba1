"""Multiple choice questions with letters, made of other questions and of conversations."""

import random

import pytest

from chatmodel.conversations.datasets import task_messages
from chatmodel.conversations.multiple_choice import (
    ChoiceQuestion,
    pair_with_others,
    read_listed_options,
    read_public_question,
    vary_choices,
    write_choice,
)
from chatmodel.runtime import UserError

ROW = {
    "question": "What melts?",
    "choices": {"text": ["ice", "stone", "air"], "label": ["1", "2", "3"]},
    "answerKey": "1",
}


def talk(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_the_letter_follows_its_choice():
    question = read_public_question("ARC-Easy", ROW)
    assert question == ChoiceQuestion("What melts?", "ice", ("stone", "air"))
    letters = set()
    for messages in vary_choices([question], 20, seed="s"):
        letter = messages[1]["content"]
        letters.add(letter)
        assert f"- ice={letter}\n" in messages[0]["content"]
    assert letters == {"A", "B", "C"}


def test_the_form_is_the_benchmarks():
    row = {"question": "2 + 2?", "choices": ["1", "2", "3", "4"], "answer": 3}
    question = read_public_question("MMLU", row)

    class Unshuffled(random.Random):
        def shuffle(self, x):
            x.append(x.pop(0))  # the right one last, as in the row

        def sample(self, population, k):
            return list(population)[:k]

    assert write_choice(question, Unshuffled()) == task_messages("MMLU", row)
    with pytest.raises(UserError, match="GSM8K has no choices"):
        read_public_question("GSM8K", row)


def test_listed_options_are_read():
    asked = "Use reasoning to answer this. What do bees make?\nOptions:\n- (A) wax\n- (B) honey\n- (C) milk"
    whole = talk(f"{asked}\n- (D) silk\n- (E) oil\nThink:", "Bees make honey.\nSo, the answer is (B).")
    assert read_listed_options(whole) == ChoiceQuestion("What do bees make?", "honey", ("wax", "milk", "silk", "oil"))
    # What follows the last option on its line cannot be told from it: it is no wrong answer, and right only by name.
    unclear = talk(f"{asked}\n- (D) silk\n- (E) oil Think:", "The answer: (E).")
    assert read_listed_options(unclear) is None
    named = talk("Where?\nOptions:\n- sea\n- sky\n- wood\n- town hall Think:", "So the final answer is town hall.")
    assert read_listed_options(named) == ChoiceQuestion("Where?", "town hall", ("sea", "sky", "wood"))


@pytest.mark.parametrize("reply", ["I do not know.", "The answer is gold."])
def test_what_has_no_clear_answer_is_left_out(reply):
    assert read_listed_options(talk("Where?\nOptions:\n- sea\n- sky\n- wood\n- town\n", reply)) is None
    assert read_listed_options(talk("Where are you?", reply)) is None


def test_answers_of_others_are_the_wrong_ones():
    said = [
        ("book", talk(f"Question {i}?", f"answer number {word}"))
        for i, word in enumerate(["one", "two", "three", "four"])
    ]
    said += [("book", talk("How much?", "12")), ("other", talk("Who?", "nobody else"))]
    questions = pair_with_others(said)
    assert [question.right for question in questions] == [
        f"answer number {w}" for w in ("one", "two", "three", "four")
    ]
    assert questions[0].wrong == ("answer number two", "answer number three", "answer number four")
