"""How does a Qwen3-shaped model become one GGUF file for llama.cpp?"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from chatmodel.runtime import UserError
from chatmodel.tokenizer import QWEN2_SPLIT_PATTERN, SPECIAL_TOKENS, read_split_pattern

# llama.cpp knows split patterns by name only. None of its names cuts numbers in pairs as "chatmodel" does.
PRE_TOKENIZERS = {QWEN2_SPLIT_PATTERN: "qwen2"}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SIZES = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def import_gguf() -> Any:
    """The gguf package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise UserError("--to gguf needs the gguf package; install it with: pip install -e '.[export]'") from None
    return gguf


def find_pre_tokenizer(tokenizer: PreTrainedTokenizerFast) -> str:
    """llama.cpp's name for the way a tokenizer cuts text.

    Raises:
        UserError: it has none.
    """
    name = PRE_TOKENIZERS.get(read_split_pattern(tokenizer))
    if name is None:
        raise UserError(
            "llama.cpp has no pre-tokenizer that cuts text as this model's tokenizer does (numbers in pairs of "
            "digits), and would read numbers wrongly; train with recipes/train_tokenizer.py --split qwen2"
        )
    return name


def gguf_name(name: str) -> str:
    """GGUF's name of a Qwen3 parameter: `model.layers.3.mlp.up_proj.weight` is `blk.3.ffn_up.weight`."""
    module = name.removesuffix(".weight")
    if module in NAMES:
        return f"{NAMES[module]}.weight"
    layer, _, part = module.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{LAYER_NAMES[part]}.weight"


def write_gguf(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path, *, name: str) -> None:
    """Write an fp32 GGUF file (version 3, architecture "qwen3") with tokenizer and chat template.

    Source: ggml-org/ggml docs/gguf.md; names of ggml-org/llama.cpp gguf-py/gguf/constants.py.

    Raises:
        UserError: the gguf package is missing, or the tokenizer has no counterpart there.
    """
    gguf = import_gguf()
    pre_tokenizer = find_pre_tokenizer(tokenizer)
    writer = gguf.GGUFWriter(path, "qwen3")
    _add_sizes(writer, model.config, name, file_type=gguf.LlamaFileType.ALL_F32)
    _add_tokenizer(writer, tokenizer, pre_tokenizer, gguf.TokenType)
    for parameter, value in model.state_dict().items():
        writer.add_tensor(gguf_name(parameter), value.to(torch.float32).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(path: Path) -> Any:
    """The model of a Qwen3 GGUF file, read by Transformers, in fp32.

    Its sizes are read here: Transformers 5.23 does not read a Qwen3's size of heads and takes it for 128.
    """
    fields = import_gguf().GGUFReader(path).fields
    sizes = {ours: fields[f"qwen3.{theirs}"].contents() for theirs, ours in SIZES.items()}
    rope = {"rope_type": "default", "rope_theta": fields["qwen3.rope.freq_base"].contents()}
    config = Qwen3Config(**sizes, rope_parameters=rope, tie_word_embeddings=False)
    options = {"gguf_file": path.name, "config": config, "dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(path.parent, **options).eval()


def _add_sizes(writer: Any, config: Any, name: str, *, file_type: int) -> None:
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerFast, pre_tokenizer: str, kinds: Any) -> None:
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types([kinds.CONTROL if token in SPECIAL_TOKENS else kinds.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(True)
    writer.add_chat_template(tokenizer.chat_template)
