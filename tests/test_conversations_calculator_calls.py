"""Calculator calls put where a reply calculates in plain text."""

from chatmodel.conversations.calculator_calls import add_calls, call_calculator
from chatmodel.conversations.datasets import convert_gsm8k


def test_a_reply_becomes_what_gsm8k_would_make_of_it():
    annotated = {"question": "?", "answer": "He has (3+4) * 2 = <<(3+4)*2=14>>14 left.\n#### 14"}
    expected = convert_gsm8k(annotated)[1]["content"]
    assert call_calculator("He has (3+4) * 2 = 14 left.\n#### 14") == expected


def test_only_right_equations_become_calls():
    for text in ("7+2 = 10\n#### 10", "x + 1 = 3", "10/3 = 3.333", "There are 12.", "1 = 1", "2 + 3 = 5/1"):
        assert call_calculator(text) == [{"type": "text", "text": text}]
    parts = call_calculator("1,000 - 1 = 999 and 8/4=2.")
    assert [part["text"] for part in parts if part["type"] == "python"] == ["1,000-1", "8/4"]
    assert "".join(part["text"] for part in parts if part["type"] == "text") == "1,000 - 1 = 999 and 8/4=2."


def test_only_replies_change():
    messages = [{"role": "user", "content": "Is 1+1 = 2?"}, {"role": "assistant", "content": "Yes."}]
    assert add_calls(messages) == messages
