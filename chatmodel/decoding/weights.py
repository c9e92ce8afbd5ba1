"""Which numbers does decoding read, and how do they lie best? One set of static tensors, filled from a model."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from chatmodel.model import GPTForCausalLM

ROW_MULTIPLE = 8  # outputs of the joined projections are padded to it, as matrix products want it
HIGHEST_SCORE = 60.0  # attention scores beyond it could overflow an fp32 sum of exponentials


@dataclass
class Scales:
    """Which share of some states, and which of some others, are added.

    Args:
        device: (2,) in fp32.
        host: the same as plain numbers.
    """

    device: torch.Tensor
    host: tuple[float, float] = (1.0, 0.0)


@dataclass
class LayerWeights:
    """One layer's numbers.

    Args:
        qkv: (rows, hidden_size): queries, keys, values, and the value gate behind them, zero beyond its channels.
        up: (intermediate_size, hidden_size); for a gated MLP the gate's rows come first, so twice as many.
        scales: of the residual stream and of the first embedding, which enter the layer; None if that does not.
        window: the keys it sees, None for all.
    """

    qkv: torch.Tensor
    out: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    scales: Scales | None
    value_embed: torch.Tensor | None
    window: int | None


def find_obstacle(model: Any) -> str | None:
    """Why the engine cannot decode with this model, or None if it can."""
    if not isinstance(model, GPTForCausalLM):
        return f"a {type(model).__name__} is none of our models"
    config = model.config
    if config.smear:
        return "it smears embeddings"
    if config.rope_parameters["rope_type"] != "default":  # type: ignore[index]
        return f"its rotary positions are of the type {config.rope_parameters['rope_type']!r}"  # type: ignore[index]
    if config.qk_scale**2 * (config.head_dim or 0) ** 0.5 > HIGHEST_SCORE:
        return f"qk_scale={config.qk_scale} makes its attention scores too large"
    # Adapters, quantised layers and tensor parallelism put other classes in these places.
    plain = (nn.Linear, nn.Embedding)
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if (leaf.endswith("_proj") or leaf in ("lm_head", "value_gate", "value_embed")) and type(module) not in plain:
            return f"{name} is a {type(module).__name__}"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "it lies on several devices"
    weight = model.lm_head.weight
    return None if type(weight) is nn.Parameter and weight.is_floating_point() else "its weights are divided or packed"


class DecoderWeights:
    """A model's numbers in `dtype`; `refresh` takes them over again after the model was trained further.

    The tensors stay where they are, so that a captured CUDA graph sees the new numbers.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        config = model.config
        assert config.head_dim is not None
        assert config.num_key_value_heads is not None
        self.dtype = dtype
        self.device: torch.device = model.lm_head.weight.device
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.hidden_size, self.vocab_size, self.eps = config.hidden_size, config.vocab_size, config.rms_norm_eps
        self.context, self.cap = config.max_position_embeddings, config.final_logit_softcapping
        self.scaling = config.qk_scale**2 * self.head_dim**-0.5
        self.middle = config.num_hidden_layers // 2 if config.backout else None
        self.gated, self.act_name, self.act = config.gated_mlp, config.hidden_act, ACT2FN[config.hidden_act]
        self.calculator = config.calculator
        self.query_size, self.kv_size = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.cos, self.sin = self._turn_tables(model)
        self.wide_cos = torch.cat((self.cos, self.cos), dim=-1).to(dtype)
        self.wide_sin = torch.cat((-self.sin, self.sin), dim=-1).to(dtype)
        self.embedding = self._like(model.model.embed_tokens.weight)
        self.head = self.embedding if config.tie_word_embeddings else self._like(model.lm_head.weight)
        self.last_scales = self._make_scales() if config.backout else None
        self.mixes = config.residual_scalars
        self.layers = [self._make_layer(layer) for layer in model.model.layers]
        self.refresh(model)

    def _turn_tables(self, model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines (context, head_dim / 2) in fp32."""
        positions = torch.arange(self.context, device=self.device)
        cos, sin = model.model.rotary_emb(torch.empty(0, device=self.device), positions[None])
        half = self.head_dim // 2
        return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()

    def _like(self, weight: torch.Tensor) -> torch.Tensor:
        """The model's own tensor where it will do, else room for a copy."""
        return weight.detach() if weight.dtype == self.dtype else self._empty(*weight.shape)

    def _empty(self, *shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=self.dtype, device=self.device)

    def _make_layer(self, layer: Any) -> LayerWeights:
        attention, mlp = layer.self_attn, layer.mlp
        rows = self.query_size + 2 * self.kv_size
        has_values = attention.value_embed is not None
        if has_values:
            rows += -(-self.kv_heads // ROW_MULTIPLE) * ROW_MULTIPLE
        inner = mlp.up_proj.weight.shape[0]
        return LayerWeights(
            qkv=self._empty(rows, self.hidden_size),
            out=self._like(attention.o_proj.weight),
            up=self._empty(2 * inner, self.hidden_size) if self.gated else self._like(mlp.up_proj.weight),
            down=self._like(mlp.down_proj.weight),
            scales=self._make_scales() if self.mixes else None,
            value_embed=self._like(attention.value_embed.weight) if has_values else None,
            window=attention.sliding_window,
        )

    def _make_scales(self) -> Scales:
        return Scales(torch.tensor([1.0, 0.0], device=self.device))

    @property
    def gate_offset(self) -> int:
        """The row of `qkv` where the value gate begins."""
        return self.query_size + 2 * self.kv_size

    def fits(self, model: Any, dtype: torch.dtype) -> bool:
        """Whether `refresh` will do, the model being the one it was made of and lying where it did."""
        shared = [(model.lm_head.weight, self.head), (model.model.embed_tokens.weight, self.embedding)]
        for layer, own in zip(model.model.layers, self.layers, strict=True):
            shared.append((layer.self_attn.o_proj.weight, own.out))
        unmoved = all(
            own.shape == weight.shape and (weight.dtype != self.dtype or weight.data_ptr() == own.data_ptr())
            for weight, own in shared
        )
        return unmoved and dtype == self.dtype and model.lm_head.weight.device == self.device

    @torch.no_grad()
    def refresh(self, model: Any) -> None:
        """Take over the model's numbers as they are now."""
        _take(self.embedding, model.model.embed_tokens.weight)
        if self.head is not self.embedding:
            _take(self.head, model.lm_head.weight)
        if self.last_scales is not None:
            self.last_scales.device[1:].copy_(-model.model.backout_scale)
        for own, layer in zip(self.layers, model.model.layers, strict=True):
            self._refresh_layer(own, layer)
        scales = [each for each in (self.last_scales, *(layer.scales for layer in self.layers)) if each is not None]
        if scales:
            for each, numbers in zip(scales, torch.stack([s.device for s in scales]).tolist(), strict=True):
                each.host = (numbers[0], numbers[1])

    def _refresh_layer(self, own: LayerWeights, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        joined = torch.split(own.qkv[: self.gate_offset], [self.query_size, self.kv_size, self.kv_size])
        for part, projection in zip(joined, (attention.q_proj, attention.k_proj, attention.v_proj), strict=True):
            part.copy_(projection.weight)
        if own.value_embed is not None:
            gate = attention.value_gate.weight
            own.qkv[self.gate_offset : self.gate_offset + gate.shape[0], : gate.shape[1]].copy_(gate)
            _take(own.value_embed, attention.value_embed.weight)
        _take(own.out, attention.o_proj.weight)
        _take(own.down, mlp.down_proj.weight)
        if self.gated:
            inner = mlp.up_proj.weight.shape[0]
            own.up[:inner].copy_(mlp.gate_proj.weight)
            own.up[inner:].copy_(mlp.up_proj.weight)
        else:
            _take(own.up, mlp.up_proj.weight)
        if own.scales is not None:
            own.scales.device[:1].copy_(layer.residual_scale)
            own.scales.device[1:].copy_(layer.embedding_scale)

    def bytes_read(self, position: int, batch: int) -> int:
        """Bytes a step must read at least: matrices once, and each row's keys and values behind `position` tokens."""
        size = self.embedding.element_size()
        matrices = sum(w.numel() for layer in self.layers for w in (layer.qkv, layer.out, layer.up, layer.down))
        seen = sum(position if layer.window is None else min(position, layer.window) for layer in self.layers)
        return size * (matrices + self.head.numel() + batch * 2 * self.kv_size * seen)


def _take(own: torch.Tensor, weight: torch.Tensor) -> None:
    if own.data_ptr() != weight.data_ptr():
        own.copy_(weight)
