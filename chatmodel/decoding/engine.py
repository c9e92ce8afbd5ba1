"""How do many prompts become replies? Each row of a batch takes the next prompt as soon as it is free."""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from chatmodel.decoding.prompts import read_prompts
from chatmodel.decoding.sampling import Sampling, choose, score
from chatmodel.decoding.state import ACTIVE, POSITION, SEED, advance, draw_uniform
from chatmodel.decoding.steps import Moved, PlainSteps
from chatmodel.decoding.weights import DecoderWeights
from chatmodel.model.calculator import CalculatorLogitsProcessor

PROMPT_TOKENS = 32_768  # read at once, padding included
REFILL = 8  # free rows are filled when this part of the batch is free


@dataclass(frozen=True)
class Request:
    """A prompt, how many tokens may follow (at most what the context has left), and what its draws start from."""

    prompt: Sequence[int]
    max_new_tokens: int
    seed: int = 0


@dataclass
class Progress:
    """New tokens of a request, the end token included, and whether they are the last.

    `logps` are their log-probabilities, if the sampling is scored.
    """

    index: int
    ids: list[int]
    done: bool
    logps: list[float] = field(default_factory=list)


@dataclass
class _Row:
    index: int
    ids: list[int]  # prompt and reply
    remaining: int
    place: int
    done: bool = False


@dataclass
class _Launch:
    """Tokens and log-probabilities (steps, rows) on their way to the host, and whose they are."""

    emitted: torch.Tensor
    logps: torch.Tensor | None
    rows: list[_Row | None]
    event: torch.cuda.Event | None = field(default=None)

    def read(self) -> Iterator[tuple[_Row | None, list[int], list[float]]]:
        """Each row's new tokens and their log-probabilities."""
        if self.event is not None:
            self.event.synchronize()
        tokens = self.emitted.T.tolist()
        logps = [[]] * len(tokens) if self.logps is None else self.logps.T.tolist()
        return zip(self.rows, tokens, logps, strict=True)


