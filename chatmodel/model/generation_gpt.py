"""How the GPT generates beyond what every Transformers model does: its context is its limit, its calculator counts."""

from functools import partial
from typing import Any

import torch
from transformers.generation import GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.utils import logging

from .calculator import CalculatorLogitsProcessor
from .calculator_batching import attach_calculator
from .configuration_gpt import GPTConfig

logger = logging.get_logger(__name__)


class GPTGenerationMixin(GenerationMixin):
    """`generate` that ends where the model's context does, and calls the calculator where the model asks for it."""

    config: GPTConfig

    def _prepare_generated_length(
        self,
        generation_config: GenerationConfig,
        *args: Any,
        model_input_name: str,
        input_ids_length: int,
        inputs_tensor: torch.Tensor,
        **kwargs: Any,
    ) -> GenerationConfig:
        """The lengths of a call to `generate`: no longer than the context.

        Raises:
            ValueError: an empty prompt, one that fills the context, or ids that are no token's.
        """
        facts = {"model_input_name": model_input_name, "inputs_tensor": inputs_tensor}
        settings = super()._prepare_generated_length(
            generation_config, *args, input_ids_length=input_ids_length, **facts, **kwargs
        )
        if model_input_name == "input_ids" and not torch.compiler.is_compiling():
            check_prompt(self.config, inputs_tensor)
        room = find_room(self.config, inputs_tensor.shape[1])
        settings.max_length = self._fit(settings.max_length - input_ids_length, room) + input_ids_length
        return settings

    def _fit(self, max_new_tokens: int | None, room: int) -> int:
        if max_new_tokens is not None and max_new_tokens <= room:
            return max_new_tokens
        logger.warning_once(
            f"generation ends where the model's context of {self.config.max_position_embeddings} tokens does, "
            "whatever max_new_tokens or max_length says"
        )
        return room

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        processors = super()._get_logits_processor(*args, **kwargs)
        if self.config.calculator is not None:
            processors.append(CalculatorLogitsProcessor(self.config.calculator))
        return processors

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> ContinuousBatchingManager:
        """A manager of requests that are served together; the calculator sees each request's own tokens."""
        manager = super().init_continuous_batching(*args, **kwargs)
        attach_calculator(manager.logit_processor)
        if "add_request" not in vars(manager):  # a manager that is kept comes here again
            manager.add_request = partial(self._add_request, manager, manager.add_request)
        return manager

    def _add_request(
        self,
        manager: ContinuousBatchingManager,
        add_request: Any,
        input_ids: list[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> str | None:
        """`add_request` with the limits that `generate` has."""
        room = check_prompt(self.config, torch.tensor([input_ids]))
        wanted = manager.generation_config.max_new_tokens if max_new_tokens is None else max_new_tokens
        return add_request(input_ids, request_id, self._fit(wanted, room), **options)

    def generate_batch(self, inputs: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        """Continuous batching's `generate_batch`, which would only log what is wrong with a prompt.

        Raises:
            ValueError: as `generate`.
        """
        for input_ids in inputs:
            check_prompt(self.config, torch.tensor([input_ids]))
        return super().generate_batch(inputs, *args, **kwargs)


def find_room(config: GPTConfig, prompt_length: int) -> int:
    """How many tokens may follow a prompt in the model's context.

    Raises:
        ValueError: none, or there is no prompt.
    """
    context = config.max_position_embeddings
    if prompt_length == 0:
        raise ValueError("the prompt is empty; start it with <|bos|>")
    if prompt_length >= context:
        raise ValueError(
            f"the prompt has {prompt_length} tokens, but the model's context holds {context}, the answer included; "
            "shorten the prompt"
        )
    return context - prompt_length


def check_prompt(config: GPTConfig, input_ids: torch.Tensor) -> int:
    """The room behind a prompt (B, T), as `find_room`; ids outside the vocabulary are refused.

    On a GPU they would end the process with an assertion of the device.

    Raises:
        ValueError: as `find_room`, or names one such id.
    """
    room = find_room(config, input_ids.shape[1])
    outside = input_ids[(input_ids < 0) | (input_ids >= config.vocab_size)]
    if len(outside):
        raise ValueError(
            f"the prompt has the id {outside[0].item()}, but the model's vocabulary ends at {config.vocab_size - 1}; "
            "is it the tokenizer of another model?"
        )
    return room
