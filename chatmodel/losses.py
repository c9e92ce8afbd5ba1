"""What pretraining minimises, computed without ever holding all logits."""

from typing import Any

import torch
from torch import nn


class SoftcappedCrossEntropy(torch.autograd.Function):
    """Sum over positions of the cross-entropy of `cap * tanh(hidden @ weight.T / cap)`, in chunks of positions.

    The gradients are computed together with the loss, chunk by chunk, so that one chunk's logits are all that is ever
    held: (chunk, vocab_size) instead of (positions, vocab_size) in fp32 several times over.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        cap: float | None,
        chunk_size: int,
    ) -> torch.Tensor:
        """Args: hidden (N, D), weight (V, D), targets (N,) with -100 where nothing is scored. Returns a scalar."""
        needs_gradient = hidden.requires_grad or weight.requires_grad
        matrix = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if needs_gradient else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_gradient else None
        total = hidden.new_zeros((), dtype=torch.float32)
        for begin in range(0, hidden.shape[0], chunk_size):
            rows = slice(begin, begin + chunk_size)
            capped, slope = _cap_logits((hidden[rows] @ matrix.T).float(), cap)
            scored = targets[rows] >= 0
            labels = targets[rows].clamp(min=0)[:, None]
            log_normalizer = capped.logsumexp(dim=-1, keepdim=True)
            nats = (log_normalizer - capped.gather(1, labels)).squeeze(1)
            total = total + (nats * scored).sum()
            if grad_hidden is None or grad_weight is None:
                continue
            gradient = capped.sub_(log_normalizer).exp_()
            gradient.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=gradient.dtype))
            gradient.mul_(scored[:, None])
            if slope is not None:
                gradient.mul_(slope)
            gradient = gradient.to(hidden.dtype)
            grad_hidden[rows] = gradient @ matrix
            grad_weight += gradient.T @ hidden[rows]
        if grad_hidden is not None and grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        """Scale the gradients that the forward pass left."""
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_output, grad_weight * grad_output, None, None, None


def _cap_logits(logits: torch.Tensor, cap: float | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The capped logits and the derivative of the cap."""
    if cap is None:
        return logits, None
    squashed = torch.tanh(logits / cap)
    return squashed * cap, 1 - squashed.square()


class LanguageModelLoss(nn.Module):
    """The model with its training loss: the module that DDP, FSDP and compile wrap.

    Equal to the plain `GPTForCausalLM` loss (a test holds it to that), without its full logits.
    """

    def __init__(self, model: Any, *, chunk_tokens: int = 4096) -> None:
        super().__init__()
        self.model = model
        self.chunk_tokens = chunk_tokens

    def forward(self, input_ids: torch.Tensor, shift_labels: torch.Tensor) -> torch.Tensor:
        """Mean nats a scored position. Both (B, T); `shift_labels[:, t]` follows `input_ids[:, t]`, -100 unscored."""
        states = self.model.model(input_ids=input_ids, use_cache=False).last_hidden_state
        targets = shift_labels.flatten()
        total: torch.Tensor = SoftcappedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            states.flatten(0, 1),
            self.model.lm_head.weight,
            targets,
            self.model.config.final_logit_softcapping,
            self.chunk_tokens,
        )
        return total / (targets >= 0).sum().clamp(min=1)
