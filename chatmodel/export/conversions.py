"""How is a model rewritten as another class of Transformers with the same logits, and back?"""

from typing import Any

import torch
from transformers import NanoChatConfig, NanoChatForCausalLM, Qwen3Config, Qwen3ForCausalLM

from chatmodel.export.features import refuse_features
from chatmodel.model import GPTConfig, GPTForCausalLM
from chatmodel.runtime import UserError

SHARED_SETTINGS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
NANOCHAT_NAMES = {"up_proj": "fc1", "down_proj": "fc2"}
PLAIN_SETTINGS = {
    "window_pattern": "L",
    "value_embeddings": False,
    "residual_scalars": False,
    "backout": False,
    "qk_scale": 1.0,
}


def reverse_rotation(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """A query or key projection (heads * head_dim, hidden_size) for rotary positions that turn the other way.

    Turning by -theta is turning by +theta with the second of each pair of channels negated; as queries and keys are
    negated alike, scores stay as they are.
    """
    heads = weight.view(-1, head_dim, weight.shape[1])
    signs = torch.ones(head_dim, 1, dtype=weight.dtype, device=weight.device)
    signs[head_dim // 2 :] = -1
    return (heads * signs).view_as(weight)


def to_nanochat(model: GPTForCausalLM) -> NanoChatForCausalLM:
    """The model as Transformers' own NanoChat.

    Raises:
        UserError: NanoChat lacks one of the model's features.
    """
    config = model.config
    refuse_features(
        config,
        "transformers' NanoChat",
        can={"final_logit_softcapping", "hidden_act", "attention_dropout", "rope_type"},
        needs={},
        advice="--recipe seed trains models that it can",
    )
    theirs = NanoChatForCausalLM(
        NanoChatConfig(
            **{name: getattr(config, name) for name in SHARED_SETTINGS},
            final_logit_softcapping=config.final_logit_softcapping,
            tie_word_embeddings=config.tie_word_embeddings,
        )
    )
    return _fill(theirs, _rename(model.state_dict(), NANOCHAT_NAMES, config.head_dim))


def from_nanochat(theirs: NanoChatForCausalLM) -> GPTForCausalLM:
    """Transformers' own NanoChat as this project's model.

    Raises:
        UserError: it has biases, which this project's model lacks.
    """
    config = theirs.config
    if config.attention_bias:
        raise UserError("this project's model cannot express attention_bias; import a NanoChat without biases")
    settings = {name: getattr(config, name) for name in SHARED_SETTINGS if name != "head_dim"}
    model = GPTForCausalLM(
        GPTConfig(
            **settings,
            **PLAIN_SETTINGS,
            head_dim=theirs.model.layers[0].self_attn.head_dim,
            final_logit_softcapping=config.final_logit_softcapping,
            tie_word_embeddings=config.tie_word_embeddings,
            init_scheme="normal",
        )
    )
    names = {other: ours for ours, other in NANOCHAT_NAMES.items()}
    return _fill(model, _rename(theirs.state_dict(), names, model.config.head_dim))


def to_qwen3(model: GPTForCausalLM) -> Qwen3ForCausalLM:
    """The model as Transformers' own Qwen3, which llama.cpp, vLLM and MLX know too.

    What Qwen3 lacks is folded into what it has. Norming an embedding depends on the token alone, so the table holds
    normed rows. A root-mean-square norm without weights commutes with a rotation, so QK norm may come first, and
    `qk_scale` is its weight. All other norms weigh 1.

    Raises:
        UserError: Qwen3 lacks one of the model's features.
    """
    config = model.config
    refuse_features(
        config,
        "Qwen3",
        can={"qk_scale", "gated_mlp", "hidden_act=silu", "attention_dropout"},
        needs={"gated_mlp": "an MLP that is not gated"},
        advice="--recipe compat trains models that it can",
    )
    theirs = Qwen3ForCausalLM(
        Qwen3Config(**{name: getattr(config, name) for name in SHARED_SETTINGS}, tie_word_embeddings=False)
    )
    state = dict(model.state_dict())
    with torch.no_grad():
        state["model.embed_tokens.weight"] = model.model.embed_norm(state["model.embed_tokens.weight"])
    for name, value in theirs.state_dict().items():
        if name.endswith("norm.weight"):
            is_qk_norm = "q_norm" in name or "k_norm" in name
            state[name] = torch.full_like(value, config.qk_scale if is_qk_norm else 1.0)
    return _fill(theirs, state)


def _rename(state: dict[str, torch.Tensor], names: dict[str, str], head_dim: int | None) -> dict[str, torch.Tensor]:
    assert head_dim is not None
    renamed = {}
    for name, value in state.items():
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = reverse_rotation(value, head_dim) if "q_proj" in name or "k_proj" in name else value
    return renamed


def _fill(model: Any, state: dict[str, torch.Tensor]) -> Any:
    model.load_state_dict(state)
    return model.eval()
