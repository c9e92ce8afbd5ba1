"""How the web page is laid out in gradio, and which button does what."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from threading import Event
from typing import Any

import gradio as gr

from chatmodel.chat import style
from chatmodel.chat.conversation import Sampling
from chatmodel.chat.display import escape_all
from chatmodel.chat.page import MAX_QUESTION_CHARS, MAX_SYSTEM_CHARS, ChatPage, Conversations, Voice, show_messages
from chatmodel.runtime import UserError, logger

QUIETLY: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
# Answers and looks into a model take turns: a model has one place for its keys and values.
IN_TURN: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "models"} | QUIETLY
SMALL: dict[str, Any] = {"size": "sm", "min_width": 130}


class Layout:
    """The page's parts; its methods are what they do, mostly by `ChatPage`."""

    def __init__(self, voices: Sequence[Voice], sampling: Sampling) -> None:
        self.page = ChatPage(voices)
        self.names = [voice.name for voice in voices]
        with gr.Blocks(analytics_enabled=False, title="chatmodel", fill_width=True) as self.blocks:
            gr.Markdown(f"# chatmodel\n{escape_all(' · '.join(self.names))}", elem_id="title")
            self.conversations = gr.State(self.page.begin())
            self.add_chats()
            self.add_settings(sampling)
            self.add_inspector()
            self.exported = gr.Textbox(visible="hidden")
            self.connect()

    def add_chats(self) -> None:
        chat = {
            "height": 360,
            "show_label": len(self.names) > 1,
            "latex_delimiters": [],
            "reasoning_tags": [],
            "buttons": [],
            "feedback_options": None,
        }
        with gr.Row():
            self.chats = [
                gr.Chatbot(label=name, placeholder="Ask something.", elem_id=f"chat-{place}", **chat)
                for place, name in enumerate(self.names)
            ]
        with gr.Row(equal_height=True):
            box = {"show_label": False, "container": False, "lines": 1, "max_lines": 8, "autofocus": True, "scale": 8}
            hint = "Ask something; Shift+Enter begins a new line"
            self.question = gr.Textbox(placeholder=hint, max_length=MAX_QUESTION_CHARS, elem_id="question", **box)
            self.send = gr.Button("Send", variant="primary", scale=1, min_width=90, elem_id="send")
            self.stop = gr.Button("Stop", variant="stop", scale=1, min_width=90, elem_id="stop", visible=False)
        with gr.Row():
            self.retry = gr.Button("Retry", elem_id="retry", **SMALL)
            self.reset = gr.Button("New conversation", elem_id="reset", **SMALL)
            self.export = gr.Button("Export", elem_id="export", **SMALL)
            self.look = gr.Button("Inspect the answer", elem_id="inspect", **SMALL)

    def add_settings(self, sampling: Sampling) -> None:
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            self.system = gr.Textbox(
                "", label="Instructions (a change begins a new conversation)", lines=2, max_length=MAX_SYSTEM_CHARS
            )
            with gr.Row():
                self.temperature = gr.Slider(
                    0, 2, value=sampling.temperature, step=0.05, label="Temperature (0 is greedy)"
                )
                self.top_k = gr.Slider(0, 200, value=sampling.top_k or 0, step=1, label="Top k (0 is all tokens)")
                self.length = gr.Slider(
                    1,
                    max(2048, sampling.max_new_tokens),
                    value=sampling.max_new_tokens,
                    step=1,
                    label="Tokens of an answer, at most",
                )

    def add_inspector(self) -> None:
        view = {"css_template": style.INSPECTOR_CSS, "padding": False, "apply_default_css": False}
        with gr.Accordion("Inspector", open=False, elem_id="inspector") as self.panel:
            with gr.Row():
                box = {"visible": len(self.names) > 1, "show_label": False, "container": False}
                self.chosen = gr.Dropdown(self.names, value=self.names[0], elem_id="chosen", **box)
                self.lens = gr.Button(
                    "Logit lens of the whole answer", elem_id="lens", size="sm", scale=0, min_width=260
                )
            self.tokens = gr.HTML("", js_on_load=style.CHOOSE_TOKEN, elem_id="tokens", **view)
            self.layers = gr.HTML("", js_on_load=None, elem_id="layers", **view)

    def connect(self) -> None:
        shown = [self.conversations, *self.chats]
        self.buttons = [self.send, self.stop, self.retry, self.reset]
        asking = gr.on(
            [self.send.click, self.question.submit],
            self.ask,
            [self.question, self.conversations, self.system],
            [self.question, *shown, *self.buttons],
            **QUIETLY,
        )
        retrying = self.retry.click(self.ask_again, self.conversations, [*shown, *self.buttons], **QUIETLY)
        spoken = [self.conversations, self.temperature, self.top_k, self.length]
        for begun in (asking, retrying):
            answering = begun.then(self.answer, spoken, shown, **IN_TURN)
            answering.then(lambda: toggle(talking=False), None, self.buttons, **QUIETLY)
        self.stop.click(self.end, None, None, queue=False, **QUIETLY)
        self.reset.click(self.restart, self.system, [*shown, self.tokens, self.layers], **QUIETLY)
        for chat in self.chats:
            chat.clear(self.restart, self.system, [*shown, self.tokens, self.layers], **QUIETLY)
        exporting = self.export.click(self.page.export, self.conversations, self.exported, **QUIETLY)
        exporting.then(None, self.exported, None, js=style.DOWNLOAD, **QUIETLY)
        inspected = [self.conversations, self.chosen]
        self.look.click(self.inspect, inspected, [self.panel, self.tokens, self.layers], **IN_TURN)
        self.lens.click(self.look_at_answer, inspected, self.layers, **IN_TURN)
        self.tokens.click(self.look_at_token, inspected, self.layers, **IN_TURN)

    def ask(self, question: str, said: Conversations, system: str | None) -> list[Any]:
        try:
            asked = self.page.ask(question, said, system or "")
        except UserError as error:
            warn(error)
            return [question, said, *map(show_messages, said), *toggle(talking=False)]
        return ["", asked, *map(show_messages, asked), *toggle(talking=True)]

    def ask_again(self, said: Conversations) -> list[Any]:
        again = self.page.retry(said)
        return [again, *map(show_messages, again), *toggle(talking=True)]

    def answer(
        self, said: Conversations, temperature: float, top_k: float, length: float, request: gr.Request
    ) -> Iterator[list[Any]]:
        settings = Sampling(top_k=int(top_k) or None, max_new_tokens=int(length)).with_temperature(temperature)
        for grown, problems in self.page.answer(said, settings, str(request.session_hash)):
            yield [grown, *map(show_messages, grown, problems)]

    def end(self, request: gr.Request) -> None:
        self.page.stop(str(request.session_hash))

    def restart(self, system: str | None) -> list[Any]:
        fresh = self.page.begin(system or "")
        return [fresh, *([] for _ in fresh), "", ""]

    def inspect(self, said: Conversations, name: str) -> list[Any]:
        return [gr.update(open=True), seen(self.page.inspect, said, name), ""]

    def look_at_token(self, said: Conversations, name: str, event: gr.EventData) -> str:
        place = event._data.get("place") if isinstance(event._data, dict) else None
        return seen(self.page.look_at_token, said, name, int(place or 0))

    def look_at_answer(self, said: Conversations, name: str) -> str:
        return seen(self.page.look_at_answer, said, name)


