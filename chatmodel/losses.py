"""What training minimises, computed without ever holding all logits."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from chatmodel.kernels.accumulation import add_product

CACHED_LOGITS = 2**19  # in fp32 twice 2 MiB; half or twice as many made little difference on two CPU cores


class SoftcappedCrossEntropy(torch.autograd.Function):
    """Sum over positions of the cross-entropy of `cap * tanh(hidden @ weight.T / cap)`, in chunks of positions.

    The gradients are computed together with the loss, chunk by chunk, so that one chunk's logits, in the dtype of
    `hidden`, are all that is ever held, instead of all positions' in fp32 several times over. On CUDA the step from
    logits to gradient is one kernel (`chatmodel.kernels.cross_entropy`).
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
        cross_entropy = _fused_cross_entropy if hidden.is_cuda else _plain_cross_entropy
        positions = hidden.shape[0]
        # One place for all chunks: a new one would be asked for while the last one's gradient is still held.
        place = hidden.new_empty(min(chunk_size, positions), matrix.shape[0])
        for begin in range(0, positions, chunk_size):
            rows = slice(begin, begin + chunk_size)
            logits = torch.mm(hidden[rows], matrix.T, out=place[: positions - begin])
            nats, gradient = cross_entropy(logits, targets[rows], cap, needs_gradient)
            total += nats.sum()
            if grad_hidden is not None and grad_weight is not None and gradient is not None:
                torch.mm(gradient, matrix, out=grad_hidden[rows])
                add_product(grad_weight, gradient.T, hidden[rows])
        if needs_gradient:
            ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        """Scale the gradients that the forward pass left."""
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden.mul_(grad_output), grad_weight.mul_(grad_output), None, None, None


@torch.no_grad()
def measure_nats(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, cap: float | None, *, chunk_size: int = 4096
) -> torch.Tensor:
    """The cross-entropy of each position, (N,) in fp32, of what `SoftcappedCrossEntropy` sums up."""
    matrix = weight.to(hidden.dtype)
    cross_entropy = _fused_cross_entropy if hidden.is_cuda else _plain_cross_entropy
    nats = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    for begin in range(0, hidden.shape[0], chunk_size):
        rows = slice(begin, begin + chunk_size)
        nats[rows] = cross_entropy(hidden[rows] @ matrix.T, targets[rows], cap, False)[0]
    return nats


def _fused_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, cap: float | None, needs_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Nats (N,) and the gradient for `logits` (N, V) before the cap, which takes their place."""
    # Triton comes with PyTorch's CUDA builds only.
    from chatmodel.kernels.cross_entropy import cross_entropy_in_place

    nats = cross_entropy_in_place(logits, targets, cap, write_gradient=needs_gradient)
    return nats, logits if needs_gradient else None


def _plain_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, cap: float | None, needs_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same in plain PyTorch, on a CPU in blocks of rows that its caches hold from one operation to the next."""
    positions, vocabulary = logits.shape
    rows = max(1, CACHED_LOGITS // vocabulary) if logits.device.type == "cpu" else positions
    nats = torch.empty(positions, dtype=torch.float32, device=logits.device)
    # Asked for once: the pages of new memory cost a CPU more than what is computed in them.
    squashed, shares = torch.empty(2, min(rows, positions), vocabulary, dtype=torch.float32, device=logits.device)
    for begin in range(0, positions, rows):
        block, labels = logits[begin : begin + rows], targets[begin : begin + rows]
        places = squashed[: len(block)], shares[: len(block)]
        nats[begin : begin + rows] = _cross_entropy_of_block(block, labels, cap, places, needs_gradient)
    return nats, logits if needs_gradient else None


def _cross_entropy_of_block(
    logits: torch.Tensor,
    targets: torch.Tensor,
    cap: float | None,
    places: tuple[torch.Tensor, torch.Tensor],
    needs_gradient: bool,
) -> torch.Tensor:
    """Nats; `places` are two fp32 tensors of the shape of `logits` to work in."""
    squashed, shares = places
    squashed.copy_(logits)
    if cap is not None:
        squashed.mul_(1 / cap)
        if logits.dtype == torch.bfloat16:
            # tanh, by a function that is several times faster on a CPU; it is off by 1e-7, the logits by 4e-3.
            squashed.mul_(2).sigmoid_().mul_(2).sub_(1)
        else:
            squashed.tanh_()
    scale = 1.0 if cap is None else cap
    scored, labels = (targets >= 0)[:, None], targets.clamp(min=0)[:, None]
    largest = squashed.amax(dim=-1, keepdim=True)
    torch.sub(squashed, largest, out=shares).mul_(scale).exp_()
    total = shares.sum(dim=-1, keepdim=True)
    nats = (total.log() + scale * (largest - squashed.gather(1, labels))) * scored
    if needs_gradient:
        shares.mul_(scored / total).scatter_add_(1, labels, -scored.float())
        if cap is not None:
            shares.addcmul_(shares, squashed.square_(), value=-1)  # times the slope of tanh
        logits.copy_(shares)
    return nats.squeeze(1)


def choose_chunk_tokens(vocab_size: int) -> int:
    """Of how many positions the logits are held at a time.

    Each chunk reads and writes the head's whole gradient once. Twice the positions made a step 1 % faster with 65,536
    ids, where the head is a third of the work, and half of that with 32,768, for which the memory seems better kept.
    """
    return 8192 if vocab_size >= 2**16 else 4096


class LanguageModelLoss(nn.Module):
    """The model with its training loss: the module that DDP, FSDP and compile wrap.

    Equal to the plain `GPTForCausalLM` loss (a test holds it to that), without its full logits.
    """

    def __init__(self, model: Any, *, chunk_tokens: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.chunk_tokens = chunk_tokens or choose_chunk_tokens(model.config.vocab_size)
        self.compute_states: Callable[..., Any] = model.model.forward  # or that function, compiled

    def forward(
        self,
        input_ids: torch.Tensor,
        shift_labels: torch.Tensor,
        document_starts: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        divisor: torch.Tensor | float | None = None,
    ) -> torch.Tensor:
        """Mean nats a scored position. Both (B, T); `shift_labels[:, t]` follows `input_ids[:, t]`, -100 unscored.

        Args:
            document_starts: as `PackedRows` gives them, to attend within documents; needs `TRAINING_ATTENTION`.
            position_ids: (B, T), by default the places in the row.
            divisor: what the sum is divided by instead of the number of scored positions.
        """
        options = {"document_starts": document_starts, "position_ids": position_ids}
        given = {name: value for name, value in options.items() if value is not None}
        states = self.compute_states(input_ids=input_ids, use_cache=False, **given).last_hidden_state
        targets = shift_labels.flatten()
        total: torch.Tensor = SoftcappedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            states.flatten(0, 1),
            self.model.lm_head.weight,
            targets,
            self.model.config.final_logit_softcapping,
            self.chunk_tokens,
        )
        return total / ((targets >= 0).sum().clamp(min=1) if divisor is None else divisor)
