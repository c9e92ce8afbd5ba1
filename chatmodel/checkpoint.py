"""How training state and finished models reach the disk whole, and how the last good state is found again."""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from chatmodel.runs import publish_folder
from chatmodel.runtime import UserError, logger, read_json, write_json

MANIFEST = "manifest.json"


def save_checkpoint(accelerator: Accelerator, root: Path, step: int, rank_state: Any, *, keep: int = 2) -> Path:
    """Save everything registered with `accelerator`, and `rank_state` of each rank, as `root/step-<step>`.

    The folder is written aside, hashed and renamed, so it is either whole or not there; all but the newest `keep`
    are removed. Every rank calls this.

    Raises:
        UserError: the disk is full or not writable.
    """
    target = root / f"step-{step:08d}"
    aside = root / f".step-{step:08d}.writing"
    try:
        if accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(aside))
        torch.save(rank_state, aside / f"rank-{accelerator.process_index:05d}.pt")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_json(aside / MANIFEST, {"step": step, "sha256": hash_files(aside)})
            publish_folder(aside, target)
            for old in list_checkpoints(root)[:-keep]:
                shutil.rmtree(old)
    except OSError as error:
        raise UserError(
            f"checkpoint {target} could not be written ({error}); free some space and start again, "
            "which continues from the last whole checkpoint"
        ) from None
    accelerator.wait_for_everyone()
    return target


def list_checkpoints(root: Path) -> list[Path]:
    """The finished checkpoints in `root`, oldest first."""
    return sorted(root.glob("step-*"))


def latest_checkpoint(root: Path) -> Path | None:
    """The newest checkpoint whose files still have the hashes they were written with; damaged ones are named."""
    for folder in reversed(list_checkpoints(root)):
        problem = find_damage(folder)
        if problem is None:
            return folder
        logger.warning("checkpoint %s is damaged (%s) and is passed over", folder, problem)
    return None


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        expected = read_json(folder / MANIFEST)["sha256"]
    except (UserError, KeyError, TypeError) as error:
        return str(error)
    found = hash_files(folder)
    for name, digest in expected.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != digest:
            return f"{name} has changed"
    return None


def load_checkpoint(accelerator: Accelerator, folder: Path) -> Any:
    """Restore everything registered with `accelerator`; returns this rank's `rank_state`.

    Raises:
        UserError: the checkpoint was made by another number of processes.
    """
    path = folder / f"rank-{accelerator.process_index:05d}.pt"
    if len(list(folder.glob("rank-*.pt"))) != accelerator.num_processes:
        raise UserError(
            f"{folder} was made by {len(list(folder.glob('rank-*.pt')))} processes, not {accelerator.num_processes}; "
            "start as many again, or delete it"
        )
    accelerator.load_state(str(folder))
    return torch.load(path, weights_only=True)


def hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder` but the manifest, by relative name."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            with path.open("rb") as file:
                digests[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def save_model_folder(model: Any, tokenizer: Any, folder: Path, *, card: Sequence[str]) -> None:
    """Write a complete model folder: weights, code, tokenizer, chat template, generation settings, model card.

    Args:
        card: paragraphs of the model card, below its heading.
    """
    aside = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    # Mistakes in the ids would only show when somebody generates.
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.bos_token_id]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.use_cache = True  # Trainers switch it off
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    header = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- chatmodel\n---\n"
    (aside / "README.md").write_text("\n\n".join([f"{header}\n# {folder.name}", *card]) + "\n")
    for path in aside.iterdir():
        path.chmod(0o644)  # safetensors writes files only their owner may read; a server may be somebody else
    publish_folder(aside, folder)


def load_model(folder: Path, **options: Any) -> Any:
    """The causal model in `folder`.

    Raises:
        UserError: the folder holds no model, or one without weights.
    """
    from transformers import AutoModelForCausalLM

    if not (folder / "config.json").exists():
        raise UserError(f"{folder} holds no model (no config.json); give a folder that a stage has finished")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} holds no weights (no .safetensors file); train it again or copy the weights there")
    return AutoModelForCausalLM.from_pretrained(folder, **options)