class Decoder:
    """Decodes on `steps.state`, one call of `decode` at a time."""

    def __init__(self, weights: DecoderWeights, steps: PlainSteps) -> None:
        self.weights, self.steps, self.state = weights, steps, steps.state
        self.calculator = CalculatorLogitsProcessor(weights.calculator) if weights.calculator else None
        self.rows: list[_Row | None] = [None] * self.state.rows

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def decode(self, requests: Sequence[Request], sampling: Sampling) -> Generator[Progress, None, None]:
        """The replies as they come, in the order in which they advance; closing the iterator ends all of them."""
        waiting = deque(enumerate(requests))
        launches: deque[_Launch] = deque()
        self.rows = [None] * self.state.rows
        self.state.table.zero_()
        while waiting or any(self.rows):
            if not waiting:
                self._close_gaps()
            with torch.autocast(self.weights.device.type, enabled=False):  # whatever a Trainer does
                launches.append(self._admit(waiting, sampling) if self._has_room(waiting) else self._step(sampling))
            while len(launches) > self.steps.lag:
                yield from self._settle(launches.popleft())

    def _has_room(self, waiting: deque[tuple[int, Request]]) -> bool:
        free = self.rows.count(None)
        return bool(waiting) and (
            free == len(self.rows) or free >= max(1, min(len(self.rows) // REFILL, len(waiting)))
        )

    def _take(self, waiting: deque[tuple[int, Request]]) -> list[tuple[int, Request]]:
        """The next requests that fit the free rows and the token budget; of equal prompts one is read."""
        taken: list[tuple[int, Request]] = []
        prompts: set[tuple[int, ...]] = set()
        width = 0
        while waiting and len(taken) < self.rows.count(None):
            prompt = tuple(waiting[0][1].prompt)
            wider = max(width, len(prompt))
            if taken and len(prompts | {prompt}) * wider > PROMPT_TOKENS:
                break
            prompts.add(prompt)
            width = wider
            taken.append(waiting.popleft())
        return taken

    def _admit(self, waiting: deque[tuple[int, Request]], sampling: Sampling) -> _Launch:
        """Read prompts into free rows and choose their first tokens."""
        places = iter([place for place, row in enumerate(self.rows) if row is None])
        taken = self._take(waiting)
        rows = [_Row(i, list(r.prompt), r.max_new_tokens, place) for (i, r), place in zip(taken, places, strict=False)]
        for row in rows:
            self.rows[row.place] = row
        prompts = list(dict.fromkeys(tuple(row.ids) for row in rows))
        width = max(map(len, prompts))
        ids = self._send([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts])
        lengths = self._send([len(prompt) for prompt in prompts])
        number = {prompt: index for index, prompt in enumerate(prompts)}
        source, target = self._send([[number[tuple(r.ids)] for r in rows], [row.place for row in rows]])
        alone = len(prompts) == len(rows)

        def keep(index: int, keys: torch.Tensor, values: torch.Tensor) -> None:
            states = (keys, values) if alone else (keys[source], values[source])
            self.state.keep_prompt(index, *states, lengths[source], target)

        logits = read_prompts(
            self.weights, ids, lengths, keep=keep, operations=self.steps.operations, banned=self.steps.banned
        )
        forced = [self._forced_after(row.ids) for row in rows]
        self._write_forced(target, forced)
        table = self._send(
            [
                [row.ids[-1] for row in rows],
                [len(row.ids) - 1 for row in rows],
                [1] * len(rows),
                [row.remaining for row in rows],
                [request.seed for _, request in taken],
                [0] * len(rows),
                [len(tokens) for tokens in forced],
            ]
        )
        chosen = choose(logits[source], sampling, draw_uniform(table[SEED], table[POSITION]))
        emitted = advance(table, self.state.forced[target], chosen, self.steps.end_ids, self.steps.call_end)
        self.state.table[:, target] = table
        logps = score(logits[source], sampling, chosen)[None] if sampling.scored else None
        return self._fetch((emitted[None], logps), list(rows))

    def _step(self, sampling: Sampling) -> _Launch:
        """Move all rows on."""
        used = [place for place, row in enumerate(self.rows) if row is not None]
        count = self.steps.size(used[-1] + 1)
        lengths = {len(row.ids) if row is not None else 0 for row in self.rows[:count]}
        moved = self.steps.run(count, sampling, longest=max(lengths) - 1, even=len(lengths) == 1)
        return self._fetch(moved, self.rows[:count])

    def _close_gaps(self) -> None:
        """Move rows to the front if a smaller batch then does."""
        used = [place for place, row in enumerate(self.rows) if row is not None]
        if self.steps.size(len(used)) == self.steps.size(used[-1] + 1):
            return
        free = [place for place in range(len(used)) if self.rows[place] is None]
        moved = used[len(used) - len(free) :]
        self.state.move(moved, free)
        for source, target in zip(moved, free, strict=True):
            row = self.rows[source]
            assert row is not None
            row.place, self.rows[target], self.rows[source] = target, row, None
        self.state.table[ACTIVE, self._send(moved)] = 0

    def _settle(self, launch: _Launch) -> list[Progress]:
        """Take note of new tokens; rows that wait for the calculator get its tokens."""
        asked: list[_Row] = []
        progress = []
        for row, tokens, logps in launch.read():
            new = [token for token in tokens if token >= 0]
            if row is None or row.done or not new:
                continue
            row.ids += new
            row.remaining -= len(new)
            row.done = row.remaining <= 0 or new[-1] in self.steps.ends
            if row.done:
                self.rows[row.place] = None
            elif new[-1] == self.steps.call_end:
                asked.append(row)
            scores = [logp for token, logp in zip(tokens, logps, strict=True) if token >= 0] if logps else []
            progress.append(Progress(row.index, new, row.done, scores))
        if asked:
            places = self._send([row.place for row in asked])
            forced = [self._forced_after(row.ids) for row in asked]
            self._write_forced(places, forced)
            self.state.release(places, self._send([len(tokens) for tokens in forced]))
        return progress

    def _forced_after(self, ids: list[int]) -> list[int]:
        """What the calculator writes next, if a call has ended and its result is not complete."""
        if self.calculator is None or self.calculator.end not in ids[-self.calculator.reach :]:
            return []
        last_end = len(ids) - 1 - ids[::-1].index(self.calculator.end)
        return self.calculator.result_ids(ids[:last_end])[len(ids) - 1 - last_end :]

    def _write_forced(self, places: torch.Tensor, forced: list[list[int]]) -> None:
        width = max(map(len, forced))
        if width:
            self.state.forced[places, :width] = self._send([[*f, *[0] * (width - len(f))] for f in forced])

    def _send(self, numbers: list[int] | list[list[int]]) -> torch.Tensor:
        """Numbers on the device; the host does not wait for it."""
        tensor = torch.tensor(numbers, dtype=torch.long)
        if self.weights.device.type == "cuda":
            return tensor.pin_memory().to(self.weights.device, non_blocking=True)
        return tensor.to(self.weights.device)

    def _fetch(self, moved: Moved, rows: list[_Row | None]) -> _Launch:
        """Begin to copy new tokens to the host."""
        if self.weights.device.type != "cuda":
            return _Launch(*moved, rows)
        emitted, logps = (
            None
            if each is None
            else torch.empty_like(each, device="cpu", pin_memory=True).copy_(each, non_blocking=True)
            for each in moved
        )
        assert emitted is not None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return _Launch(emitted, logps, rows, event)
