"""What does a checkpoint of karpathy/nanochat hold, as this project's model and tokenizer?"""

import json
import pickle
from pathlib import Path
from typing import Any

import tiktoken
import torch
from transformers import PreTrainedTokenizerFast

from chatmodel.export.conversions import PLAIN_SETTINGS, reverse_rotation
from chatmodel.model import GPTConfig, GPTForCausalLM
from chatmodel.runtime import UserError, read_json
from chatmodel.tokenizer import SPECIAL_TOKENS, convert_tokens

FLOAT32_EPS = 1.1920929e-07  # what torch's rms_norm adds when it is given nothing
SEED_COMMIT, MASTER_COMMIT = "c75fe54", "92d63d4"
MASTER_GATE_CHANNELS = {"value_gate_channels": 12, "smear_gate_channels": 24}
# nanochat's name of a weight, and ours; {n} is the layer.
SEED_NAMES = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "lm_head.weight": "lm_head.weight",
    "transformer.h.{n}.attn.c_q.weight": "model.layers.{n}.self_attn.q_proj.weight",
    "transformer.h.{n}.attn.c_k.weight": "model.layers.{n}.self_attn.k_proj.weight",
    "transformer.h.{n}.attn.c_v.weight": "model.layers.{n}.self_attn.v_proj.weight",
    "transformer.h.{n}.attn.c_proj.weight": "model.layers.{n}.self_attn.o_proj.weight",
    "transformer.h.{n}.mlp.c_fc.weight": "model.layers.{n}.mlp.up_proj.weight",
    "transformer.h.{n}.mlp.c_proj.weight": "model.layers.{n}.mlp.down_proj.weight",
}
MASTER_NAMES = SEED_NAMES | {
    "value_embeds.{n}.weight": "model.layers.{n}.self_attn.value_embed.weight",
    "transformer.h.{n}.attn.ve_gate.weight": "model.layers.{n}.self_attn.value_gate.weight",
    "backout_lambda": "model.backout_scale",
    "smear_lambda": "model.smear_scale",
    "smear_gate.weight": "model.smear_gate.weight",
}
# Vectors with one number a layer, which our layers hold each for itself.
MASTER_VECTORS = {"resid_lambdas": "residual_scale", "x0_lambdas": "embedding_scale"}


def load_nanochat(checkpoint: Path) -> tuple[GPTForCausalLM, str]:
    """The model of a `model_<step>.pt`, in fp32, and the commit of nanochat whose parameters it has.

    The sizes come from `meta_<step>.json` beside it. Formulas that nanochat keeps in its code (rotary base, QK scale,
    windows, gates) are those of commit c75fe54 or 92d63d4, told apart by the parameters.

    Raises:
        UserError: a file is missing or damaged, or the parameters are neither commit's.
    """
    settings = _read_settings(checkpoint)
    state = _read_state(checkpoint)
    commit = MASTER_COMMIT if "resid_lambdas" in state else SEED_COMMIT
    config = master_config(settings) if commit == MASTER_COMMIT else seed_config(settings)
    with torch.device("meta"):
        expected = {name: value.shape for name, value in GPTForCausalLM(config).state_dict().items()}
    converted = rename_state(state, config, commit)
    _check_parameters(converted, expected, checkpoint, commit)
    model = GPTForCausalLM(config)
    model.load_state_dict(converted)
    return model.eval(), commit


def seed_config(settings: dict[str, Any]) -> GPTConfig:
    """The configuration of a c75fe54 checkpoint from its `model_config`."""
    return GPTConfig(
        **_sizes(settings),
        **PLAIN_SETTINGS,
        init_scheme="normal",
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )


