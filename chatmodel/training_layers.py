"""Which parts of the model are exchanged while it trains, for ones that compile and back-propagate with less memory?

They compute what the parts they stand for compute; only what is kept for the backward pass differs.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from chatmodel.kernels.mlp import fused_mlp

ConvertLinear = Callable[[nn.Linear], nn.Linear]
Swap = tuple[nn.Module, str, nn.Module]  # the module that owns a part, the part's name, what takes its place


class ReLUSquared(torch.autograd.Function):
    """`relu(x)^2`, keeping its output alone: the next matrix product keeps that anyway, and the slope is its root."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor) -> torch.Tensor:
        """Any shape."""
        output = states.relu().square()
        ctx.save_for_backward(output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """2 relu(x) = 2 sqrt(relu(x)^2)."""
        (output,) = ctx.saved_tensors
        return gradient * (2 * output.sqrt())


class RMSNorm(torch.autograd.Function):
    """`GPTRMSNorm`, keeping its output, which the next matrix product keeps anyway, and one number a position."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, eps: float) -> torch.Tensor:
        """The last dimension is normed."""
        precise = states.float()
        inverse = torch.rsqrt(precise.square().mean(dim=-1, keepdim=True) + eps)
        output = (precise * inverse).to(states.dtype)
        ctx.save_for_backward(output, inverse)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """With y the output and r the inverse root mean square: `r (dy - y mean(dy y))`."""
        output, inverse = ctx.saved_tensors
        return _through_norm(gradient.float(), output.float(), inverse).to(output.dtype), None


class InputNorm(torch.autograd.Function):
    """`GPTInputNorm`, keeping only what `RMSNorm` keeps: the mixed stream is the output over the inverse size.

    So the stream before mixing, which the scales' gradients ask for, is not kept either. The residual scale must not
    be 0; it starts at 1.15 or less.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        embeddings: torch.Tensor,
        residual_scale: torch.Tensor,
        embedding_scale: torch.Tensor,
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States (B, T, hidden_size), scales (1,); returns the mixed stream and its norm."""
        mixed = (residual_scale * hidden_states + embedding_scale * embeddings).to(hidden_states.dtype)
        precise = mixed.float()
        inverse = torch.rsqrt(precise.square().mean(dim=-1, keepdim=True) + eps)
        normed = (precise * inverse).to(mixed.dtype)
        ctx.save_for_backward(normed, inverse, embeddings, residual_scale, embedding_scale)
        return mixed, normed

    @staticmethod
    def backward(ctx: Any, grad_mixed: torch.Tensor, grad_normed: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """With m = s h + t e: the gradient for s is sum(g h) = (sum(g m) - t sum(g e)) / s."""
        normed, inverse, embeddings, residual_scale, embedding_scale = ctx.saved_tensors
        normed, dtype = normed.float(), normed.dtype
        gradient = grad_mixed.float() + _through_norm(grad_normed.float(), normed, inverse)
        along_mixed = (gradient * (normed / inverse)).sum()
        along_embeddings = (gradient * embeddings.float()).sum()
        scale, share = residual_scale.float(), embedding_scale.float()
        return (
            (scale * gradient).to(dtype),
            (share * gradient).to(dtype),
            ((along_mixed - share * along_embeddings) / scale).to(residual_scale.dtype),
            along_embeddings.to(embedding_scale.dtype).expand_as(embedding_scale),
            None,
        )


def _through_norm(gradient: torch.Tensor, output: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    return (gradient - output * (gradient * output).mean(dim=-1, keepdim=True)) * inverse


class RotaryNorm(torch.autograd.Function):
    """Norm and turn (`GPTRotaryNorm`), keeping the output, which attention keeps anyway, and one number a head.

    With y the turned, normed states, R the turn and r the inverse root mean square, the gradient is
    `r R^T (dy - y mean(dy y))`: turning changes no scalar product.
    """

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """States (B, T, heads, head_dim); cos and `signed_sin` (B, T, 1, head_dim), the latter from `RotaryTable`."""
        precise = states.float()
        inverse = torch.rsqrt(precise.square().mean(dim=-1, keepdim=True) + eps)
        normed = precise * inverse
        output = (normed * cos + _swap_halves(normed) * signed_sin).to(states.dtype)
        ctx.save_for_backward(output, inverse, cos, signed_sin)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """The gradient for the states before the norm."""
        output, inverse, cos, signed_sin = ctx.saved_tensors
        across = _through_norm(gradient.float(), output.float(), inverse)
        turned_back = across * cos + _swap_halves(across * signed_sin)
        return turned_back.to(output.dtype), None, None, None


class GatedValue(torch.autograd.Function):
    """`value + gate * table[ids]`, keeping no rows of the table: a second look costs what reading them would."""

    @staticmethod
    def forward(
        ctx: Any, value: torch.Tensor, gate: torch.Tensor, table: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        """Value (B, T, heads, head_dim), gate (B, T, heads), table (V, heads * head_dim), ids (B, T)."""
        ctx.save_for_backward(gate, table, ids)
        return value + gate.unsqueeze(-1) * F.embedding(ids, table).view(value.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        """The gradients for value, gate and table."""
        gate, table, ids = ctx.saved_tensors
        # Another operation than in the forward pass, as a compiler keeps the result of one that comes twice.
        rows = table.index_select(0, ids.flatten()).view(gradient.shape)
        for_gate = (gradient.float() * rows.float()).sum(dim=-1).to(gate.dtype)
        for_rows = (gradient * gate.unsqueeze(-1)).flatten(2)
        for_table = torch.ops.aten.embedding_dense_backward(for_rows, ids, table.shape[0], -1, False)
        return gradient, for_gate, for_table, None


# A compiler is to leave these to autograd, and not to trace them itself: PyTorch 2.11's Dynamo loses gradients of
# functions that keep their own output, silently (2.13's does not; `tests/test_training_layers.py` compares).
@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def relu_squared(states: torch.Tensor) -> torch.Tensor:
    """`ReLUSquared`."""
    return ReLUSquared.apply(states)  # type: ignore[no-untyped-call]


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def rms_norm(states: torch.Tensor, eps: float) -> torch.Tensor:
    """`RMSNorm`."""
    return RMSNorm.apply(states, eps)  # type: ignore[no-untyped-call]


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def input_norm(
    hidden_states: torch.Tensor,
    embeddings: torch.Tensor,
    residual_scale: torch.Tensor,
    embedding_scale: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`InputNorm`."""
    return InputNorm.apply(  # type: ignore[no-untyped-call]
        hidden_states, embeddings, residual_scale, embedding_scale, eps
    )


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def rotary_norm(states: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor, eps: float) -> torch.Tensor:
    """`RotaryNorm`."""
    return RotaryNorm.apply(states, cos, signed_sin, eps)  # type: ignore[no-untyped-call]


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def gated_value(value: torch.Tensor, gate: torch.Tensor, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """`GatedValue`."""
    return GatedValue.apply(value, gate, table, ids)  # type: ignore[no-untyped-call]


def _swap_halves(states: torch.Tensor) -> torch.Tensor:
    """The second half of the last dimension before the first; a flip compiles to a plain load, `cat` does not."""
    pairs = states.view(*states.shape[:-1], 2, -1)
    return pairs.flip(-2).view(states.shape)


class TrainingActivation(nn.Module):
    """ReLU^2 in the place of the MLP's activation."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Any shape."""
        return relu_squared(states)


class TrainingMLP(nn.Module):
    """`FusedMLP` with the weights of the MLP whose place it takes."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.up_proj, self.down_proj = mlp.up_proj, mlp.down_proj  # the parameters keep their names

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(B, T, hidden_size) to the same shape."""
        return fused_mlp(states, self.up_proj.weight, self.down_proj.weight)


class TrainingNorm(nn.Module):
    """`RMSNorm` in the place of a norm of the residual stream."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """The last dimension is normed."""
        return rms_norm(states, self.eps)


class TrainingInputNorm(nn.Module):
    """`InputNorm` in the place of the norm a layer begins with."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(
        self,
        hidden_states: torch.Tensor,
        embeddings: torch.Tensor,
        residual_scale: torch.Tensor,
        embedding_scale: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `GPTInputNorm`."""
        if hidden_states is embeddings:  # in the first layer; a compiler wants them told apart
            hidden_states = embeddings.view_as(embeddings)
        return input_norm(hidden_states, embeddings, residual_scale, embedding_scale, self.eps)


class TrainingSelfAttention(nn.Module):
    """Attention of whole rows without padding or cache, whose value embeddings are looked up twice and not kept.

    One matrix product for all three projections was slower on an H200: the gradients have to be put together for it.
    """

    def __init__(self, attention: Any, eps: float, convert: ConvertLinear | None = None) -> None:
        super().__init__()
        # The parameters keep their names.
        projections = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        if convert is not None:
            projections = [convert(projection) for projection in projections]
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = projections
        self.value_embed = attention.value_embed
        if self.value_embed is not None:
            self.value_gate, self.value_gate_channels = attention.value_gate, attention.value_gate_channels
        self.config, self.head_dim, self.scaling = attention.config, attention.head_dim, attention.scaling
        self.sliding_window, self.is_causal = attention.sliding_window, True
        self.num_key_value_groups = attention.num_key_value_groups  # what some attention functions ask for
        self.eps = eps

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        input_ids: Any = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """As `GPTAttention`: hidden_states (B, T, hidden_size), input_ids (B, T), tables of `RotaryTable`."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        parts = [projection(hidden_states) for projection in (self.q_proj, self.k_proj, self.v_proj)]
        query, key, value = (part.view(shape) for part in parts)
        if self.value_embed is not None:
            gate = 3 * torch.sigmoid(self.value_gate(hidden_states[..., : self.value_gate_channels]))
            value = gated_value(value, gate, self.value_embed.weight, input_ids)
        cos, signed_sin = (table.unsqueeze(2) for table in position_embeddings)
        query, key = (rotary_norm(part, cos, signed_sin, self.eps) for part in (query, key))
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        output, _ = attend(
            self,
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attention_mask,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.reshape((*hidden_states.shape[:-1], -1))), None


class RotaryTable(nn.Module):
    """The model's cosines and sines up to its context, made once: a compiler would make them anew in every layer.

    The sines of the first half carry the minus of the rotation, as `RotaryNorm` wants it.
    """

    cos: torch.Tensor
    signed_sin: torch.Tensor

    def __init__(self, rotary_embedding: nn.Module, length: int) -> None:
        super().__init__()
        device = next(rotary_embedding.buffers()).device
        positions = torch.arange(length, device=device)[None]
        # In fp32: rounded, cos^2 + sin^2 is not 1, and turning would not keep norms, which `RotaryNorm` counts on.
        cos, sin = rotary_embedding(torch.empty((), dtype=torch.float32, device=device), positions)
        half = sin.shape[-1] // 2
        self.register_buffer("cos", cos[0], persistent=False)
        self.register_buffer("signed_sin", torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=-1), persistent=False)

    def forward(self, states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the tables for `position_ids` (B, T): each (B, T, head_dim)."""
        return self.cos[position_ids], self.signed_sin[position_ids]


class TrainingLayers:
    """The parts of a model that training exchanges; `install` puts them in, `remove` puts the model's own back.

    Args:
        fuse_mlp: ReLU^2 within the products of the MLP (`chatmodel.kernels.mlp`).
        convert: makes the linear layers of attention and MLP others that share their weights (`kernels.fp8`).
    """

    def __init__(
        self, model: PreTrainedModel, *, fuse_mlp: bool = False, convert: ConvertLinear | None = None
    ) -> None:
        config, decoder = model.config, model.model
        table = RotaryTable(decoder.rotary_emb, config.max_position_embeddings)
        norm = TrainingNorm(config.rms_norm_eps)
        self.swaps: list[Swap] = [
            (decoder, "rotary_emb", table),
            (decoder, "embed_norm", norm),
            (decoder, "norm", norm),
        ]
        for layer in decoder.layers:
            self.swaps.append(
                (layer, "self_attn", TrainingSelfAttention(layer.self_attn, config.rms_norm_eps, convert))
            )
            input_norm = TrainingInputNorm(config.rms_norm_eps) if config.residual_scalars else norm
            self.swaps += [(layer, "input_layernorm", input_norm), (layer, "post_attention_layernorm", norm)]
            if fuse_mlp:
                self.swaps.append((layer, "mlp", TrainingMLP(layer.mlp)))
            elif config.hidden_act == "relu2":
                self.swaps.append((layer.mlp, "act_fn", TrainingActivation()))
            if convert is not None:
                names = [name for name, _ in layer.mlp.named_children() if name.endswith("_proj")]
                self.swaps += [(layer.mlp, name, convert(getattr(layer.mlp, name))) for name in names]
        self.own_parts: list[Swap] = [(owner, name, getattr(owner, name)) for owner, name, _ in self.swaps]

    def install(self) -> None:
        """Make the model train with them."""
        _set_parts(self.swaps)

    def remove(self) -> None:
        """Make the model what it was."""
        _set_parts(self.own_parts)


def _set_parts(swaps: list[Swap]) -> None:
    for owner, name, part in swaps:
        setattr(owner, name, part)
