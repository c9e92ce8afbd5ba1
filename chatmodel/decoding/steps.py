"""How is a batch moved on by some tokens? Step by step where the host looks on, or by CUDA graphs."""

from collections.abc import Sequence
from threading import Lock
from types import ModuleType
from typing import Any

import torch

from chatmodel.decoding import plain
from chatmodel.decoding.sampling import Sampling, choose, score
from chatmodel.decoding.state import ACTIVE, POSITION, SEED, TOKEN, DecodingState, advance, draw_uniform
from chatmodel.decoding.weights import DecoderWeights

CAPTURE = Lock()  # one graph at a time
Moved = tuple[torch.Tensor, torch.Tensor | None]  # (steps, B): tokens, and their log-probabilities if those are wanted


class PlainSteps:
    """One token a call, in plain PyTorch."""

    lag = 0  # calls whose tokens the host has not seen when it makes the next
    operations: ModuleType = plain

    def __init__(self, weights: DecoderWeights, state: DecodingState, ends: Sequence[int]) -> None:
        self.weights, self.state, self.ends = weights, state, tuple(ends)
        self.end_ids = torch.tensor(self.ends, dtype=torch.long, device=weights.device)
        self.banned = weights.calculator["output_start"] if weights.calculator else None
        self.call_end = weights.calculator["end"] if weights.calculator else None

    def size(self, count: int) -> int:
        """How many rows a call for `count` rows has to take."""
        return count

    def run(self, count: int, sampling: Sampling, *, longest: int, even: bool) -> Moved:
        """Move the first `count` rows; returns their tokens (steps, count), -1 where a row was not active.

        The log-probability of a token that was not chosen, but came from the calculator, says nothing.

        Args:
            longest, even: as in `plain.step`.
        """
        table = self.state.table[:, :count]
        logits = plain.step(
            self.weights,
            self.state.caches,
            table[TOKEN],
            table[POSITION],
            longest=longest,
            even=even,
            banned=self.banned,
        )
        uniform = None if sampling.temperature == 0 else draw_uniform(table[SEED], table[POSITION])
        chosen = choose(logits, sampling, uniform)
        emitted = advance(table, self.state.forced[:count], chosen, self.end_ids, self.call_end)[None]
        return emitted, score(logits, sampling, chosen)[None] if sampling.scored else None


class GraphedSteps(PlainSteps):
    """Some tokens a call, by kernels that a CUDA graph replays; the host learns of them one call later.

    Args:
        captures: False launches the kernels one by one, for tests.
    """

    lag = 1

    def __init__(
        self,
        weights: DecoderWeights,
        state: DecodingState,
        ends: Sequence[int],
        *,
        steps: int = 4,
        captures: bool = True,
    ) -> None:
        # Triton's packages are not everywhere; who comes here has asked `use_kernels`.
        from chatmodel.decoding import fused

        super().__init__(weights, state, ends)
        self.operations, self.steps, self.captures = fused, steps, captures
        self.pool = torch.cuda.graph_pool_handle() if captures else None  # of all, as one runs at a time
        self.graphs: dict[tuple[int, Sampling], tuple[Any, Moved]] = {}

    def size(self, count: int) -> int:
        """The next power of two, as each size is a graph of its own; at most all rows."""
        return min(1 << (count - 1).bit_length(), self.state.rows) if count else 0

    def run(self, count: int, sampling: Sampling, *, longest: int, even: bool) -> Moved:
        """As `PlainSteps.run`; the result is overwritten by the next call."""
        if not self.captures:
            moved = self._make_room(count, sampling)
            self._launch(count, sampling, moved)
            return moved
        if (count, sampling) not in self.graphs:
            with CAPTURE:
                self.graphs[count, sampling] = self._capture(count, sampling)
        graph, moved = self.graphs[count, sampling]
        graph.replay()
        return moved

    def _make_room(self, count: int, sampling: Sampling) -> Moved:
        emitted = torch.empty(self.steps, count, dtype=torch.long, device=self.weights.device)
        return emitted, torch.empty(self.steps, count, device=self.weights.device) if sampling.scored else None

    def _capture(self, count: int, sampling: Sampling) -> tuple[Any, Moved]:
        moved = self._make_room(count, sampling)
        active = self.state.table[ACTIVE].clone()
        self.state.table[ACTIVE].zero_()  # so that the trial changes nothing
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._launch(count, sampling, moved)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            self._launch(count, sampling, moved)
        self.state.table[ACTIVE].copy_(active)
        return graph, moved

    def _launch(self, count: int, sampling: Sampling, moved: Moved) -> None:
        table, (emitted, logps) = self.state.table[:, :count], moved
        uniform = draw_uniform(table[SEED], table[POSITION])
        for number, line in enumerate(emitted):
            logits = self.operations.step(self.weights, self.state, count, self.banned)
            chosen = choose(logits, sampling, uniform)
            if logps is not None:
                logps[number].copy_(score(logits, sampling, chosen))
            self.operations.advance(self.state, chosen, self.end_ids, self.call_end, line, uniform)
