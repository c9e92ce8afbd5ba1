"""The gate before a server, around an application that only notes what reaches it."""

import asyncio
import json

import pytest

from chatmodel.chat.gate import Gate, read_api_keys
from chatmodel.chat.limits import Limits
from chatmodel.runtime import UserError

LIMITS = Limits(max_parallel=2, max_body_bytes=100, body_seconds=0.05)
BODY = json.dumps({"messages": [{"role": "user", "content": "Hi"}]}).encode()


class Application:
    """Answers 200 with the body it got, after `wait` is set."""

    def __init__(self) -> None:
        self.bodies, self.ended, self.headers = [], 0, []
        self.wait = asyncio.Event()
        self.wait.set()

    async def __call__(self, scope, receive, send):
        try:
            self.headers.append(dict(scope["headers"]))
            message = await receive() if scope["method"] == "POST" else {"body": b""}
            self.bodies.append(message["body"])
            await self.wait.wait()
            if message["body"] == b'{"prompt": "fail"}':
                raise KeyError("ours")
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": message["body"]})
        finally:
            self.ended += 1


class Client:
    """One request: what it sends, and what comes back."""

    def __init__(self, gate, path="/v1/chat/completions", *, method="POST", body=BODY, headers=()):
        self.gate = gate
        self.scope = {"type": "http", "method": method, "path": path, "headers": list(headers)}
        self.parts = asyncio.Queue()
        if body is not None:
            self.parts.put_nowait({"type": "http.request", "body": body, "more_body": False})
        self.sent = []

    async def send(self, message):
        self.sent.append(message)

    def leave(self):
        self.parts.put_nowait({"type": "http.disconnect"})

    async def ask(self):
        await self.gate(self.scope, self.parts.get, self.send)
        return self.sent[0]["status"] if self.sent else None

    def message(self):
        return json.loads(self.sent[1]["body"])["error"]["message"]


def run(test):
    asyncio.run(asyncio.wait_for(test(), 10))


def test_requests_pass_and_are_refused():
    async def test():
        application = Application()
        gate = Gate(application, limits=LIMITS)
        assert await Client(gate).ask() == 200
        assert application.bodies == [BODY]
        for path in ("/health", "/v1/models"):
            assert await Client(gate, path, method="GET").ask() == 200
        assert await Client(gate, "/load_model", body=b'{"model": "m"}').ask() == 200
        reached = len(application.bodies)
        assert await Client(gate, "/load_model", body=b'{"model": "runs/mine"}').ask() == 200
        assert application.bodies[-1] == b'{"model": "runs/mine"}'
        assert await Client(gate, "/load_model", method="GET").ask() == 405
        assert await Client(gate, "/load_model", body=b'{"model": "m"}').ask() == 200
        reached = len(application.bodies)
        for path in ("/reset", "/v1/systemone", "/v1/audio/transcriptions", "/docs", "/"):
            for method in ("GET", "POST"):
                assert await Client(gate, path, method=method).ask() == 404, path
        assert await Client(gate, method="GET").ask() == 405
        assert await Client(gate, body=b"{").ask() == 400
        assert await Client(gate, body=b"x" * 101).ask() == 413
        assert await Client(gate, headers=[(b"content-length", b"999")]).ask() == 413
        assert await Client(gate, headers=[(b"content-length", b"many")]).ask() == 413
        assert await Client(gate, body=None).ask() == 408
        assert len(application.bodies) == reached
        assert not gate.active

    run(test)


def test_only_holders_of_a_key_may_ask():
    async def test():
        gate = Gate(Application(), limits=LIMITS, api_keys=["first key", "schlüssel"])

        async def ask(*headers, path="/v1/models"):
            client = Client(gate, path, method="GET", headers=[(b"authorization", value) for value in headers])
            return await client.ask()

        assert await ask() == 401
        for wrong in (b"Bearer", b"Bearer ", b"Bearer first", b"Bearer first key2", b"Basic first key", b"first key"):
            assert await ask(wrong) == 401
        assert await ask(b"Bearer first key") == 200
        assert await ask("bearer schlüssel".encode()) == 200
        assert await ask(path="/health") == 200
        assert await Client(gate, "/reset").ask() == 401, "who has no key learns nothing of paths"

    run(test)


def test_no_more_than_so_many_at_once():
    async def test():
        application = Application()
        application.wait.clear()
        gate = Gate(application, limits=LIMITS)
        first, second = (asyncio.create_task(Client(gate).ask()) for _ in range(2))
        await asyncio.sleep(0.01)
        third = Client(gate)
        assert await third.ask() == 429
        assert (b"retry-after", b"1") in third.sent[0]["headers"]
        application.wait.set()
        assert [await first, await second] == [200, 200]
        assert await Client(gate).ask() == 200

    run(test)


def test_a_client_that_goes_away_takes_its_request_with_it():
    async def test():
        application = Application()
        application.wait.clear()
        gate = Gate(application, limits=LIMITS)
        client = Client(gate)
        asking = asyncio.create_task(client.ask())
        await asyncio.sleep(0.01)
        assert len(gate.active) == 1
        client.leave()
        assert await asking is None
        assert (gate.active, application.ended) == (set(), 1)
        half = Client(gate, body=None)
        half.leave()
        assert await half.ask() is None

    run(test)


def test_a_failure_is_said_and_ids_are_not_the_clients_choice(caplog):
    async def test():
        application = Application()
        gate = Gate(application, limits=LIMITS)
        failed = Client(gate, body=b'{"prompt": "fail"}', headers=[(b"x-request-id", b"another's")])
        assert await failed.ask() == 500
        assert "its log says how" in failed.message()
        assert b"x-request-id" not in application.headers[0]
        assert "KeyError" in caplog.text
        assert await Client(gate).ask() == 200

    run(test)


def test_keys_come_from_a_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text("one\n\n two \n")
    assert read_api_keys(path) == ["one", "two"]
    path.write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        read_api_keys(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_api_keys(tmp_path / "none")
