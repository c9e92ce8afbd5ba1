"""How the calculator writes its results when many requests share a batch: continuous batching."""

from typing import Any

import torch
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)

from .calculator import CalculatorLogitsProcessor

# What a request's argument can be, besides the id of the token that is forced next.
FREE, RESULT_AFTER_CALL = -1, -2


class RequestCalculator(ContinuousBatchingLogitsProcessor):
    """Finds, request by request, what the calculator writes next; `ForcedTokens` then writes it.

    In continuous batching a processor sees the last token of each request alone, so the rest comes from the requests.
    Where batches overlap (asynchronous batching) that last token is not known yet when a batch is prepared: then what
    it may lead to is noted.
    """

    supported_kwargs: dict[str, type] = {}  # noqa: RUF012 (Transformers' own form)
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, calculator: CalculatorLogitsProcessor) -> None:
        self.calculator = calculator
        self.forced = torch.empty(0, dtype=torch.int32)

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """Args: int32_tensor, the arguments of this processor for all requests."""
        int32_tensor.fill_(FREE)

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        """One argument a request (requests,): a token, FREE or RESULT_AFTER_CALL."""
        forced = [self._find_forced(request.state) for request in requests_with_new_token]
        return torch.tensor(forced, dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """Keep the arguments for `ForcedTokens`, which alone is shown the last tokens."""
        self.forced = tensor_arg[: scores.shape[0]]
        return scores

    def _find_forced(self, state: Any) -> int:
        ids = state.initial_tokens + state.generated_tokens
        if state.position_offset == len(ids):
            return self._force_after(ids)
        # One token behind: the last is on the device only, unless the calculator chose it.
        unseen = self._force_after(ids)
        if unseen != FREE:
            return self._force_after([*ids, unseen])
        return RESULT_AFTER_CALL if self.calculator.result_ids(ids) else FREE

    def _force_after(self, ids: list[int]) -> int:
        if self.calculator.end not in ids[-self.calculator.reach :]:
            return FREE
        token = self.calculator.next_token(ids)
        return FREE if token is None else token


class ForcedTokens:
    """Lets only the token follow that the calculator chose, without a look at the host (a CUDA graph may hold it)."""

    supports_continuous_batching = True

    def __init__(self, requests: RequestCalculator) -> None:
        self.requests = requests

    def __call__(self, last_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Args: last_ids (requests,), scores (requests, vocab_size)."""
        calculator, forced = self.requests.calculator, self.requests.forced
        result_follows = (forced == RESULT_AFTER_CALL) & (last_ids == calculator.end)
        forced = forced.masked_fill(result_follows, calculator.output_start)
        vocabulary = torch.arange(scores.shape[-1], device=scores.device)
        chosen = vocabulary == forced.unsqueeze(-1)
        # A result always comes from the calculator, never from the model.
        banned = torch.where((forced < 0).unsqueeze(-1), vocabulary == calculator.output_start, ~chosen)
        scores = scores.masked_fill(banned, float("-inf"))
        return scores.masked_fill(chosen, 0.0)


def attach_calculator(processors: ContinuousBatchingLogitsProcessorList) -> None:
    """Replace the calculator of `generate` in a manager's list by the one for many requests."""
    found = [
        index for index, each in enumerate(processors.logits_processor) if type(each) is CalculatorLogitsProcessor
    ]
    for index in found:
        requests = RequestCalculator(processors.logits_processor[index])
        processors.logits_processor[index : index + 1] = [requests, ForcedTokens(requests)]
        processors.tensors_required += 1
