"""How is the loss of packed conversations computed: with which attention, which layers, compiled or not?"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from chatmodel.attention import TRAINING_ATTENTION, choose_attention, use_attention
from chatmodel.losses import LanguageModelLoss, measure_nats
from chatmodel.model import GPTForCausalLM
from chatmodel.train_step import EVALUATION_ATTENTION, attention_shapes, choose_training_layers

Batch = dict[str, Any]
INPUTS = ("input_ids", "position_ids", "document_starts")


class PackedLoss:
    """Pretraining's way to the loss, for rows of conversations that do not see each other.

    Whole logits and masks of a row's length squared are never held. `train` and `evaluate` switch between the parts
    that training exchanges and the model's own.

    Args:
        batch_size, length: of the batches to come; of all of them where `compiled`, which takes one shape only.
        compiled: also with the parts of `chatmodel.training_layers`; in plain PyTorch the model's own are faster.
    """

    def __init__(self, model: GPTForCausalLM, *, batch_size: int, length: int, compiled: bool) -> None:
        self.model, self.own_attention = model, model.config._attn_implementation
        self.head: torch.nn.Parameter = model.lm_head.weight  # type: ignore[assignment]
        weight = self.head
        shapes = attention_shapes(model.config, batch_size, True, length=length)
        self.attention = choose_attention(shapes, weight.device, weight.dtype, compiled=compiled)
        self.layers = None
        if compiled:
            self.layers = choose_training_layers(
                model, tokens=batch_size * length, device=weight.device, dtype=weight.dtype
            )
        self.module = LanguageModelLoss(model)
        if compiled:
            self.module.compute_states = torch.compile(model.model.forward, dynamic=False, fullgraph=True)
        use_attention(self.attention, length=length, device=weight.device)
        self.train()

    def __call__(self, batch: Batch, *, divisor: torch.Tensor | float | None) -> torch.Tensor:
        """The sum of the nats of all positions with a label over `divisor`, by default over their number."""
        inputs = {name: batch[name] for name in INPUTS}
        loss: torch.Tensor = self.module(shift_labels=batch["shift_labels"], divisor=divisor, **inputs)
        return loss

    @torch.no_grad()
    def measure(self, batch: Batch) -> torch.Tensor:
        """Nats of each position, (B, T) in fp32, 0 where there is no label; never compiled, so for any shape."""
        states = self.model.model(**{name: batch[name] for name in INPUTS}, use_cache=False).last_hidden_state
        labels, cap = batch["shift_labels"], self.model.config.final_logit_softcapping
        nats = measure_nats(states.flatten(0, 1), self.head, labels.flatten(), cap)
        return nats.view(labels.shape)

    def train(self) -> None:
        """Put the parts of training into the model."""
        if self.layers is not None:
            self.layers.install()
        self.model.set_attn_implementation(TRAINING_ATTENTION)
        self.model.train()

    def remove(self) -> None:
        """Give the model its own parts back, for good or for an evaluation."""
        if self.layers is not None:
            self.layers.remove()
        self.model.set_attn_implementation(self.own_attention)
        self.model.eval()

    @contextmanager
    def evaluating(self, *, packed: bool) -> Iterator[GPTForCausalLM]:
        """The model as evaluation wants it: no dropout, its own parts; attention within documents where `packed`."""
        self.remove()
        self.model.set_attn_implementation(TRAINING_ATTENTION if packed else EVALUATION_ATTENTION)
        try:
            yield self.model
        finally:
            self.train()
