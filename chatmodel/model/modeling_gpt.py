"""The GPT as a Transformers model: rotary positions, QK norm, ReLU^2, soft-capped logits, four optional extras."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin, LogitsProcessorList
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .calculator import CalculatorLogitsProcessor
from .configuration_gpt import GPTConfig


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


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn (B, heads, T, head_dim) states by cos and sin (B, 1, T, head_dim); the halves of a head form the pairs."""
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
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)
        self.q_norm = GPTRMSNorm(config.rms_norm_eps)
        self.k_norm = GPTRMSNorm(config.rms_norm_eps)
        self.value_embed: nn.Embedding | None = None
        if config.has_value_embedding(layer_idx):
            self.value_gate_channels = min(config.value_gate_channels, config.hidden_size)
            self.value_embed = nn.Embedding(config.vocab_size, key_value_size)
            self.value_gate = nn.Linear(self.value_gate_channels, config.num_key_value_heads, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Args: hidden_states (B, T, hidden_size), input_ids (B, T) for the value embedding; same shape out."""
        input_shape = hidden_states.shape[:-1]
        head_shape = (*input_shape, -1, self.head_dim)
        query_states = self.q_proj(hidden_states).view(head_shape).transpose(1, 2)
        key_states = self.k_proj(hidden_states).view(head_shape).transpose(1, 2)
        value_states = self.v_proj(hidden_states).view(head_shape)
        if self.value_embed is not None:
            # arXiv 2410.17897 (value residual), as karpathy/nanochat@92d63d4: a gate in (0, 3) per key/value head
            gate = 3 * torch.sigmoid(self.value_gate(hidden_states[..., : self.value_gate_channels]))
            value_states = value_states + gate.unsqueeze(-1) * self.value_embed(input_ids).view(head_shape)
        value_states = value_states.transpose(1, 2)

        cos, sin = (table.unsqueeze(1) for table in position_embeddings)
        query_states = self.q_norm(rotate(query_states, cos, sin))
        key_states = self.k_norm(rotate(key_states, cos, sin))
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


class GPTMLP(nn.Module):
    """Two linear layers with ReLU^2 (arXiv 2109.08668) between them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, hidden_size) to the same shape."""
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class GPTDecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: GPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = GPTAttention(config, layer_idx)
        self.mlp = GPTMLP(config)
        self.input_layernorm = GPTRMSNorm(config.rms_norm_eps)
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
            hidden_states = self.residual_scale * hidden_states + self.embedding_scale * embeddings
        attn_output, _ = self.self_attn(self.input_layernorm(hidden_states), input_ids=input_ids, **kwargs)
        hidden_states = hidden_states + attn_output
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class GPTPreTrainedModel(PreTrainedModel):
    """Weight initialisation and what Transformers wants to know about the class."""

    config: GPTConfig
    config_class = GPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GPTDecoderLayer"]  # noqa: RUF012 (Transformers' own form, as below)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": GPTDecoderLayer, "attentions": GPTAttention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GPTDecoderLayer):
            self._init_layer(module)
        elif isinstance(module, GPTModel):
            init.normal_(module.embed_tokens.weight, std=0.8 if self.config.init_scheme == "uniform" else 1.0)
            if self.config.backout:
                init.constant_(module.backout_scale, 0.2)
        elif isinstance(module, GPTForCausalLM):
            # The seed starts the head at zero, the recipe just beside it.
            init.normal_(module.lm_head.weight, std=0.001 if self.config.init_scheme == "uniform" else 0.0)

    def _init_layer(self, layer: GPTDecoderLayer) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        # Both outputs start at zero, so that a new model's layers are the identity.
        init.zeros_(attention.o_proj.weight)
        init.zeros_(mlp.down_proj.weight)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            self._init_matrix(projection.weight)
        self._init_matrix(mlp.up_proj.weight, gain=0.4 if self.config.init_scheme == "uniform" else 1.0)
        if attention.value_embed is not None:
            bound = (3 / self.config.hidden_size) ** 0.5
            init.uniform_(attention.value_embed.weight, -bound, bound)
            init.uniform_(attention.value_gate.weight, 0.0, 0.02)
        if layer.residual_scalars:
            depth = attention.layer_idx / max(self.config.num_hidden_layers - 1, 1)
            init.constant_(layer.residual_scale, 1.15 - 0.10 * depth)
            init.constant_(layer.embedding_scale, 0.20 - 0.15 * depth)

    def _init_matrix(self, weight: torch.Tensor, gain: float = 1.0) -> None:
        fan_out, fan_in = weight.shape
        if self.config.init_scheme == "uniform":
            bound = gain * (3 / fan_in) ** 0.5  # a standard deviation of gain / sqrt(fan_in), without outliers
            init.uniform_(weight, -bound, bound)
        else:
            # arXiv 2310.17813, as karpathy/nanochat@c75fe54
            init.normal_(weight, std=fan_in**-0.5 * min(1.0, (fan_out / fan_in) ** 0.5))


class GPTModel(GPTPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        config.validate_shapes()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_norm = GPTRMSNorm(config.rms_norm_eps)
        self.layers = nn.ModuleList(GPTDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = GPTRMSNorm(config.rms_norm_eps)
        self.rotary_emb = GPTRotaryEmbedding(config)
        if config.backout:
            self.backout_scale = nn.Parameter(torch.full((1,), 0.2))
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor | None] | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Args: input_ids (B, T); packed rows are told by `position_ids` (B, T) that restart at 0, without a mask.

        Raises:
            ValueError: not exactly one of input_ids and inputs_embeds; value embeddings without input_ids.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        elif self.config.value_embeddings:
            raise ValueError(
                "this model has value embeddings, which are looked up by token: give input_ids, not inputs_embeds"
            )

        # Masks are made from the cache that was passed: an empty one made here would hide packed documents.
        seen_tokens = 0 if past_key_values is None else past_key_values.get_seq_length()
        masks = self._make_masks(inputs_embeds, attention_mask, position_ids, past_key_values)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen_tokens)[None]

        hidden_states = embeddings = self.embed_norm(inputs_embeds)
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        middle_states = None
        assert self.config.layer_types is not None
        for index, layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            hidden_states = layer(
                hidden_states,
                embeddings,
                input_ids,
                attention_mask=masks[self.config.layer_types[index]],
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
            if index == self.config.num_hidden_layers // 2:
                middle_states = hidden_states
        if self.config.backout and middle_states is not None:
            hidden_states = hidden_states - self.backout_scale * middle_states
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _make_masks(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | dict[str, torch.Tensor | None] | None,
        position_ids: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> dict[str, torch.Tensor | None]:
        """One mask per layer type; `generate` may have made them already."""
        if isinstance(attention_mask, dict):
            return attention_mask
        facts = {
            "config": self.config,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "position_ids": position_ids,
        }
        masks = {"full_attention": create_causal_mask(**facts)}
        if self.config.sliding_window is not None:
            masks["sliding_attention"] = create_sliding_window_causal_mask(**facts)
        return masks


class GPTForCausalLM(GPTPreTrainedModel, GenerationMixin):
    """The decoder with its language-model head; `generate` calls the calculator where the model asks for it."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.model = GPTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Args: input_ids (B, T); labels (B, T), not shifted, -100 where nothing is scored; logits (B, kept T, vocab).

        `loss` is the mean cross-entropy in nats over the scored positions.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        cap = self.config.final_logit_softcapping
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        processors = super()._get_logits_processor(*args, **kwargs)
        if self.config.calculator is not None:
            processors.append(CalculatorLogitsProcessor(self.config.calculator))
        return processors


__all__ = ["GPTForCausalLM", "GPTModel", "GPTPreTrainedModel"]
