"""What the web page does, without a browser or gradio: answers side by side, stop, retry, export, the inspector."""

import json
import re
from html import unescape

import pytest
from parrot import make_parrot

from chatmodel.chat.conversation import Conversation, Sampling
from chatmodel.chat.inspection import Alternative, InspectedLayer, InspectedToken
from chatmodel.chat.inspector import find_colour, show_grid, show_layers, show_tokens
from chatmodel.chat.page import ChatPage, Voice, show_messages
from chatmodel.conversations.files import convert_row, read_rows
from chatmodel.runtime import UserError

GREEDY = Sampling(temperature=0.0, max_new_tokens=24)


@pytest.fixture(scope="module")
def page(tokenizer):
    first = make_parrot(tokenizer, "<|python_start|>1+2<|python_end|>", "so on,", context=256)
    second = make_parrot(tokenizer, "<|python_start|>3*4<|python_end|>", " and then", context=128)
    return ChatPage([Voice("first", first, tokenizer), Voice("second", second, tokenizer)], pause=0)


def text_of(conversation):
    return "".join(part["text"] for part in conversation.messages[-1]["content"] if part["type"] == "text")


def test_all_models_answer_at_once(page):
    asked = page.ask(" Hi ", page.begin(), "")
    steps = list(page.answer(asked, GREEDY, "me"))
    grown, problems = steps[-1]
    assert [text_of(each)[:9] for each in grown] == ["so on,so ", " and then"]
    assert problems == ["", ""]
    assert len(steps) > 8, "it comes piece by piece"
    assert all(each.messages == [{"role": "user", "content": "Hi"}] for each in asked), "states are not changed"
    shown = show_messages(grown[0])
    assert shown[0] == {"role": "user", "content": "Hi"}
    assert '<span class="call" title="the calculator">&#91;1&#43;2 &#61; 3&#93;</span>so on' in shown[1]["content"]
    assert page.stops == {}


def test_an_answer_is_stopped_and_asked_for_again(page):
    asked = page.ask("Hi", page.begin(), "")
    answering = page.answer(asked, Sampling(temperature=0.0, max_new_tokens=10_000), "me")
    grown = next(answering)[0]
    while not text_of(
        grown[0] if grown[0].messages[-1]["role"] == "assistant" else Conversation("", [{"content": []}])
    ):
        grown = next(answering)[0]
    page.stop("someone else")
    page.stop("me")
    rest = list(answering)
    assert len(rest) <= 2, "no more pieces"
    stopped = rest[-1][0]
    assert 0 < len(text_of(stopped[0])) < 200
    again = page.retry(stopped)
    assert [each.messages for each in again] == [each.messages for each in asked]
    followed = page.ask("more", stopped, "")
    assert [message["role"] for message in followed[0].messages] == ["user", "assistant", "user"]


def test_a_model_that_fails_says_so_and_a_visitor_may_leave(page, tokenizer, caplog):
    asked = page.ask("Hi", page.begin(), "")
    answering = page.answer(asked, Sampling(temperature=0.0, max_new_tokens=10_000), "me")
    next(answering)
    answering.close()
    assert page.stops == {}
    broken = ChatPage([page.voices[0], Voice("second", None, tokenizer)])
    grown, problems = list(broken.answer(asked, GREEDY, "me"))[-1]
    assert problems == ["", "the model failed at this answer; the log says how"]
    assert text_of(grown[0])
    assert "second failed at an answer" in caplog.text


def test_a_conversation_that_does_not_fit_is_refused_by_itself(page):
    asked = page.ask("1 " * 100, page.begin(), "")
    grown, problems = list(page.answer(asked, GREEDY, "me"))[-1]
    assert problems[0] == ""
    assert "the model's context holds 128" in problems[1]
    assert grown[1].messages[-1]["role"] == "user"
    assert 'class="refused"' in show_messages(grown[1], problems[1])[-1]["content"]
    again = page.ask("Hi", grown, "")
    assert [message["content"] for message in again[1].messages] == ["Hi"], "the refused question has gone"


def test_questions_have_bounds_and_instructions_begin_anew(page):
    for question in ("", "  \n", "x" * 32_001):
        with pytest.raises(UserError):
            page.ask(question, page.begin(), "")
    with pytest.raises(UserError, match="instructions"):
        page.ask("Hi", page.begin(), "x" * 8_001)
    asked = page.ask("Hi", page.ask("Hi", page.begin(), ""), "Be brief.")
    assert [each.with_system()[0]["content"] for each in asked] == ["Be brief."] * 2
    assert len(asked[0].messages) == 1


def test_exports_are_training_data(page, tmp_path):
    grown, _ = list(page.answer(page.ask("Grüße", page.begin(), "Be brief."), GREEDY, "me"))[-1]
    path = tmp_path / "conversation.jsonl"
    path.write_text(page.export(grown), encoding="utf-8")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["model"] for line in lines] == ["first", "second"]
    messages = convert_row(read_rows(path).rows[0])
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert page.export(page.begin()) == ""


def test_the_inspector_shows_the_last_answer(page):
    grown, _ = list(page.answer(page.ask("Hi", page.begin(), ""), GREEDY, "me"))[-1]
    html = page.inspect(grown, "second")
    assert unescape("".join(re.findall(r'tabindex="0">(.*?)<span class="tip">', html))).startswith(
        "<|python_start|>3*4<|python_end|><|output_start|>12<|output_end|> and then"
    )
    assert html.count('class="token forced') + html.count('class="token control forced') == 4  # both marks, 1 and 2
    assert "behind each layer" in page.look_at_token(grown, "first", 3)
    assert page.look_at_token(grown, "first", 10**9), "a place beyond the end is the last"
    assert "embeddings" in page.look_at_answer(grown, "first")
    with pytest.raises(UserError, match="no answer to inspect"):
        page.inspect(page.begin(), "first")


def make_token(text, probability, rank=1, forced=False):
    return InspectedToken(7, text, probability, rank, forced, (Alternative(7, text, probability),))


def test_the_inspector_writes_no_markup_of_the_model():
    attack = '<img src=x onerror="alert(1)">'
    tokens = [make_token(attack, 0.5), make_token("\n", 0.25, rank=3), make_token("42", 1e-6, forced=True)]
    html = show_tokens(tokens)
    assert "<img" not in html
    assert "&lt;img" in html
    assert "3 tokens, 2 of them chosen by the model: 1 were its first choice, 1.50 bits of surprise" in html
    assert "&lt; 0.05 %" in html
    layers = [InspectedLayer("embeddings", tuple(tokens)), InspectedLayer("layer 1", tuple(tokens))]
    assert "<img" not in show_layers(layers) + show_grid(layers)
    assert show_grid(layers).index("layer 1") < show_grid(layers).index("embeddings")
    assert "no answer" in show_tokens([])


def test_colours_go_from_orange_to_teal():
    assert find_colour(0) == "rgba(249,115,22,0.80)"
    assert find_colour(0.25) == "rgba(250,204,21,0.50)"
    assert find_colour(1) == "rgba(45,212,191,0.50)"
