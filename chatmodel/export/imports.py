"""How does a model of nanochat, or of Transformers' NanoChat, become one of this project's folders?"""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from chatmodel.checkpoint import save_model_folder
from chatmodel.export.conversions import from_nanochat
from chatmodel.export.folders import (
    check_output,
    folder_aside,
    load_own_model,
    load_their_model,
    publish_proven,
    read_card,
)
from chatmodel.export.nanochat_checkpoint import load_nanochat, load_nanochat_tokenizer
from chatmodel.export.nanochat_reference import nanochat_logits
from chatmodel.export.parity import Parity, compare_logits, encode_prompts, logits_of, require_parity
from chatmodel.model import GPTForCausalLM
from chatmodel.runtime import UserError, logger
from chatmodel.tokenizer import calculator_table, convert_tokens, load_tokenizer, ordinary_tokens, read_split_pattern

LogitsFunction = Callable[[torch.Tensor], torch.Tensor]


def import_nanochat(
    checkpoint: Path,
    output: Path,
    *,
    tokenizer_path: Path | None,
    nanochat_root: Path | None,
    tolerance: float,
) -> Parity | None:
    """Make a model folder of nanochat's `model_<step>.pt`.

    Args:
        tokenizer_path: nanochat's `tokenizer.pkl`; by default the one in nanochat's own tree of folders.
        nanochat_root: a checkout of nanochat, at the commit that made the checkpoint, whose code is run to compare
            the logits; None leaves them unproven.
        tolerance: of `require_parity`.

    Raises:
        UserError: a file that is missing, damaged or of another version, or logits further apart than `tolerance`.
    """
    check_output(output, checkpoint)
    model, commit = load_nanochat(checkpoint)
    # base_checkpoints/d20/model_000100.pt and tokenizer/tokenizer.pkl lie in one folder there.
    path = tokenizer_path or checkpoint.absolute().parent.parent.parent / "tokenizer" / "tokenizer.pkl"
    tokenizer = load_nanochat_tokenizer(path, model_max_length=model.config.max_position_embeddings)
    fit_tokenizer(model, tokenizer, str(path))
    prompts = encode_prompts(tokenizer, model.config.vocab_size, model.config.max_position_embeddings)
    reference = None
    if nanochat_root is not None:
        reference = nanochat_logits(nanochat_root, checkpoint, prompts, commit)
    else:
        logger.warning("the logits are not compared with nanochat's own; --nanochat_root CHECKOUT does that")
    card = [f"Imported by chatmodel from {checkpoint.name} of karpathy/nanochat, as commit {commit} writes it."]
    facts = {"source": f"nanochat@{commit}", "model": str(checkpoint), "tolerance": tolerance}
    return _save(model, tokenizer, output, reference, prompts, card=card, facts=facts)


def import_transformers_nanochat(folder: Path, output: Path, *, tolerance: float) -> Parity | None:
    """Make a model folder of Transformers' own NanoChat in `folder`; raises as `import_nanochat` does."""
    check_output(output, folder)
    theirs = load_their_model(folder, "nanochat")
    model = from_nanochat(theirs)
    tokenizer = rebuild_tokenizer(folder, model_max_length=model.config.max_position_embeddings)
    fit_tokenizer(model, tokenizer, str(folder))
    prompts = encode_prompts(tokenizer, model.config.vocab_size, model.config.max_position_embeddings)
    card = [*read_card(folder), f"Imported by chatmodel from {folder.name}, a NanoChat of Transformers."]
    facts = {"source": "transformers-nanochat", "model": str(folder), "tolerance": tolerance}
    return _save(model, tokenizer, output, logits_of(theirs), prompts, card=card, facts=facts)


def rebuild_tokenizer(folder: Path, *, model_max_length: int) -> PreTrainedTokenizerFast:
    """The tokenizer in `folder` with this project's chat template and padding.

    Raises:
        UserError: there is none, or it is not built as nanochat's is.
    """
    found = load_tokenizer(folder)
    try:
        pattern = read_split_pattern(found)
    except (KeyError, IndexError, TypeError):
        raise UserError(f"the tokenizer in {folder} does not cut text by one pattern, as nanochat's does") from None
    return convert_tokens(ordinary_tokens(found), model_max_length=model_max_length, split_pattern=pattern)


def fit_tokenizer(model: GPTForCausalLM, tokenizer: PreTrainedTokenizerFast, origin: str) -> None:
    """Tell the model what only its tokenizer knows: the ids of special tokens and the calculator's table.

    Raises:
        UserError: the tokenizer is another model's.
    """
    if len(tokenizer) != model.config.vocab_size:
        raise UserError(
            f"the tokenizer in {origin} has {len(tokenizer)} tokens, the model {model.config.vocab_size}; give the "
            "tokenizer that the model was trained with"
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, getattr(tokenizer, name))
    model.config.calculator = calculator_table(tokenizer)


def _save(
    model: GPTForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    output: Path,
    reference: LogitsFunction | None,
    prompts: list[list[int]],
    *,
    card: list[str],
    facts: dict[str, object],
) -> Parity | None:
    with folder_aside(output) as aside:
        save_model_folder(model, tokenizer, aside, card=[])
        parity = None
        if reference is not None:
            parity = compare_logits(reference, logits_of(load_own_model(aside)), prompts)
            require_parity(parity, float(str(facts["tolerance"])), "the import")
        said = "Its logits were not compared with the original's." if parity is None else parity.describe()
        publish_proven(aside, output, parity, card=[*card, said], library="transformers", facts=facts)
    return parity