def master_config(settings: dict[str, Any]) -> GPTConfig:
    """The configuration of a 92d63d4 checkpoint from its `model_config`.

    A short window there counts the keys before the query, in tiles of 128; ours counts the query's own too.
    """
    context = settings["sequence_len"]
    return GPTConfig(
        **_sizes(settings),
        **MASTER_GATE_CHANNELS,
        window_pattern=settings["window_pattern"].upper(),
        sliding_window=128 * -(-context // (4 * 128)) + 1,
        smear=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
    )


def rename_state(state: dict[str, torch.Tensor], config: GPTConfig, commit: str) -> dict[str, torch.Tensor]:
    """nanochat's parameters under our names: rotation reversed, padding of the vocabulary dropped, in fp32.

    Parameters without a name of ours keep theirs.
    """
    names = {}
    for theirs, ours in (MASTER_NAMES if commit == MASTER_COMMIT else SEED_NAMES).items():
        for index in range(config.num_hidden_layers):
            names[theirs.format(n=index)] = ours.format(n=index)
    converted: dict[str, torch.Tensor] = {}
    assert config.head_dim is not None
    for theirs, value in state.items():
        value = value.float()
        if theirs in MASTER_VECTORS and commit == MASTER_COMMIT:
            for index, number in enumerate(value):
                converted[f"model.layers.{index}.{MASTER_VECTORS[theirs]}"] = number.view(1)
            continue
        if theirs.endswith(("wte.weight", "lm_head.weight")) or theirs.startswith("value_embeds."):
            value = value[: config.vocab_size]
        elif theirs.endswith(("attn.c_q.weight", "attn.c_k.weight")):
            value = reverse_rotation(value, config.head_dim)
        converted[names.get(theirs, theirs)] = value
    return converted


class _EncodingUnpickler(pickle.Unpickler):
    """Reads a pickled tiktoken encoding and nothing else: unpickling other classes can run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("tiktoken.core", "Encoding"), ("copyreg", "_reconstructor"), ("builtins", "object")):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds a {module}.{name}")


def load_nanochat_tokenizer(path: Path, *, model_max_length: int) -> PreTrainedTokenizerFast:
    """The tokenizer of a `tokenizer.pkl`, with this project's chat template.

    Raises:
        UserError: the file is missing, holds something else, or its special tokens are not nanochat's.
    """
    try:
        with path.open("rb") as file:
            encoding = _EncodingUnpickler(file).load()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give nanochat's tokenizer.pkl with --tokenizer") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(f"{path} is no tiktoken encoding ({error}); give nanochat's tokenizer.pkl") from None
    if not isinstance(encoding, tiktoken.Encoding):
        raise UserError(
            f"{path} holds a {type(encoding).__name__}, no tiktoken encoding; give nanochat's tokenizer.pkl"
        )
    tokens = [bytes(token) for token, _ in sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])]
    expected = {name: len(tokens) + index for index, name in enumerate(SPECIAL_TOKENS)}
    if encoding._special_tokens != expected:
        raise UserError(
            f"{path} has other special tokens than nanochat's {SPECIAL_TOKENS[0]} to {SPECIAL_TOKENS[-1]} at the end "
            "of the vocabulary; give a tokenizer that nanochat's tok_train.py made"
        )
    return convert_tokens(tokens, model_max_length=model_max_length, split_pattern=encoding._pat_str)


def _sizes(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": settings["vocab_size"],
        "hidden_size": settings["n_embd"],
        "num_hidden_layers": settings["n_layer"],
        "num_attention_heads": settings["n_head"],
        "num_key_value_heads": settings["n_kv_head"],
        "max_position_embeddings": settings["sequence_len"],
        "rms_norm_eps": FLOAT32_EPS,
    }


def _read_settings(checkpoint: Path) -> dict[str, Any]:
    prefix, _, step = checkpoint.stem.rpartition("_")
    if prefix != "model" or checkpoint.suffix != ".pt":
        raise UserError(f"{checkpoint} is no nanochat checkpoint; give a model_<step>.pt")
    if not checkpoint.is_file():
        raise UserError(f"{checkpoint} does not exist; give a model_<step>.pt of nanochat")
    path = checkpoint.with_name(f"meta_{step}.json")
    if not path.is_file():
        raise UserError(f"{path} does not exist; copy it there too, for it holds the model's sizes")
    found = read_json(path)
    settings = found.get("model_config") if isinstance(found, dict) else None
    names = {"sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"}
    if not isinstance(settings, dict) or names - settings.keys():
        raise UserError(f"{path} has no whole model_config ({json.dumps(sorted(names))}); copy the original there")
    return {"window_pattern": "L"} | settings


def _read_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch each have errors of their own
        raise UserError(f"{checkpoint} is damaged ({' '.join(str(error).split())[:200]}); copy it again") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{checkpoint} holds no parameters; give a model_<step>.pt, not an optim_<step>.pt")
    return {name.removeprefix("_orig_mod."): value for name, value in state.items()}


def _check_parameters(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Size], checkpoint: Path, commit: str
) -> None:
    unknown, missing = sorted(found.keys() - expected.keys()), sorted(expected.keys() - found.keys())
    if unknown or missing:
        problem = f"has {', '.join(unknown[:3])}" if unknown else f"lacks {', '.join(missing[:3])}"
        raise UserError(
            f"{checkpoint} {problem}, unlike nanochat at {commit}; only checkpoints of {SEED_COMMIT} and "
            f"{MASTER_COMMIT} can be imported, as other versions compute with them in other ways"
        )
    wrong = [name for name, shape in expected.items() if found[name].shape != shape]
    if wrong:
        raise UserError(
            f"{checkpoint} has {wrong[0]} of shape {tuple(found[wrong[0]].shape)}, but its meta file means "
            f"{tuple(expected[wrong[0]])}; put the meta file of the same step there"
        )
