"""What stands before a server's application: who may ask, what, how much, and how many at once."""

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from chatmodel.chat.limits import Limits, RequestError, check_request, read_json_object, refuse
from chatmodel.runtime import UserError, logger

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

ASKED = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
LOOKED_UP = ("/health", "/v1/models")
LOADED = "/load_model"  # what `transformers chat` begins with; the application loads no model but the one it serves


class Gate:
    """ASGI middleware: lets through what is within `limits`, and answers the rest itself.

    Only the paths of a chat server are open: those that load other models or unload this one are not. A client that
    goes away takes its request with it.

    Args:
        api_keys: one of them must come as `Authorization: Bearer KEY`; empty: anyone may ask.
        knows_tools: as in `check_request`.
    """

    def __init__(
        self, app: Any, *, limits: Limits | None = None, api_keys: Sequence[str] = (), knows_tools: bool = False
    ) -> None:
        self.app, self.limits = app, limits or Limits()
        self.api_keys = [key.encode() for key in api_keys]
        self.knows_tools = knows_tools
        self.active: set[Answer] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # An id of the client's choice could be another request's.
        scope["headers"] = [(name, value) for name, value in scope["headers"] if name != b"x-request-id"]
        answer = Answer(send)
        try:
            await self.admit(scope, receive, answer)
        except RequestError as error:
            await answer.refuse(error.status, str(error))
        except Exception:
            logger.exception("a request to %s failed", scope["path"])
            await answer.refuse(500, "the server failed at this request; its log says how")

    async def admit(self, scope: Scope, receive: Receive, answer: "Answer") -> None:
        method, path = scope["method"], scope["path"]
        if method == "OPTIONS" or (method in ("GET", "HEAD") and path == "/health"):
            await self.app(scope, receive, answer.send)
            return
        self.check_key(scope)
        if method in ("GET", "HEAD") and path in LOOKED_UP:
            await self.app(scope, receive, answer.send)
            return
        if path not in (*ASKED, LOADED):
            refuse(f"{path[:80]} is not served; there are {', '.join(LOOKED_UP + ASKED)}", status=404)
        if method != "POST":
            refuse(f"{path} is asked by POST", status=405)
        body = await self.read_body(scope, receive)
        if body is None:  # the client has gone
            return
        check_request(read_json_object(body), self.limits, knows_tools=self.knows_tools)
        if path == LOADED:
            await self.run_until_gone(scope, body, receive, answer)
            return
        count = len(self.active)
        if count >= self.limits.max_parallel:
            refuse(f"{count} requests are being answered, and no more at once; try again in a moment", status=429)
        self.active.add(answer)
        # The place is free when the answer's end is sent, before its client can ask again.
        answer.ended = lambda: self.active.discard(answer)
        try:
            await self.run_until_gone(scope, body, receive, answer)
        finally:
            self.active.discard(answer)

    def check_key(self, scope: Scope) -> None:
        if not self.api_keys:
            return
        sent = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = sent.partition(b" ")
        # compare_digest: how long it takes says nothing about how much of the key is right.
        fits = [hmac.compare_digest(key.strip(), known) for known in self.api_keys]
        if scheme.lower() != b"bearer" or not any(fits):
            refuse("an API key is needed: Authorization: Bearer KEY", status=401)

    async def read_body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body, or None if the client left before its end.

        Raises:
            RequestError: it is too large, or takes too long.
        """
        too_large = f"the body is larger than {self.limits.max_body_bytes} bytes"
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not length.isdigit() or int(length[:20]) > self.limits.max_body_bytes:
            refuse(too_large, status=413)
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self.limits.max_body_bytes:
                        refuse(too_large, status=413)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            refuse(f"the body did not come within {self.limits.body_seconds:g} seconds", status=408)

    async def run_until_gone(self, scope: Scope, body: bytes, receive: Receive, answer: "Answer") -> None:
        """Let the application answer; end it when the client goes away before that."""
        gone = asyncio.Event()
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> dict[str, Any]:
            if waiting:
                return waiting.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        # The body was read as JSON, whatever the client calls it.
        names = (b"content-type", b"content-length", b"transfer-encoding")
        headers = [(name, value) for name, value in scope["headers"] if name not in names]
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        answering = asyncio.create_task(self.app({**scope, "headers": headers}, replay, answer.send))
        watching = asyncio.create_task(watch())
        try:
            await asyncio.wait({answering, watching}, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()  # raises what the application did
        finally:
            for task in (answering, watching):
                task.cancel()
            await asyncio.gather(answering, watching, return_exceptions=True)


class Answer:
    """What goes back to one client, once."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False
        self.ended: Callable[[], None] = lambda: None

    async def send(self, message: MutableMapping[str, Any]) -> None:
        self.started = self.started or message["type"] == "http.response.start"
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.ended()
        await self._send(message)

    async def refuse(self, status: int, message: str) -> None:
        """Say in the form of the OpenAI protocol what is wrong; nothing, if an answer has begun."""
        if self.started:
            return
        kind = "invalid_request_error" if status < 500 else "server_error"
        content = json.dumps({"error": {"message": message, "type": kind, "code": status}}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        headers += {429: [(b"retry-after", b"1")], 401: [(b"www-authenticate", b"Bearer")]}.get(status, [])
        if status in (408, 413):
            headers.append((b"connection", b"close"))  # the rest of the body is not read
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": content})


def read_api_keys(path: Path) -> list[str]:
    """The keys in a file, one a line; a file, since a command line can be seen by all users of a machine.

    Raises:
        UserError: there is none.
    """
    try:
        keys = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the file of API keys {path} cannot be read: {error}") from None
    if not keys:
        raise UserError(f"the file of API keys {path} is empty; put one key on a line")
    return keys
