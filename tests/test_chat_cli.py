"""The terminal chat as a person has it: sessions in a pseudo-terminal, and one question on the command line."""

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
from parrot import make_parrot

from chatmodel.checkpoint import save_model_folder
from chatmodel.runtime import UserError

SCRIPT = Path(__file__).parents[1] / "scripts" / "chat_cli.py"
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


@pytest.fixture(scope="module")
def parrot(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "parrot"
    model = make_parrot(tokenizer, "<|python_start|>1+2<|python_end|>", "so on,", context=4096)
    save_model_folder(model, tokenizer, folder, card=["Says the same for ever."])
    return folder


class PseudoTerminal:
    """A program in a pseudo-terminal: what it has written so far, and keys for it."""

    def __init__(self, pty, command: list[str], **environment: str) -> None:
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            # Where the tests run in the background, Ctrl-C is ignored, and so it would be here.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.environ.update(environment)
            os.execv(command[0], command)
        os.set_blocking(self.descriptor, False)
        self.raw = self.written = ""

    def read(self) -> bool:
        """Take what was written meanwhile; False once the program has closed the terminal."""
        try:
            data = os.read(self.descriptor, 65536)
        except BlockingIOError:
            time.sleep(0.01)
            return True
        except OSError:
            return False
        text = data.decode(errors="replace")
        self.raw += text
        self.written += CONTROL.sub("", text).replace("\r", "")
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

    def type(self, line: str, *expected: str) -> None:
        """Wait for the prompt, type a line, and wait for what must come."""
        self.expect("you: ")
        self.press(line + "\n")
        for text in expected:
            self.expect(text)

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
    terminal = PseudoTerminal(pty, command, TERM="dumb", OMP_NUM_THREADS="1")
    saved = tmp_path / "chat.jsonl"

    terminal.expect("/help lists the commands")
    terminal.type("What is 1+2?", "model: [1+2 = 3]so on,so on,")
    terminal.press("\x03")
    terminal.expect("[stopped]")
    terminal.type("/tokens", "of the context's 4096", "|<|python_end|>|<|output_start|>|3|<|output_end|>|")
    terminal.type(f"/save {saved}", f"added to {saved}")
    messages = json.loads(saved.read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert [part["type"] for part in messages[1]["content"]] == ["python", "python_output", "text"]

    terminal.type("/retry", "model: [1+2 = 3]so on,so on,")
    terminal.press("\x03")
    terminal.expect("[stopped]")
    terminal.type("/temperature 0.5", "the temperature is 0.5")
    terminal.type("/reset", "a new conversation")
    terminal.expect("you: ")
    terminal.press("\x03")  # at the prompt it ends nothing
    terminal.expect("(/quit or Ctrl-D leaves)")
    terminal.expect("you: ")
    for _ in range(12):
        terminal.press("1234567890" * 100 + "\\\n")
        terminal.expect("... ")
    terminal.press("!\n")
    terminal.expect("the model's context holds 4096, the answer included; shorten the conversation")
    terminal.type('"""two', "... ")
    terminal.press('lines"""\n')
    terminal.expect("model: [1+2 = 3]so on,")
    terminal.press("\x03")
    terminal.expect("[stopped]")
    terminal.type("/sys\t Be brief.", "instructions set")  # Tab completes
    terminal.expect("you: ")
    terminal.press("\x1b[A\x1b[A\x1b[A\n")  # three up in the history: \"\"\"two, which opens a quotation again
    terminal.expect("... ")
    terminal.press('"""\n')
    terminal.expect("model: [1+2 = 3]so on,")
    terminal.press("\x03")
    terminal.expect("[stopped]")
    terminal.type("/quit")
    assert terminal.wait() == 0
    assert not COLOUR.search(terminal.raw), "a dumb terminal has no colours"


@pytest.mark.parametrize("script", ["chat_cli.py", "chat_web.py"])
@pytest.mark.parametrize(
    ("options", "said"),
    [(["--help"], "--top_k"), (["nowhere/sft"], "folder nowhere/sft does not exist"), (["--hepl"], "usage")],
)
def test_a_wrong_command_line_does_not_wait_for_torch(script, options, said):
    command = [sys.executable, "-X", "importtime", str(SCRIPT.with_name(script)), *options]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == (0 if options == ["--help"] else 2)
    assert said in ended.stdout + ended.stderr
    assert "argparse" in ended.stderr
    assert "torch" not in ended.stderr
    assert "chatmodel" not in [line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()]


@pytest.mark.slow
def test_one_question_on_the_command_line(parrot, tmp_path, monkeypatch):
    command = [sys.executable, str(SCRIPT), str(parrot), "--prompt"]
    options = ["1+2?", "--temperature", "0", "--max_new_tokens", "12"]
    answered = subprocess.run([*command, *options], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout.startswith("[1+2 = 3]so on,")

    specification = importlib.util.spec_from_file_location("chat_cli", SCRIPT)
    chat_cli = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(chat_cli)
    for options, message in (
        (["1234567890" * 2000], "context holds 4096"),
        (["Hi", "--temperature", "-1"], "temperature -1"),
        (["Hi", "--top_k", "0"], "top_k=0"),
    ):
        monkeypatch.setattr(sys, "argv", [*command[1:], *options])
        with pytest.raises(UserError, match=message):
            chat_cli.main()
