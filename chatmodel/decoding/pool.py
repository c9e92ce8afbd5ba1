"""Which engine serves a model? One for each model, kept as long as it; calls at the same time do not meet."""

import importlib.util
from collections.abc import Generator, Sequence
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch

from chatmodel.decoding.engine import Decoder, Progress, Request
from chatmodel.decoding.sampling import Sampling
from chatmodel.decoding.state import DecodingState
from chatmodel.decoding.steps import GraphedSteps, PlainSteps
from chatmodel.decoding.weights import DecoderWeights
from chatmodel.model import GPTForCausalLM
from chatmodel.model.calculator import CalculatorLogitsProcessor
from chatmodel.runtime import logger, warn_once

KEPT_BYTES = 2**30  # of keys and values that decoders may hold while they have nothing to do
LENGTH_STEP = 256  # lengths are rounded up to it, so that a decoder serves again


class Engine:
    """Decodes with a model's numbers in `dtype`, for any number of threads."""

    def __init__(self, model: GPTForCausalLM, dtype: torch.dtype) -> None:
        self.weights = DecoderWeights(model, dtype)
        self.idle: list[Decoder] = []
        self.lock = Lock()

    def decode(
        self, requests: Sequence[Request], sampling: Sampling, *, end_ids: Sequence[int], rows: int
    ) -> Generator[Progress, None, None]:
        """New tokens of the requests as they come, `rows` of them side by side; closing the iterator ends it.

        Args:
            end_ids: each ends a reply, as its last token.
        """
        if not requests:
            return
        rows = min(rows, len(requests))
        length = max(len(request.prompt) + request.max_new_tokens for request in requests)
        decoder = self._take(rows, length, tuple(end_ids))
        try:
            yield from decoder.decode(requests, sampling)
        finally:
            self._give_back(decoder)

    def _take(self, rows: int, length: int, ends: tuple[int, ...]) -> Decoder:
        with self.lock:
            for index, decoder in enumerate(self.idle):
                state = decoder.state
                if state.rows == rows and state.length >= length and decoder.steps.ends == ends:
                    return self.idle.pop(index)
            self.idle.clear()
        return self.make_decoder(rows, length, ends)

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def make_decoder(self, rows: int, length: int, ends: Sequence[int]) -> Decoder:
        """A decoder of one's own, for `rows` sequences side by side of at least `length` tokens."""
        length = min(-(-length // LENGTH_STEP) * LENGTH_STEP, self.weights.context)
        table = self.weights.calculator
        longest_forced = CalculatorLogitsProcessor(table).reach if table else 1
        state = DecodingState(self.weights, rows=rows, length=length, longest_forced=longest_forced)
        steps = GraphedSteps if use_kernels(self.weights) else PlainSteps
        return Decoder(self.weights, steps(self.weights, state, ends))

    def _give_back(self, decoder: Decoder) -> None:
        with self.lock:
            self.idle.append(decoder)
            while sum(each.state.nbytes for each in self.idle) > KEPT_BYTES:
                self.idle.pop(0)


_ENGINES: WeakKeyDictionary[GPTForCausalLM, Engine] = WeakKeyDictionary()
_ENGINES_LOCK = Lock()


@torch.inference_mode(mode=False)
def find_engine(model: Any, dtype: torch.dtype | None = None) -> Engine:
    """The engine of a model, with its numbers as they are now.

    Args:
        dtype: to compute in; by default bf16 on a GPU that has it, and the model's own elsewhere.
    """
    weight = model.lm_head.weight
    if dtype is None:
        half = weight.device.type == "cuda" and torch.cuda.is_bf16_supported()
        dtype = torch.bfloat16 if half else weight.dtype
    with _ENGINES_LOCK:
        engine = _ENGINES.get(model)
        if engine is None or not engine.weights.fits(model, dtype):
            engine = _ENGINES[model] = Engine(model, dtype)
            if dtype != weight.dtype:
                logger.info("replies are decoded in %s", str(dtype).removeprefix("torch."))
        else:
            engine.weights.refresh(model)
    return engine


def use_kernels(weights: DecoderWeights) -> bool:
    """Whether steps are made of kernels and CUDA graphs; says once if a GPU has to do without."""
    if weights.device.type != "cuda":
        return False
    if importlib.util.find_spec("triton") is None:
        obstacle: str | None = "Triton is not installed"
    else:
        from chatmodel.decoding.fused import find_obstacle

        obstacle = find_obstacle(weights)
    if obstacle is not None:
        warn_once("decoding is slow here, step by step: %s", obstacle)
    return obstacle is None
