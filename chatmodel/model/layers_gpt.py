"""The layers of the GPT: norm, rotary positions, attention, MLP, and the decoder layer made of them."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_gpt import GPTConfig


def with_role(layer: nn.Module, role: str) -> nn.Module:
    """Note on a linear layer or embedding what it is, which decides how it starts (`GPTPreTrainedModel`).

    Initialisation must go by the module that holds the weight: Transformers passes over modules without weights of
    their own when the class travels as custom code.
    """
    layer.role = role  # type: ignore[assignment]
    return layer


class GPTRMSNorm(nn.Module):
    """Root-mean-square norm without learned parameters."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension; the shape and dtype stay."""
        return F.rms_norm(hidden_states, (hidden_states.shape[-1],), eps=self.eps).to(hidden_states.dtype)


class GPTRotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary positions, in the textbook direction (angle +theta)."""

    inv_freq: torch.Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]  # type: ignore[index]
        compute: Callable[..., tuple[torch.Tensor, float]] = self.compute_default_rope_parameters
        if self.rope_type != "default":
            compute = ROPE_INIT_FUNCTIONS[self.rope_type]
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        inv_freq, self.attention_scaling = compute(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "GPTRotaryEmbedding":
        """Move as any module does, but keep fp32: `model.to(torch.bfloat16)` would round the frequencies."""
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, moved in self._buffers.items():
            if moved is not None and moved.dtype != torch.float32:
                self._buffers[name] = kept[name].to(moved.device)  # type: ignore[union-attr]
        return self

    @staticmethod
    def compute_default_rope_parameters(config: GPTConfig, **kwargs: Any) -> tuple[torch.Tensor, float]:
        """Inverse frequencies (head_dim / 2,) and the factor on cosines and sines (arXiv 2104.09864)."""
        assert config.head_dim is not None
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return config.rope_parameters["rope_theta"] ** -exponents, 1.0  # type: ignore[index]

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Args: x for its dtype, position_ids (B, T) or (1, T); returns cos and sin, each (B, T, head_dim)."""
        # fp32 angles: bf16 cannot tell neighbouring positions apart beyond a few hundred.
        angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        angles = torch.cat((angles, angles), dim=-1)
        scale = self.attention_scaling
        return (angles.cos() * scale).to(x.dtype), (angles.sin() * scale).to(x.dtype)


