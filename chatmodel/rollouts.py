"""What does a model answer while it is trained? Completions by the decoding engine, whose memory and graphs stay."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from chatmodel.decoding.engine import Decoder, Request
from chatmodel.decoding.pool import Engine, find_engine
from chatmodel.decoding.sampling import Sampling
from chatmodel.generation import build_generation_config, generate_replies, has_engine
from chatmodel.runtime import UserError


@dataclass
class Completion:
    """A sampled reply: its ids, the end token included, and their log-probabilities where the engine gave them."""

    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)


class Sampler:
    """Samples completions of a model as it is at each call, `rows` side by side.

    Keys, values and CUDA graphs are made once, for prompts of up to `longest_prompt` tokens, and the engine's weights
    are overwritten where they lie. What is drawn follows from the seed and the place given to `sample` alone, so a run
    that continues from a checkpoint draws what the unbroken one would have drawn.
    """

    tokens, seconds = 0, 0.0  # of all calls so far

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_new_tokens: int,
        temperature: float,
        top_k: int | None = None,
        top_p: float = 1.0,
        rows: int,
        longest_prompt: int,
        seed: int,
    ) -> None:
        self.model, self.tokenizer, self.seed, self.rows = model, tokenizer, seed, rows
        settings = build_generation_config(
            tokenizer, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k
        )
        self.max_new_tokens, self.ends = max_new_tokens, tuple(settings.eos_token_id)
        self.sampling = Sampling(temperature, top_k, top_p, scored=True)
        self.length = longest_prompt + max_new_tokens
        self._engine: Engine | None = None
        self._decoder: Decoder | None = None

    def sample(self, prompts: Sequence[list[int]], place: str) -> list[Completion]:
        """One completion for each prompt; equal prompts get draws of their own.

        Args:
            place: where in the run this is, such as the step and the rank; the same draws the same again.
        """
        began = time.perf_counter()
        seeds = draw_seeds(f"{self.seed} {place}", len(prompts))
        completions = self._decode(prompts, seeds) if has_engine(self.model) else self._generate(prompts, seeds[0])
        self.seconds += time.perf_counter() - began
        self.tokens += sum(len(completion.ids) for completion in completions)
        return completions

    def _decode(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Completion]:
        engine = find_engine(self.model)
        if self._decoder is None or self._engine is not engine:
            self._engine, self._decoder = engine, engine.make_decoder(self.rows, self.length, self.ends)
        requests = [Request(prompt, self.max_new_tokens, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        completions = [Completion() for _ in prompts]
        for progress in self._decoder.decode(requests, self.sampling):
            completions[progress.index].ids += progress.ids
            completions[progress.index].logps += progress.logps
        return completions

    def _generate(self, prompts: Sequence[list[int]], seed: int) -> list[Completion]:
        with torch.random.fork_rng():
            replies = generate_replies(
                self.model,
                self.tokenizer,
                prompts,
                max_new_tokens=self.max_new_tokens,
                temperature=self.sampling.temperature,
                top_k=self.sampling.top_k,
                batch_size=self.rows,
                seed=seed,
                keep_end=True,
            )
        return [Completion(reply[0]) for reply in replies]


def draw_seeds(place: str, count: int) -> list[int]:
    """`count` numbers that follow from a text, below 2^62."""
    digest = hashlib.sha256(place.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 2)
    return torch.randint(2**62, (count,), generator=generator).tolist()


def check_lengths(model: Any, longest_prompt: int, max_new_tokens: int) -> None:
    """Refuse completions that may not fit the model's context behind the longest prompt.

    Raises:
        UserError: prompt and completion together may be longer than `max_position_embeddings`.
    """
    context = model.config.max_position_embeddings
    if longest_prompt >= context:
        raise UserError(
            f"the longest prompt has {longest_prompt} tokens, but the model's context holds {context}, the answer "
            "included; leave such problems out"
        )
    if longest_prompt + max_new_tokens > context:
        raise UserError(
            f"max_completion_length={max_new_tokens} does not fit the model's context of {context} behind the longest "
            f"prompt of {longest_prompt} tokens; set it to at most {context - longest_prompt}"
        )
