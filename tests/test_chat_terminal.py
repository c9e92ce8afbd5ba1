"""The terminal's commands and input, with lines that a list types and a model that is not random."""

import io
import json

import pytest
import torch
from parrot import make_parrot
from rich.console import Console

from chatmodel.chat.conversation import Conversation, Sampling
from chatmodel.chat.terminal import COMMANDS, Terminal, complete_command
from chatmodel.conversations.files import convert_row, read_rows
from chatmodel.conversations.render import render_conversation
from chatmodel.runtime import UserError

REPLY = "is <|python_start|>1+2<|python_end|><|output_start|>3<|output_end|>3."


@pytest.fixture(scope="module")
def parrot(tokenizer):
    return make_parrot(tokenizer, "<|python_start|>1+2<|python_end|>", "so on,", context=256)


@pytest.fixture
def talk(parrot, tokenizer):
    """A session of typed lines (an exception stands for its key): all that is shown, and the terminal."""

    def run(*lines, **options):
        typed = iter(lines)
        sampling = Sampling(temperature=0.0, max_new_tokens=16)

        def read(prompt):
            line = next(typed, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        shown = io.StringIO()
        console = Console(file=shown, markup=False, emoji=False, highlight=False, soft_wrap=True, **options)
        terminal = Terminal(parrot, tokenizer, sampling=sampling, console=console, read=read)
        terminal.run()
        assert next(typed, None) is None, "it ended early"
        return shown.getvalue(), terminal

    return run


def test_commands_change_the_settings(talk):
    shown, terminal = talk(
        "/temperature 0.25", "/temperature", "/temperature hot", "/temperature nan", "/temperature -1"
    )
    assert shown.count("the temperature is 0.25") == 2
    assert "'hot' is no number" in shown
    assert shown.count("must be 0 (greedy) or more") == 2
    assert terminal.sampling.temperature == 0.25


def test_help_names_every_command(talk):
    shown, _ = talk("/help", "/unknown")
    assert all(command in shown for command in COMMANDS)
    assert "there is no command /unknown" in shown
    assert [complete_command("/t", state) for state in range(3)] == ["/temperature", "/tokens", None]


def test_a_conversation_is_kept_and_forgotten(talk):
    shown, terminal = talk("Hi", "/system Be brief.", "Hi", "again")
    assert shown.count("model: [1+2 = 3]so on,") == 3
    assert [message["role"] for message in terminal.conversation.with_system()] == ["system"] + 2 * [
        "user",
        "assistant",
    ]
    _, terminal = talk("Hi", "/reset")
    assert terminal.conversation.messages == []


def test_long_questions_are_typed_in_lines(talk):
    _, terminal = talk("one\\", "two", '"""three', "", 'four"""', '"""five"""')
    questions = [message["content"] for message in terminal.conversation.messages if message["role"] == "user"]
    assert questions == ["one\ntwo", "three\n\nfour", "five"]


def test_the_last_question_is_answered_again(talk):
    shown, terminal = talk("/retry", "Hi", "/retry")
    assert "there is no question" in shown
    assert shown.count("model: ") == 2
    assert len(terminal.conversation.messages) == 2


def test_interrupts_end_neither_the_program_nor_the_order_of_turns(talk):
    shown, terminal = talk(KeyboardInterrupt(), '"""a', KeyboardInterrupt(), "Hi", "/quit")
    assert shown.count("(/quit or Ctrl-D leaves)") == 2
    assert len(terminal.conversation.messages) == 2


def test_a_full_context_is_said_and_mended(talk):
    shown, terminal = talk("x " * 105, "Hi", "1234567890" * 60, "/tokens", "/reset", "/tokens")
    assert "of the context's 256 tokens are used; /reset begins anew" in shown
    assert (
        "the model's context holds 256, the answer included; shorten the conversation or start a new one (/reset"
        in shown
    )
    assert "the conversation takes 0 tokens of the context's 256" in shown
    assert "|<|output_start|>|3|<|output_end|>|s|o| on|," in shown
    assert terminal.conversation.messages == []


def test_calls_have_a_colour_where_there_are_colours(talk):
    coloured, _ = talk("Hi", force_terminal=True, color_system="standard")
    assert "model: \x1b[0m\x1b[36m[\x1b[0m\x1b[36m1+2" in coloured
    assert "3\x1b[0m\x1b[36m]\x1b[0mso" in coloured
    plain, _ = talk("Hi")
    assert "\x1b" not in plain
    assert "[1+2 = 3]so on," in plain


def test_a_saved_conversation_is_training_data(tokenizer, tmp_path):
    path = tmp_path / "chat.jsonl"
    conversation = Conversation("Be brief.")
    with pytest.raises(UserError, match="nothing to save"):
        conversation.save(path)
    conversation.ask("What is 1+2?")
    assert conversation.add_reply(REPLY)
    for _ in range(2):
        conversation.save(path)
    rows = read_rows(path).rows
    assert len(rows) == 2
    text = tokenizer.decode(render_conversation(tokenizer, convert_row(rows[0])).input_ids)
    assert text == (
        "<|bos|><|user_start|>Be brief.\n\nWhat is 1+2?<|user_end|><|assistant_start|>"
        "is <|python_start|>1+2<|python_end|><|output_start|>3<|output_end|>3.<|assistant_end|>"
    )
    assert json.loads(conversation.to_json())["messages"][0]["role"] == "system"
    with pytest.raises(UserError, match="cannot be written"):
        conversation.save(tmp_path / "none" / "chat.jsonl")


def test_an_empty_answer_is_forgotten_with_its_question():
    conversation = Conversation()
    conversation.ask("Hi")
    assert not conversation.add_reply(" \n")
    assert conversation.messages == []


def test_the_ids_of_an_answer_end_its_conversation(tokenizer):
    conversation = Conversation()
    conversation.ask("What is 1+2?")
    asked = conversation.render(tokenizer)
    assert conversation.split_at_answer(tokenizer) == ([], [])
    conversation.add_reply(REPLY)
    before, answer = conversation.split_at_answer(tokenizer)
    assert before == asked
    assert tokenizer.decode(answer) == REPLY + "<|assistant_end|>"
    assert conversation.render(tokenizer) == asked + answer
    assert conversation.count_tokens(tokenizer) == len(asked + answer)


def test_the_ids_of_an_answer_are_those_that_the_model_chose(parrot, tokenizer):
    conversation, ids = Conversation(), []
    conversation.ask("Hi")
    sampling = Sampling(temperature=0.0, max_new_tokens=16)
    conversation.add_reply("".join(conversation.stream_answer(parrot, tokenizer, sampling, ids=ids)), ids)
    output = parrot.generate(torch.tensor([conversation.split_at_answer(tokenizer)[0]]), max_new_tokens=16)
    assert conversation.split_at_answer(tokenizer)[1] == ids == output[0, -16:].tolist()
    letters = tuple(tokenizer.encode("s", add_special_tokens=False) + tokenizer.encode("o", add_special_tokens=False))
    conversation.answer_ids = letters  # as a model may cut it
    assert conversation.split_at_answer(tokenizer)[1] == list(letters)
    conversation.forget_answer()
    assert conversation.answer_ids == ()
