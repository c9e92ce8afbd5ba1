"""The GPT as a Transformers model: initialisation, the decoder, and the language-model head with its calculator."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_gpt import GPTConfig
from .embeddings_gpt import find_tokens
from .generation_gpt import GPTGenerationMixin
from .layers_gpt import GPTAttention, GPTDecoderLayer, GPTRMSNorm, GPTRotaryEmbedding, with_role


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
        role = getattr(module, "role", None)
        if role is not None:
            assert isinstance(module.weight, torch.Tensor)
            self._init_matrix(module.weight, role, uniform=self.config.init_scheme == "uniform")
        elif isinstance(module, GPTDecoderLayer) and self.config.residual_scalars:
            depth = module.self_attn.layer_idx / max(self.config.num_hidden_layers - 1, 1)
            init.constant_(module.residual_scale, 1.15 - 0.10 * depth)
            init.constant_(module.embedding_scale, 0.20 - 0.15 * depth)
        elif isinstance(module, GPTModel):
            if self.config.backout:
                init.constant_(module.backout_scale, 0.2)
            if self.config.smear:
                init.zeros_(module.smear_scale)

    def _resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Give every table that is looked up by token the new size, the value embeddings' as well."""
        for module in self.modules():
            if isinstance(module, GPTAttention) and module.value_embed is not None:
                resized = self._get_resized_embeddings(module.value_embed, *args, **kwargs)
                module.value_embed = with_role(resized, "value_embedding")
        return super()._resize_token_embeddings(*args, **kwargs)

    def _init_matrix(self, weight: torch.Tensor, role: str, *, uniform: bool) -> None:
        if role == "output":
            # Both outputs of a layer start at zero, so that a new model's layers are the identity.
            init.zeros_(weight)
        elif role == "embedding":
            init.normal_(weight, std=0.8 if uniform else 1.0)
        elif role == "head":
            # The seed starts its head at zero, the recipe just beside it.
            init.normal_(weight, std=0.001 if uniform else 0.0)
        elif role == "gate":
            init.uniform_(weight, 0.0, 0.02)
        elif uniform or role == "value_embedding":
            # A standard deviation of gain / sqrt(width), without outliers.
            bound = (0.4 if role == "up" else 1.0) * (3 / self.config.hidden_size) ** 0.5
            init.uniform_(weight, -bound, bound)
        else:
            # arXiv 2310.17813, as karpathy/nanochat@c75fe54
            fan_out, fan_in = weight.shape
            init.normal_(weight, std=fan_in**-0.5 * min(1.0, (fan_out / fan_in) ** 0.5))


