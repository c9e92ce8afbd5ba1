"""The terminal chat: what is shown and kept of a reply, its commands, and a whole session in a pseudo-terminal."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from chatmodel import GPTConfig, GPTForCausalLM
from chatmodel.checkpoint import save_model_folder
from chatmodel.conversations.files import convert_row, read_rows
from chatmodel.conversations.render import render_conversation
from chatmodel.tokenizer import calculator_table

SCRIPT = Path(__file__).parents[1] / "scripts" / "chat_cli.py"
REPLY = ["is ", "<|python_start|>", "1+2", "<|python_end|>", "<|output_start|>", "3", "<|output_end|>", "3."]


@pytest.fixture(scope="module")
def chat_cli():
    specification = importlib.util.spec_from_file_location("chat_cli", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def chat(chat_cli):
    return chat_cli.Chat("", {"temperature": 0.6})


@pytest.mark.parametrize(
    ("pieces", "shown", "calls"),
    [
        (["Hello ", "you."], "Hello you.", ""),
        (REPLY, "is [1+2 = 3]3.", "[1+2 = 3]"),
        (["<|python_start|>", "ab", "<|python_end|>", " so"], "[ab] so", "[ab]"),
        (["<|python_start|>", "1+"], "[1+]", "[1+]"),
        (["red \x1b[31m\a\ttab\n"], "red \N{REPLACEMENT CHARACTER}[31m\N{REPLACEMENT CHARACTER}\ttab\n", ""),
    ],
    ids=["no call", "call", "refused call", "unfinished call", "control characters"],
)
def test_calls_are_shown_with_their_results(chat_cli, pieces, shown, calls):
    parts = list(chat_cli.show_calls(pieces))
    assert "".join(text for text, _ in parts) == shown
    assert "".join(text for text, is_call in parts if is_call) == calls


def test_a_saved_conversation_is_training_data(chat, tokenizer, tmp_path):
    path = tmp_path / "chat.jsonl"
    assert chat.command(f"/save {path}") == "there is nothing to save yet"
    chat.command("/system Be brief.")
    chat.messages = [{"role": "user", "content": "What is 1+2?"}]
    assert chat.add_reply("".join(REPLY))
    for _ in range(2):
        assert chat.command(f"/save {path}") == f"added to {path}"
    rows = read_rows(path).rows
    assert len(rows) == 2
    text = tokenizer.decode(render_conversation(tokenizer, convert_row(rows[0])).input_ids)
    assert text == (
        "<|bos|><|user_start|>Be brief.\n\nWhat is 1+2?<|user_end|><|assistant_start|>"
        "is <|python_start|>1+2<|python_end|><|output_start|>3<|output_end|>3.<|assistant_end|>"
    )
    assert "cannot be written" in chat.command(f"/save {tmp_path}/none/chat.jsonl")


def test_an_empty_answer_is_forgotten_with_its_question(chat):
    chat.messages = [{"role": "user", "content": "Hi"}]
    assert not chat.add_reply(" \n")
    assert chat.messages == []


def test_commands_change_the_settings(chat):
    assert chat.command("/temperature 0") == "the temperature is 0.0"
    for value in ("hot", "-1", "nan", ""):
        assert chat.command(f"/temperature {value}").startswith("the temperature is 0.0")
    assert chat.options["temperature"] == 0
    chat.messages = [{"role": "user", "content": "Hi"}]
    assert "/quit" in chat.command("/unknown")
    assert chat.messages
    chat.command("/reset")
    assert chat.messages == []


def make_parrot(tokenizer, beginning: str, cycle: str, context: int) -> GPTForCausalLM:
    """A model that answers anything with `beginning` (a calculator's result filled in) and `cycle` over and over.

    Its layers start as the identity, so that each token alone decides the next: every one may stand there once.
    """
    first = tokenizer.encode("<|assistant_start|>" + beginning, add_special_tokens=False)
    rest = tokenizer.encode(cycle, add_special_tokens=False)
    steps = list(zip([*first, *rest], [*first[1:], *rest, rest[0]], strict=True))
    table = calculator_table(tokenizer)
    steps.append((table["output_end"], rest[0]))
    assert len(dict(steps)) == len(steps), "a token stands twice"
    ends = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    ends["eos_token_id"] = tokenizer.eos_token_id
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": context}
    model = GPTForCausalLM(GPTConfig(vocab_size=len(tokenizer), calculator=table, **sizes, **ends))
    with torch.no_grad():
        model.lm_head.weight.zero_()
        for channel, (token, following) in enumerate(steps):
            model.model.embed_tokens.weight[token] = torch.eye(64)[channel]
            model.lm_head.weight[following, channel] = 10.0
    return model


@pytest.fixture(scope="module")
def parrot(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "parrot"
    model = make_parrot(tokenizer, "<|python_start|>1+2<|python_end|>", "so on,", context=4096)
    save_model_folder(model, tokenizer, folder, card=["Says the same for ever."])
    return folder


class Terminal:
    """A program in a pseudo-terminal: what it has written so far, and keys for it."""

    def __init__(self, pty, command: list[str], **environment: str) -> None:
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            # Where the tests run in the background, Ctrl-C is ignored, and so it would be here.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.environ.update(environment)
            os.execv(command[0], command)
        os.set_blocking(self.descriptor, False)
        self.written = ""

    def read(self) -> bool:
        """Take what was written meanwhile; False once the program has closed the terminal."""
        try:
            data = os.read(self.descriptor, 65536)
        except BlockingIOError:
            time.sleep(0.01)
            return True
        except OSError:
            return False
        self.written += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", data.decode(errors="replace")).replace("\r", "")
        return bool(data)

    def expect(self, text: str, seconds: float = 120) -> None:
        """Wait for `text` behind what was expected last."""
        deadline = time.monotonic() + seconds
        while text not in self.written:
            assert time.monotonic() < deadline, f"no {text!r} in {self.written!r}"
            assert self.read() or text in self.written, f"it ended without {text!r}: {self.written!r}"
        self.written = self.written.partition(text)[2]

    def press(self, keys: str) -> None:
        os.write(self.descriptor, keys.encode())

    def wait(self) -> int:
        """The exit code (negative: the signal it died of)."""
        while self.read():
            pass
        os.close(self.descriptor)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.slow
def test_a_session_in_a_terminal(parrot, tmp_path):
    pty = pytest.importorskip("pty", reason="there are no pseudo-terminals here")
    command = [sys.executable, str(SCRIPT), str(parrot), "--temperature", "0", "--max_new_tokens", "4000"]
    terminal = Terminal(pty, command, TERM="dumb", OMP_NUM_THREADS="1")
    saved = tmp_path / "chat.jsonl"

    terminal.expect("you: ")
    terminal.press("What is 1+2?\n")
    terminal.expect("model: [1+2 = 3]so on,so on,")
    terminal.press("\x03")
    terminal.expect("[stopped]")
    terminal.expect("you: ")
    terminal.press(f"/save {saved}\n")
    terminal.expect(f"added to {saved}")
    messages = json.loads(saved.read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert [part["type"] for part in messages[1]["content"]] == ["python", "python_output", "text"]

    terminal.expect("you: ")
    terminal.press("/temperature 0.5\n")
    terminal.expect("the temperature is 0.5")
    terminal.expect("you: ")
    terminal.press("/reset\n")
    terminal.expect("a new conversation")
    terminal.expect("you: ")
    for _ in range(12):
        terminal.press("1234567890" * 100 + "\\\n")
        terminal.expect("... ")
    terminal.press("!\n")
    terminal.expect("the model's context holds 4096, the answer included; shorten the conversation")
    terminal.expect("you: ")
    terminal.press("Hi\n")
    terminal.expect("model: [1+2 = 3]so on,")
    terminal.press("\x03")
    terminal.expect("you: ")
    terminal.press("/quit\n")
    assert terminal.wait() == 0


@pytest.mark.slow
def test_one_question_on_the_command_line(parrot, tmp_path):
    def ask(*options):
        command = [sys.executable, str(SCRIPT), str(parrot), *options]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)

    answered = ask("--prompt", "1+2?", "--temperature", "0", "--max_new_tokens", "12")
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout.startswith("[1+2 = 3]so on,")
    refused = ask("--prompt", "1234567890" * 2000)
    assert refused.returncode == 2
    assert "context holds 4096" in refused.stderr
    assert refused.stderr.count("\n") == 1
