"""How is one of this project's models written for other tools?"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from chatmodel.checkpoint import save_model_folder
from chatmodel.export.conversions import to_nanochat, to_qwen3
from chatmodel.export.folders import check_output, folder_aside, load_own_model, publish_proven, read_card
from chatmodel.export.gguf_file import find_pre_tokenizer, import_gguf, read_gguf, write_gguf
from chatmodel.export.parity import (
    MAX_PROMPT_TOKENS,
    PROMPTS,
    Parity,
    compare_logits,
    encode_prompts,
    logits_of,
    require_parity,
)
from chatmodel.model import GPTForCausalLM
from chatmodel.runtime import UserError
from chatmodel.tokenizer import load_tokenizer

GGUF_FILE = "model.gguf"
CONVERSIONS: dict[str, Callable[[GPTForCausalLM], Any]] = {
    "transformers-nanochat": to_nanochat,
    "compat": to_qwen3,
    "gguf": to_qwen3,
}


def export_model(folder: Path, output: Path, *, target: str, tolerance: float) -> Parity:
    """Write the model in `folder` to the folder `output` in another format, proven to have the same logits.

    Args:
        target: "transformers-nanochat"; "compat", a Qwen3 folder; or "gguf", the same in one file for llama.cpp.
        tolerance: of `require_parity`, between the model and the export read back from disk, in fp32.

    Raises:
        UserError: a wrong argument, a feature that the target lacks, or logits further apart than `tolerance`.
    """
    if target not in CONVERSIONS:
        raise UserError(f"--to {target} is unknown; choose one of {', '.join(CONVERSIONS)}")
    check_output(output, folder)
    model, tokenizer = load_own_model(folder), load_tokenizer(folder)
    converted = CONVERSIONS[target](model)
    options = {}
    if target == "gguf":
        import_gguf()
        find_pre_tokenizer(tokenizer)
        options = {"gguf_file": GGUF_FILE}
    with folder_aside(output) as aside:
        if target == "gguf":
            write_gguf(converted, tokenizer, aside / GGUF_FILE, name=output.name)
            again = read_gguf(aside / GGUF_FILE)
        else:
            save_model_folder(converted, tokenizer, aside, card=[])
            again = AutoModelForCausalLM.from_pretrained(aside, dtype=torch.float32).eval()
        prompts = encode_prompts(tokenizer, model.config.vocab_size, model.config.max_position_embeddings)
        parity = compare_logits(logits_of(model), logits_of(again), prompts)
        require_parity(parity, tolerance, f"the {target} export")
        require_same_ids(AutoTokenizer.from_pretrained(aside, **options), tokenizer, f"the {target} export")
        name = type(again).__name__
        claim = (
            f"Exported by chatmodel from {folder.name}; Transformers {transformers.__version__} reads it as {name}."
        )
        card = [*read_card(folder), f"{claim} {parity.describe()}"]
        if model.config.calculator is not None:
            card.append("The calculator of chatmodel's own folders is not part of it: results of calls are guesses.")
        facts = {"target": target, "model": str(folder), "read_as": name, "tolerance": tolerance}
        library = "gguf" if target == "gguf" else "transformers"
        publish_proven(aside, output, parity, card=card, library=library, facts=facts)
    return parity


def require_same_ids(found: Any, expected: PreTrainedTokenizerFast, what: str) -> None:
    """Refuse a tokenizer that does not give the fixed prompts the same ids.

    Raises:
        UserError: naming the first prompt that differs.
    """
    cut = {"truncation": True, "max_length": MAX_PROMPT_TOKENS}
    for text in PROMPTS:
        if found(text, **cut)["input_ids"] != expected(text, **cut)["input_ids"]:
            raise UserError(f"{what} has another tokenizer: {text[:40]!r} becomes other ids; nothing was written")
