"""How does an exported or imported model reach its folder: whole, proven equal, and saying so?"""

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from chatmodel.checkpoint import load_model
from chatmodel.export.parity import Parity, parity_record
from chatmodel.model import GPTConfig, GPTForCausalLM
from chatmodel.runs import publish_folder
from chatmodel.runtime import UserError, read_json, write_json

PARITY_FILE = "parity.json"
CARD_HEAD = re.compile(r"\A(---\n.*?\n---\n)?\s*(# [^\n]*\n)?\s*", re.DOTALL)


def load_own_model(folder: Path) -> GPTForCausalLM:
    """The model of one of this project's folders, in fp32.

    Raises:
        UserError: there is none, it is damaged, or it is of another kind.
    """
    return _load(folder, GPTConfig.model_type, load_model)


def load_their_model(folder: Path, model_type: str) -> Any:
    """A model of one of Transformers' own types, in fp32; raises as `load_own_model` does."""
    return _load(folder, model_type, AutoModelForCausalLM.from_pretrained)


def _load(folder: Path, model_type: str, load: Any) -> Any:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no model (no config.json); give a model folder")
    settings = read_json(folder / "config.json")
    found = settings.get("model_type") if isinstance(settings, dict) else None
    if found != model_type:
        raise UserError(f"{folder} holds a model of type {found!r}; give one of type {model_type!r}")
    try:
        return load(folder, dtype=torch.float32).eval()
    except UserError:
        raise
    except Exception as error:  # safetensors and Transformers have many errors for damaged files
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the model in {folder} cannot be loaded ({reason}); make or copy it again") from None


def check_output(output: Path, source: Path) -> None:
    """Refuse a place for a folder that would cost other files.

    Raises:
        UserError: it is the source or one of its parents, a file, or a folder that no export or import wrote.
    """
    if output.resolve() == source.resolve() or output.resolve() in source.resolve().parents:
        raise UserError(f"--output {output} would replace --model {source}; choose another folder")
    if output.is_file():
        raise UserError(f"--output {output} is a file; choose a folder")
    if output.is_dir() and any(output.iterdir()) and not (output / PARITY_FILE).is_file():
        raise UserError(f"--output {output} holds other files; choose a new folder, or delete it")


@contextmanager
def folder_aside(output: Path) -> Iterator[Path]:
    """An empty folder with the name of `output`, beside it, that is gone afterwards.

    Raises:
        UserError: it cannot be written there.
    """
    parent = output.with_name(f".{output.name}.unfinished")
    try:
        shutil.rmtree(parent, ignore_errors=True)
        (parent / output.name).mkdir(parents=True)
        yield parent / output.name
    except OSError as error:
        raise UserError(
            f"--output {output} could not be written ({error}); free some space or choose another"
        ) from None
    finally:
        shutil.rmtree(parent, ignore_errors=True)


def publish_proven(
    aside: Path, output: Path, parity: Parity | None, *, card: Sequence[str], library: str, facts: dict[str, Any]
) -> None:
    """Add `parity.json` and the model card to a finished folder and put it in its place.

    Args:
        parity: what was found, None if nothing could be compared.
        card: paragraphs of the model card.
        library: the card's `library_name`.
        facts: what else `parity.json` holds.
    """
    write_json(aside / PARITY_FILE, parity_record(parity, **facts))
    tags = "library_name: {}\npipeline_tag: text-generation\ntags:\n- chatmodel\n"
    header = f"---\n{tags.format(library)}---\n\n# {output.name}"
    (aside / "README.md").write_text("\n\n".join([header, *card]) + "\n", encoding="utf-8")
    for path in aside.iterdir():
        path.chmod(0o644)
    publish_folder(aside, output)


def read_card(folder: Path) -> list[str]:
    """The paragraphs of a folder's model card without header and heading; empty when it has none."""
    path = folder / "README.md"
    if not path.is_file():
        return []
    text = CARD_HEAD.sub("", path.read_text(encoding="utf-8"))
    return [text.strip()] if text.strip() else []
