"""Many clients at once against the server: is any answer wrong, lost or mixed up, and does its memory grow?

    python scripts/bench_server.py runs/cpu/sft --clients 20 --seconds 60

Starts `scripts/serve.py`, asks each client's question alone to learn the right answer, then lets all clients ask
theirs over and over, by turns streamed and whole, and prints a table and a line of JSON. Exit code 1: an answer was
not right.
"""

import argparse
import asyncio
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from openai import APIError, AsyncOpenAI

from chatmodel.runtime import UserError, entry_point

SERVER = Path(__file__).with_name("serve.py")
MEBIBYTE = 2**20


@dataclass
class Tally:
    """What became of the requests; memory is the server's, in MiB, once a second."""

    answers: int = 0
    streamed: int = 0
    wrong: int = 0
    unfinished: int = 0
    errors: list[str] = field(default_factory=list)
    tokens: int = 0
    seconds: list[float] = field(default_factory=list)
    first_piece_seconds: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Reply:
    """An answer, and when its first piece came."""

    text: str
    finish_reason: str | None
    tokens: int
    first_piece_seconds: float | None = None


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("model", type=Path, help="a model folder")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--max_new_tokens", type=int, default=48)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--continuous_batching", action="store_true")
    return parser.parse_args()


async def ask(client: AsyncOpenAI, model: str, question: str, max_new_tokens: int, *, stream: bool) -> Reply:
    options = {"model": model, "max_tokens": max_new_tokens, "temperature": 0}
    messages = [{"role": "user", "content": question}]
    if not stream:
        answer = await client.chat.completions.create(messages=messages, **options)
        choice = answer.choices[0]
        calls = getattr(choice.message, "reasoning_content", None) or ""
        return Reply(calls + (choice.message.content or ""), choice.finish_reason, answer.usage.completion_tokens)
    began, first, texts, calls, reason, tokens = time.monotonic(), None, "", "", None, 0
    async for chunk in await client.chat.completions.create(messages=messages, stream=True, **options):
        delta = chunk.choices[0].delta
        piece, call = delta.content or "", getattr(delta, "reasoning_content", None) or ""
        if first is None and piece + call:
            first = time.monotonic() - began
        texts, calls = texts + piece, calls + call
        reason = chunk.choices[0].finish_reason or reason
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
    return Reply(calls + texts, reason, tokens, first)


async def be_client(
    client: AsyncOpenAI, model: str, question: str, right: str, tally: Tally, until: float, max_new_tokens: int
) -> None:
    stream = True
    while time.monotonic() < until:
        began = time.monotonic()
        try:
            reply = await ask(client, model, question, max_new_tokens, stream=stream)
        except APIError as error:
            tally.errors.append(f"{type(error).__name__}: {error}"[:200])
            continue
        tally.answers += 1
        tally.streamed += stream
        tally.wrong += reply.text != right
        tally.unfinished += reply.finish_reason not in ("stop", "length")
        tally.tokens += reply.tokens
        tally.seconds.append(time.monotonic() - began)
        if reply.first_piece_seconds is not None:
            tally.first_piece_seconds.append(reply.first_piece_seconds)
        stream = not stream


async def watch_memory(process: psutil.Process, tally: Tally, until: float) -> None:
    while time.monotonic() < until:
        tally.memory.append(process.memory_info().rss / MEBIBYTE)
        await asyncio.sleep(1)


async def wait_for(client: AsyncOpenAI, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise UserError(f"the server ended at once: {log.read_text()[-500:]}")
        try:
            await client.models.list()
        except APIError:
            await asyncio.sleep(0.2)
        else:
            return
    raise UserError("the server did not answer within two minutes")


async def measure(args: argparse.Namespace, address: str, process: subprocess.Popen[bytes], log: Path) -> Tally:
    tally, model = Tally(), str(args.model)
    async with AsyncOpenAI(base_url=address, api_key="none", max_retries=0, timeout=300) as client:
        await wait_for(client, process, log)
        questions = [f"What is {11 + 7 * number} + {23 + 5 * number}?" for number in range(args.clients)]
        right = [(await ask(client, model, each, args.max_new_tokens, stream=False)).text for each in questions]
        until = time.monotonic() + args.seconds
        clients = [
            be_client(client, model, question, text, tally, until, args.max_new_tokens)
            for question, text in zip(questions, right, strict=True)
        ]
        await asyncio.gather(*clients, watch_memory(psutil.Process(process.pid), tally, until))
        if len(set(right)) < len(right):
            tally.errors.append("two questions have the same answer, so that mixed streams could go unseen")
    return tally


def summarize(tally: Tally, seconds: float) -> dict[str, float]:
    quarter = max(1, len(tally.memory) // 4)
    ordered = sorted(tally.seconds)
    return {
        "answers": tally.answers,
        "streamed": tally.streamed,
        "errors": len(tally.errors),
        "wrong_or_mixed": tally.wrong,
        "without_end": tally.unfinished,
        "tokens_per_second": tally.tokens / seconds,
        "median_seconds": statistics.median(ordered),
        "seconds_of_95_percent": ordered[int(0.95 * (len(ordered) - 1))],
        "longest_seconds": ordered[-1],
        "median_first_piece_seconds": statistics.median(tally.first_piece_seconds),
        "memory_mib_first_quarter": statistics.median(tally.memory[:quarter]),
        "memory_mib_last_quarter": statistics.median(tally.memory[-quarter:]),
        "memory_mib_most": max(tally.memory),
    }


def main() -> None:
    args = read_arguments()
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(SERVER), str(args.model), "--device", args.device, "--port", str(port)]
    command += ["--max-parallel", str(args.clients)]
    if args.continuous_batching:
        command += ["--continuous-batching", "--cb-num-blocks", "64"]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            tally = asyncio.run(measure(args, f"http://localhost:{port}/v1", process, log))
        finally:
            process.terminate()
            process.wait()
    if not tally.answers:
        raise UserError(f"no request was answered: {tally.errors[:1]}")
    figures = {"clients": args.clients} | {k: round(v, 2) for k, v in summarize(tally, args.seconds).items()}
    print(
        "\n".join(["| | |", "|---|---:|", *(f"| {name.replace('_', ' ')} | {v:g} |" for name, v in figures.items())])
    )
    for error in tally.errors[:5]:
        print(error)
    print(json.dumps(figures))
    sys.exit(1 if tally.wrong or tally.unfinished or tally.errors else 0)


if __name__ == "__main__":
    entry_point(main)