def toggle(*, talking: bool) -> list[Any]:
    """Changes of send, stop, retry and reset: while an answer comes, and else."""
    shown = [gr.update(visible=not talking), gr.update(visible=talking)]
    return shown + [gr.update(interactive=not talking)] * 2


def seen(look: Any, *arguments: Any) -> str:
    """What `look` gives, or nothing and a warning on the page."""
    try:
        html: str = look(*arguments)
    except UserError as error:
        warn(error)
        return ""
    return html


def warn(error: UserError) -> None:
    gr.Warning(escape_all(str(error)), duration=6)


def launch_page(layout: Layout, *, host: str, port: int) -> None:
    """Serve the page until Ctrl-C, and say where once it is there; nothing of it comes from, or goes to, elsewhere.

    Raises:
        UserError: the port is taken, the address not this machine's, or a proxy stands before it.
    """
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    look = {"theme": gr.themes.Soft(primary_hue="teal", neutral_hue="slate", **fonts), "css": style.PAGE_CSS}
    page = layout.blocks.queue(max_size=32, default_concurrency_limit=8)
    options = {"share": False, "quiet": True, "footer_links": [], "max_file_size": 1, "ssr_mode": False}
    try:
        page.launch(server_name=host, server_port=port, prevent_thread_lock=True, **look, **options)
    except OSError:
        raise UserError(
            f"the page cannot be served at {host}:{port}: the port is taken, or the address is not this machine's; "
            "give another --port or --host"
        ) from None
    except Exception as error:  # gradio asks its own page for an answer, and raises bare Exception without one
        raise UserError(
            f"the page at {host}:{port} does not answer ({type(error).__name__}); if a proxy is set, "
            "exempt this machine with no_proxy=localhost,127.0.0.1"
        ) from None
    logger.info("the page is at %s (Ctrl-C ends it)", page.local_url)
    with suppress(KeyboardInterrupt):
        Event().wait()
    page.close(verbose=False)