class GPTRotaryNorm(nn.Module):
    """QK norm and rotary positions of queries or keys; in either order the result is the same, as turning keeps norms.

    The norm comes first because a compiler makes one kernel of that order.
    """

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Norm (B, T, heads, head_dim) states and turn them by cos and sin (B, T, 1, head_dim)."""
        normed = F.rms_norm(states, (states.shape[-1],), eps=self.eps).to(states.dtype)
        return rotate(normed, cos, sin)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn (..., head_dim) states by cos and sin that broadcast to them; the halves of a head form the pairs."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out; returns (B, T, heads, head_dim) and the weights (B, heads, T, keys)."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    if attention_mask is not None:
        # Padding that may see nothing gets nothing, as from the fused kernels; softmax would mix everything evenly.
        sees_nothing = (attention_mask <= torch.finfo(attention_mask.dtype).min).all(dim=-1, keepdim=True)
        weights = weights.masked_fill(sees_nothing, 0.0)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class GPTAttention(nn.Module):
    """Causal self-attention: rotary positions, then QK norm; optional window and value embedding."""

    def __init__(self, config: GPTConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.head_dim is not None
        assert config.num_key_value_heads is not None
        assert config.layer_types is not None
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        # qk_scale multiplies queries and keys; folded here, one multiplication does for both.
        self.scaling = config.qk_scale**2 * self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None

        key_value_size = config.num_key_value_heads * self.head_dim
        query_size = config.num_attention_heads * self.head_dim
        self.q_proj = with_role(nn.Linear(config.hidden_size, query_size, bias=False), "input")
        self.k_proj = with_role(nn.Linear(config.hidden_size, key_value_size, bias=False), "input")
        self.v_proj = with_role(nn.Linear(config.hidden_size, key_value_size, bias=False), "input")
        self.o_proj = with_role(nn.Linear(query_size, config.hidden_size, bias=False), "output")
        self.rotary_norm = GPTRotaryNorm(config.rms_norm_eps)
        self.value_embed: nn.Module | None = None
        if config.has_value_embedding(layer_idx):
            self.value_gate_channels = min(config.value_gate_channels, config.hidden_size)
            self.value_embed = with_role(nn.Embedding(config.vocab_size, key_value_size), "value_embedding")
            gate = nn.Linear(self.value_gate_channels, config.num_key_value_heads, bias=False)
            self.value_gate = with_role(gate, "gate")

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        soft_tokens: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Args: hidden_states (B, T, hidden_size), input_ids (B, T) for the value embedding; same shape out.

        soft_tokens (B, T) is True where a position is no token, so that it has no value embedding.
        """
        input_shape = hidden_states.shape[:-1]
        head_shape = (*input_shape, -1, self.head_dim)
        query_states = self.q_proj(hidden_states).view(head_shape)
        key_states = self.k_proj(hidden_states).view(head_shape)
        value_states = self.v_proj(hidden_states).view(head_shape)
        if self.value_embed is not None:
            # arXiv 2410.17897 (value residual), as karpathy/nanochat@92d63d4: a gate in (0, 3) per key/value head
            gate = 3 * torch.sigmoid(self.value_gate(hidden_states[..., : self.value_gate_channels]))
            token_values = self._look_values_up(input_ids, soft_tokens, num_heads=value_states.shape[2])
            value_states = value_states + gate.unsqueeze(-1) * token_values
        value_states = value_states.transpose(1, 2)

        cos, sin = (table.unsqueeze(2) for table in position_embeddings)
        query_states = self.rotary_norm(query_states, cos, sin).transpose(1, 2)
        key_states = self.rotary_norm(key_states, cos, sin).transpose(1, 2)
        if past_key_values is not None:
            key_states, value_states = past_key_values.update(key_states, value_states, self.layer_idx)

        attend: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attend(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(attn_output.reshape(*input_shape, -1).contiguous()), attn_weights

    def _look_values_up(
        self, input_ids: torch.Tensor | None, soft_tokens: torch.Tensor | None, *, num_heads: int
    ) -> torch.Tensor:
        """The tokens' value embeddings (B, T, num_heads, head_dim), of the heads that this rank holds."""
        assert self.value_embed is not None
        assert input_ids is not None
        values = self.value_embed(input_ids)
        if soft_tokens is not None:
            values = values.masked_fill(soft_tokens.unsqueeze(-1), 0.0)
        values = values.view(*input_ids.shape, -1, self.head_dim)
        if values.shape[2] == num_heads:
            return values
        # Tensor parallelism divides the heads of a projection, but gives every rank whole rows of a table. The rank is
        # asked of the gate because vLLM makes one layer of the three projections, else of the table, as quantization
        # takes the gate's place in the mesh away.
        weights = (self.value_gate.weight, self.value_embed.weight)
        divided = [weight for weight in weights if isinstance(weight, DTensor)]
        rank: Any = divided[0].device_mesh.get_local_rank() if divided else self.value_gate.tp_rank
        return values[:, :, rank * num_heads : (rank + 1) * num_heads]


class GPTMLP(nn.Module):
    """Two linear layers with ReLU^2 (arXiv 2109.08668) between them; or a gated one, as in SwiGLU."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        self.up_proj = with_role(nn.Linear(config.hidden_size, config.intermediate_size, bias=False), "up")
        self.down_proj = with_role(nn.Linear(config.intermediate_size, config.hidden_size, bias=False), "output")
        self.act_fn = ACT2FN[config.hidden_act]
        self.gate_proj: nn.Module | None = None
        if config.gated_mlp:
            self.gate_proj = with_role(nn.Linear(config.hidden_size, config.intermediate_size, bias=False), "up")

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, hidden_size) to the same shape."""
        up_states = self.up_proj(hidden_states)
        if self.gate_proj is None:
            return self.down_proj(self.act_fn(up_states))
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * up_states)


class GPTInputNorm(nn.Module):
    """What a layer begins with: a share of the first embeddings is mixed into the residual stream, and that is normed.

    Source of the mixing: karpathy/nanochat@92d63d4 nanochat/gpt.py (resid_lambdas, x0_lambdas).
    """

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
        """States (B, T, hidden_size), scales (1,); returns the mixed residual stream, and its norm."""
        mixed = residual_scale * hidden_states + embedding_scale * embeddings
        return mixed, F.rms_norm(mixed, (mixed.shape[-1],), eps=self.eps).to(mixed.dtype)


class GPTDecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: GPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = GPTAttention(config, layer_idx)
        self.mlp = GPTMLP(config)
        norm_class = GPTInputNorm if config.residual_scalars else GPTRMSNorm
        self.input_layernorm = norm_class(config.rms_norm_eps)
        self.post_attention_layernorm = GPTRMSNorm(config.rms_norm_eps)
        self.residual_scalars = config.residual_scalars
        if config.residual_scalars:
            self.residual_scale = nn.Parameter(torch.ones(1))
            self.embedding_scale = nn.Parameter(torch.zeros(1))

    def forward(
        self,
        hidden_states: torch.Tensor,
        embeddings: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Args: hidden_states and the normed token embeddings, both (B, T, hidden_size); returns the same shape.

        `embeddings` is positional: gradient checkpointing only follows positional tensors that need gradients.
        """
        if self.residual_scalars:
            hidden_states, normed_states = self.input_layernorm(
                hidden_states, embeddings, self.residual_scale, self.embedding_scale
            )
        else:
            normed_states = self.input_layernorm(hidden_states)
        attn_output, _ = self.self_attn(normed_states, input_ids=input_ids, **kwargs)
        hidden_states = hidden_states + attn_output
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
