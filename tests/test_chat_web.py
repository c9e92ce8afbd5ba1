"""The web page in gradio: its handlers in this process, and the whole of it in a real browser (make long)."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import pytest
from parrot import make_parrot

from chatmodel.chat.conversation import Sampling
from chatmodel.chat.page import Voice
from chatmodel.checkpoint import save_model_folder
from chatmodel.runtime import UserError

gradio = pytest.importorskip("gradio", reason="the web page needs gradio: pip install -e '.[web]'")

SCRIPT = Path(__file__).parents[1] / "scripts" / "chat_web.py"
# Without these Chromium asks other machines for things.
QUIET = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update"


@pytest.fixture(scope="module")
def parrot(tokenizer):
    return make_parrot(tokenizer, "<|python_start|>1+2<|python_end|>", "so on,", context=2**15)


def test_the_parts_do_what_they_say(parrot, tokenizer):
    from chatmodel.chat.layout import Layout

    layout = Layout([Voice("parrot", parrot, tokenizer)], Sampling(temperature=0.0, max_new_tokens=12))
    me = SimpleNamespace(session_hash="me")
    question, said, shown, send, stop, *_ = layout.ask("1+2?", layout.page.begin(), None)
    assert (question, send["visible"], stop["visible"]) == ("", False, True)
    assert shown == [{"role": "user", "content": "1&#43;2&#63;"}]
    said, shown = list(layout.answer(said, 0.0, 0, 12, me))[-1]
    assert "&#91;1&#43;2 &#61; 3&#93;</span>so on" in shown[1]["content"]
    panel, tokens, layers = layout.inspect(said, "parrot")
    assert (panel["open"], tokens.count("data-place"), layers) == (True, 12, "")
    assert "rank" in layout.look_at_token(said, "parrot", SimpleNamespace(_data={"place": 3}))
    assert "layer 1" in layout.look_at_answer(said, "parrot")
    assert layout.ask_again(said)[1] == shown[:1]
    assert layout.restart("Be brief.")[0][0].system == "Be brief."
    refused = layout.ask("", said, None)
    assert (refused[0], refused[1]) == ("", said)
    assert layout.inspect(layout.page.begin(), "parrot")[1] == ""
    layout.end(me)
    described = layout.blocks.get_api_info()
    assert described["named_endpoints"] == {}, "what the page does is no interface for programs"


def test_the_address_is_said_once_the_page_is_there(parrot, tokenizer, monkeypatch, caplog, capsys):
    from chatmodel.chat import layout

    caplog.set_level("INFO", "chatmodel")
    page = layout.Layout([Voice("parrot", parrot, tokenizer)], Sampling())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot be served at 127.0.0.1:{port}: the port is taken"):
            layout.launch_page(page, host="127.0.0.1", port=port)
    assert not caplog.messages
    visited = []

    class Visit:
        def wait(self) -> None:
            visited.append(urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10).status)
            raise KeyboardInterrupt

    monkeypatch.setattr(layout, "Event", Visit)
    layout.launch_page(page, host="127.0.0.1", port=port)
    assert visited == [200]
    assert [message for message in caplog.messages if "http" in message and "127" in message] == [
        f"the page is at http://127.0.0.1:{port}/ (Ctrl-C ends it)"
    ]
    assert capsys.readouterr().out == "", "nothing of gradio's own"


@pytest.fixture(scope="module")
def address(tokenizer, parrot, tmp_path_factory):
    """Where a page with two models is served."""
    root = tmp_path_factory.mktemp("models")
    other = make_parrot(tokenizer, "<|python_start|>3*4<|python_end|>", " and then", context=2**15)
    for name, model in (("first", parrot), ("second", other)):
        save_model_folder(model, tokenizer, root / name, card=["Says the same for ever."])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(SCRIPT), "first", "second", "--port", str(port), "--temperature", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (root / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--max_new_tokens", "30000"], cwd=root, env=environment, stdout=log, stderr=log
        )
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 120
    while True:
        assert process.poll() is None, (root / "log").read_text()
        assert time.monotonic() < deadline, (root / "log").read_text()
        try:
            urllib.request.urlopen(address, timeout=5).close()
        except URLError:
            time.sleep(0.2)
        else:
            break
    yield address
    process.terminate()
    process.wait()


@pytest.fixture
def browser_page():
    """A page of a real Chromium, and what it asked of other machines."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser test needs: pip install playwright")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("the browser test needs Chromium: apt install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=QUIET.split())
        page = browser.new_page(viewport={"width": 1180, "height": 860})
        page.outside = []
        page.on("request", lambda request: page.outside.append(request.url))
        yield page
        browser.close()


@pytest.mark.long
def test_a_person_talks_to_two_models_in_a_browser(address, browser_page, tmp_path):
    page = browser_page
    page.goto(address)
    page.wait_for_selector("#question textarea", timeout=60_000)
    page.fill("#question textarea", "What is <b>1+2</b>?")
    page.keyboard.press("Enter")

    # The answers of both stream side by side, calls apart from text.
    page.wait_for_selector("#chat-0 .call", timeout=60_000)
    page.wait_for_selector("#chat-1 .call", timeout=60_000)
    assert page.inner_text("#chat-0 .call") == "[1+2 = 3]"
    assert page.inner_text("#chat-1 .call") == "[3*4 = 12]"
    page.wait_for_function("document.querySelector('#chat-0 .bot').innerText.includes('so on,so on,')")
    some = len(page.inner_text("#chat-0 .bot"))
    page.wait_for_function(f"document.querySelector('#chat-0 .bot').innerText.length > {some + 20}")
    assert "What is <b>1+2</b>?" in page.inner_text("#chat-0 .user"), "what is typed is text"

    # Stop ends the answer; what had come of it stays.
    page.click("#stop")
    page.wait_for_selector("#send:visible", timeout=30_000)
    stopped = page.inner_text("#chat-0 .bot")
    assert 10 < len(stopped) < 60_000
    time.sleep(1)
    assert page.inner_text("#chat-0 .bot") == stopped

    # The inspector: tokens, alternatives when pointed at, layers when clicked.
    page.click("#inspect")
    page.wait_for_selector("#tokens .token", timeout=60_000)
    assert page.locator("#tokens .token.forced").count() == 3
    page.hover("#tokens .token >> nth=1")
    page.wait_for_selector("#tokens .tip:visible")
    assert "rank 1" in page.inner_text("#tokens .tip:visible")
    page.click("#tokens .token >> nth=2")
    page.wait_for_selector("#layers table", timeout=60_000)
    assert "embeddings" in page.inner_text("#layers")
    page.click("#lens")
    page.wait_for_selector("#layers >> text=first choice behind each layer", timeout=60_000)

    # Retry, stop again, export, begin anew.
    page.click("#retry")
    page.wait_for_selector("#stop:visible")
    page.wait_for_selector("#chat-0 .call")
    page.click("#stop")
    page.wait_for_selector("#send:visible", timeout=30_000)
    with page.expect_download() as download:
        page.click("#export")
    download.value.save_as(tmp_path / "conversation.jsonl")
    assert len((tmp_path / "conversation.jsonl").read_text().splitlines()) == 2
    page.click("#reset")
    page.wait_for_selector("#chat-0 .bot", state="detached", timeout=30_000)
    assert [url for url in page.outside if not url.startswith((address, "data:", "blob:"))] == []