class GPTModel(GPTPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.embed_tokens = with_role(nn.Embedding(config.vocab_size, config.hidden_size), "embedding")
        self.embed_norm = GPTRMSNorm(config.rms_norm_eps)
        self.layers = nn.ModuleList(GPTDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = GPTRMSNorm(config.rms_norm_eps)
        self.rotary_emb = GPTRotaryEmbedding(config)
        if config.backout:
            self.backout_scale = nn.Parameter(torch.full((1,), 0.2))
        if config.smear:
            self.smear_gate = with_role(nn.Linear(config.smear_gate_channels, 1, bias=False), "gate")
            self.smear_scale = nn.Parameter(torch.zeros(1))
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
            ValueError: not exactly one of input_ids and inputs_embeds.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        soft_tokens = None
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        elif self.config.value_embeddings:
            input_ids, soft_tokens = find_tokens(inputs_embeds, self.get_input_embeddings().weight)

        # Masks are made from the cache that was passed: an empty one made here would hide packed documents.
        seen_tokens = 0 if past_key_values is None else past_key_values.get_seq_length()
        masks = self._make_masks(inputs_embeds, attention_mask, position_ids, past_key_values)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen_tokens)[None]

        embeddings = self._enter_stage(inputs_embeds)
        if self.config.smear:
            embeddings = self._smear(embeddings, attention_mask, position_ids, past_key_values)
        hidden_states = embeddings
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        middle_states = None
        assert self.config.layer_types is not None
        for index, layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            kind = self.config.layer_types[index]
            hidden_states = layer(
                hidden_states,
                embeddings,
                input_ids,
                attention_mask=masks["full_attention" if kind == "hybrid" else kind],
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                soft_tokens=soft_tokens,
                **kwargs,
            )
            if index == self.config.num_hidden_layers // 2:
                middle_states = hidden_states
        if self.config.backout and middle_states is not None:
            hidden_states = hidden_states - self.backout_scale * middle_states
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _enter_stage(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """Norm the embeddings (B, T, hidden_size); a pipeline stage after the first gets hidden states in their place.

        Raises:
            ValueError: the model has parts that need more than the stage before hands on.
        """
        # Both transformers and vLLM put an identity in the place of layers that belong to other stages.
        is_cut = isinstance(self.layers[0], nn.Identity) or isinstance(self.layers[-1], nn.Identity)
        if is_cut and self.config.parts_across_layers():
            raise ValueError(
                f"pipeline stages hand on hidden states only, but {', '.join(self.config.parts_across_layers())} need "
                "more; divide this model by tensor parallelism instead"
            )
        return inputs_embeds if isinstance(self.layers[0], nn.Identity) else self.embed_norm(inputs_embeds)

    def _smear(
        self,
        embeddings: torch.Tensor,
        attention_mask: torch.Tensor | dict[str, torch.Tensor | None] | None,
        position_ids: torch.Tensor,
        past_key_values: Cache | None,
    ) -> torch.Tensor:
        """Add to each embedding (B, T, hidden_size) a gated share of the one before it, if there is one.

        Source: karpathy/nanochat@92d63d4 nanochat/gpt.py. A document starts anew at position 0.

        Raises:
            ValueError: a cache, or a server with a cache of its own, that has no place for the last embedding.
        """
        implementation, length = self.config._attn_implementation, embeddings.shape[1]
        if implementation == "vllm" or implementation.startswith("paged"):
            raise ValueError(f"this model smears embeddings; the cache of {implementation!r} cannot hold the last one")
        seen = F.pad(embeddings.mT, (1, 0))  # a zero in front: before the first token there is none
        if past_key_values is not None:
            try:
                kept = past_key_values.update_conv_state(embeddings.mT, len(self.layers) - 1, conv_kernel_size=1)
            except (AttributeError, IndexError, ValueError):
                raise ValueError("this model smears embeddings; make its cache with its config=") from None
            seen = kept if kept.shape[-1] > length else seen
        previous = seen.mT[:, -length - 1 : -1]
        follows = position_ids > 0
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            follows = follows & F.pad(attention_mask, (1, 0))[:, -length - 1 : -1].bool()
        gate = self.smear_scale * torch.sigmoid(self.smear_gate(embeddings[..., : self.config.smear_gate_channels]))
        return embeddings + follows.unsqueeze(-1) * gate * previous

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
        # The mask's size is a full layer's; Transformers 5.23 does not take a "hybrid" one of a static cache for that.
        full_layer = len(self.layers) - 1 if self.config.smear else None
        masks = {"full_attention": create_causal_mask(**facts, layer_idx=full_layer)}
        if self.config.sliding_window is not None:
            masks["sliding_attention"] = create_sliding_window_causal_mask(**facts)
        if self.training:
            masks = {kind: _open_empty_rows(mask) for kind, mask in masks.items()}
        return masks


def _open_empty_rows(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Let padding that may see nothing see everything.

    Its own output counts nowhere, but the backward pass of fused attention divides by what such a row sees, and the
    NaN spreads to real tokens (pytorch/pytorch#110213; seen here on an H200 with torch 2.11 and left padding).
    """
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        return mask
    return mask | ~mask.any(dim=-1, keepdim=True)


class GPTForCausalLM(GPTPreTrainedModel, GPTGenerationMixin):
    """The decoder with its language-model head; `generate` calls the calculator where the model asks for it."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.model = GPTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = with_role(nn.Linear(config.hidden_size, config.vocab_size, bias=False), "head")
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

    def create_masks_for_generate(
        self,
        config: GPTConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor | None]:
        """The masks that `generate` makes ahead of compiled steps: as the model makes them itself."""
        return self.model._make_masks(inputs_embeds, attention_mask, position_ids, past_key_values)


class GPTForSequenceClassification(GenericForSequenceClassification, GPTPreTrainedModel):
    """The decoder with a head that scores whole sequences at their last token: classifiers and reward models."""

    def __init__(self, config: GPTConfig) -> None:
        # Not the generic one's, which asks AutoModel for the decoder: only this package makes it known there.
        GPTPreTrainedModel.__init__(self, config)  # type: ignore[call-arg]
        self.num_labels = config.num_labels
        self.model = GPTModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


__all__ = ["GPTForCausalLM", "GPTForSequenceClassification", "GPTModel", "GPTPreTrainedModel"]
