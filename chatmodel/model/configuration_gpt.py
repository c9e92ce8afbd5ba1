"""Which numbers and switches define a chatmodel GPT."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

AUTO_MAP = {
    "AutoConfig": "configuration_gpt.GPTConfig",
    "AutoModel": "modeling_gpt.GPTModel",
    "AutoModelForCausalLM": "modeling_gpt.GPTForCausalLM",
    "AutoModelForSequenceClassification": "modeling_gpt.GPTForSequenceClassification",
}

# The parts in order, with what each takes and gives. vLLM leaves out those that belong to other stages.
PIPELINE_PLAN = {
    "embed_tokens": (["input_ids"], ["inputs_embeds"]),
    "embed_norm": (["inputs_embeds"], ["hidden_states"]),
    "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
    "norm": (["hidden_states"], ["hidden_states"]),
}


@strict
class GPTConfig(PreTrainedConfig):
    """Configuration of `GPTModel`.

    With `window_pattern="L"`, `value_embeddings`, `residual_scalars` and `backout` off and `qk_scale` 1 the graph is
    nanochat's of October 2025 (karpathy/nanochat@c75fe54), which transformers carries as NanoChat.

    Args:
        qk_scale: factor on the normed queries and on the normed keys; attention scores grow by its square.
        window_pattern: one letter per layer, tiled over the depth: S sees `sliding_window` keys, L all of them; the
            last layer always sees all. Ignored when `layer_types` is given.
        sliding_window: keys an S layer sees, the query's own included (Transformers' convention).
        value_embeddings: every other layer, the last included, adds a gated embedding of the token to its values.
        value_gate_channels: how many leading channels of the input set that gate.
        residual_scalars: a learned scale on the residual stream and on the first embedding, before each layer.
        backout: subtract a learned share of the middle layer's output before the final norm.
        smear: each token's embedding takes up a gated share of the one before it; for models imported from nanochat.
            The last layer's type becomes "hybrid": full attention, and in caches a place for the last embedding.
        smear_gate_channels: how many leading channels of the embedding set that gate.
        gated_mlp: `hidden_act` gates a second projection (with "silu" it is SwiGLU, arXiv 2002.05202).
        final_logit_softcapping: logits are `c * tanh(logits / c)`; None leaves them as they are.
        init_scheme: "uniform" (chatmodel's recipe) or "normal" (the seed's: karpathy/nanochat@c75fe54).
        calculator: token ids and texts the calculator needs, made by `chatmodel.tokenizer.calculator_table`;
            None switches it off.
    """

    model_type = "chatmodel"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (Transformers' own form)

    vocab_size: int = 32768
    hidden_size: int = 768
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "relu2"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_parameters: RopeParameters | dict[str, Any] | None = None
    attention_dropout: float | int = 0.0
    qk_scale: float = 1.2
    window_pattern: str | None = "SSSL"
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    value_embeddings: bool = True
    value_gate_channels: int = 12
    residual_scalars: bool = True
    backout: bool = True
    smear: bool = False
    smear_gate_channels: int = 24
    gated_mlp: bool = False
    final_logit_softcapping: float | None = 15.0
    init_scheme: str = "uniform"
    calculator: dict[str, Any] | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 100_000.0}
        if self.layer_types is None:
            self.layer_types = expand_window_pattern(self.window_pattern or "L", self.num_hidden_layers)
        if self.smear:
            self.layer_types = [*self.layer_types[:-1], "hybrid"]
        if "sliding_attention" not in self.layer_types:
            self.sliding_window = None
        elif self.sliding_window is None:
            self.sliding_window = max(1, self.max_position_embeddings // 4)
        self.base_model_tp_plan = self._plan_tensor_parallelism()
        self.base_model_pp_plan = None if self.parts_across_layers() else dict(PIPELINE_PLAN)
        # Saving the causal model alone would leave AutoModel out of the map; vLLM loads through it.
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__post_init__(**kwargs)

    def _plan_tensor_parallelism(self) -> dict[str, str]:
        """How each part is divided between devices; only of parts that this model has, as a plan is checked for."""
        plan = {f"layers.*.self_attn.{name}_proj": "colwise" for name in ("q", "k", "v")}
        plan["layers.*.self_attn.o_proj"] = "rowwise"
        if self.value_embeddings:
            plan["layers.*.self_attn.value_embed"] = "embedding_colwise"
            plan["layers.*.self_attn.value_gate"] = "colwise"
        if self.gated_mlp:
            plan["layers.*.mlp.gate_proj"] = "colwise"
        return plan | {"layers.*.mlp.up_proj": "colwise", "layers.*.mlp.down_proj": "rowwise"}

    def parts_across_layers(self) -> list[str]:
        """The settings in use that bring ids, embeddings or an earlier layer's output to a later layer.

        Such a model cannot be cut into pipeline stages, which hand on one tensor.
        """
        return [name for name in ("value_embeddings", "residual_scalars", "backout", "smear") if getattr(self, name)]

    def validate_shapes(self) -> None:
        """Refuse sizes that do not fit together (`@strict` calls every `validate_` method of a new configuration)."""
        if self.num_attention_heads % (self.num_key_value_heads or 1):
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is no multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if len(self.layer_types or []) != self.num_hidden_layers:
            raise ValueError(f"layer_types={self.layer_types} must name each of {self.num_hidden_layers} layers")
        if self.init_scheme not in ("uniform", "normal"):
            raise ValueError(f"init_scheme={self.init_scheme!r} must be 'uniform' or 'normal'")

    def has_value_embedding(self, layer_idx: int) -> bool:
        """Whether a layer has a value embedding: every other one, counted back from the last."""
        return self.value_embeddings and (self.num_hidden_layers - 1 - layer_idx) % 2 == 0


def expand_window_pattern(pattern: str, num_layers: int) -> list[str]:
    """Layer types of a window pattern such as "SSSL", tiled over the depth, the last layer full."""
    if not pattern or set(pattern) - {"S", "L"}:
        raise ValueError(f"window_pattern={pattern!r} may only hold the letters S (sliding) and L (full)")
    names = {"S": "sliding_attention", "L": "full_attention"}
    types = [names[pattern[index % len(pattern)]] for index in range(num_layers)]
    return [*types[:-1], "full_attention"]


__all__ = ["GPTConfig"]
