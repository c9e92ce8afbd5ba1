"""What is shown of a reply: calls with their results, no steering characters, no markup that the model wrote."""

import re
from html import unescape

import pytest

from chatmodel.chat.display import as_html, escape_text, show_calls, show_parts
from chatmodel.generation import parse_reply

REPLY = ["is ", "<|python_start|>", "1+2", "<|python_end|>", "<|output_start|>", "3", "<|output_end|>", "3."]


@pytest.mark.parametrize(
    ("pieces", "shown", "calls"),
    [
        (["Hello ", "you."], "Hello you.", ""),
        (REPLY, "is [1+2 = 3]3.", "[1+2 = 3]"),
        (["<|python_start|>", "ab", "<|python_end|>", " so"], "[ab] so", "[ab]"),
        (["<|python_start|>", "1+"], "[1+]", "[1+]"),
        (["red \x1b[31m\a\ttab\n"], "red \N{REPLACEMENT CHARACTER}[31m\N{REPLACEMENT CHARACTER}\ttab\n", ""),
        (["\x9b31m"], "\N{REPLACEMENT CHARACTER}31m", ""),
    ],
    ids=["no call", "call", "refused call", "unfinished call", "control characters", "8-bit control character"],
)
def test_calls_are_shown_with_their_results(pieces, shown, calls):
    parts = list(show_calls(pieces))
    assert "".join(text for text, _ in parts) == shown
    assert "".join(text for text, is_call in parts if is_call) == calls
    kept = show_parts(parse_reply("".join(pieces)))
    assert "".join(text for text, _ in kept) == shown, "a kept reply looks as it did when it came"


def test_what_a_model_writes_is_no_markup():
    attack = '<script>alert(1)</script>\n# *title* [a](javascript:x) `code` $$x$$ &amp; "quoted"  \x1b'
    html = as_html(show_calls([attack]))
    assert re.fullmatch(r"(?:[\w ]|&#\d+;|&nbsp;|<br>)*", html)
    text = unescape(html.replace("<br>", "\n")).replace("\xa0", " ")
    assert text == attack.replace("\x1b", "\N{REPLACEMENT CHARACTER}")
    assert as_html(show_calls(REPLY)).count("<span") == 1
    assert "<" not in escape_text('<b title="x">').replace("&lt;", "")
