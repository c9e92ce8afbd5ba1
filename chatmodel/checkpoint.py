"""How training state and finished models reach the disk whole, and how the last good state is found again."""

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, cast

import torch
from safetensors import SafetensorError

from chatmodel.model_folders import explain_no_model
from chatmodel.runs import publish_folder
from chatmodel.runtime import UserError, logger, read_json, write_json

MANIFEST = "manifest.json"


class HashingFile:
    """A file being written whose SHA-256 is known at the end, so that nothing is read back to be hashed."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self._num_bytes = 0
        self.error: OSError | None = None

    def __enter__(self) -> "HashingFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        """Append bytes, or a memoryview of them."""
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error  # torch.save only passes on that "a write failed"
            raise
        self._digest.update(data)
        self._num_bytes += len(data)
        return len(data)

    def flush(self) -> None:
        """Part of what torch.save expects of a file."""

    def finish(self) -> dict[str, Any]:
        """Wait until the disk has it all; returns `sha256` and `bytes`."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return {"sha256": self._digest.hexdigest(), "bytes": self._num_bytes}


class CheckpointWriter:
    """Writes checkpoints in a thread, so that training waits only while its state is copied."""

    def __init__(self, root: Path, *, keep: int = 2) -> None:
        self.root, self.keep = root, keep
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None

    def write(self, step: int, parts: Mapping[str, Any]) -> None:
        """Begin to write `parts`, which nobody may change any more; waits for the one before.

        Raises:
            UserError: the one before could not be written.
        """
        self.wait()
        self._pending = self._pool.submit(write_checkpoint, self.root, step, parts, keep=self.keep)

    def has_failed(self) -> bool:
        """Whether `wait` would raise, as far as known now."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Return when everything is on the disk.

        Raises:
            UserError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def write_checkpoint(root: Path, step: int, parts: Mapping[str, Any], *, keep: int = 2) -> Path:
    """Save each of `parts` (plain values and tensors) as `root/step-<step>/<name>.pt`, with their hashes.

    The folder is written aside and renamed, so it is whole or not there. The newest `keep` stay. Any of a later step
    is removed too: a run that is at `step` has passed over it as damaged.

    Raises:
        UserError: the disk is full or not writable; what there was before is still there.
    """
    target = root / f"step-{step:08d}"
    aside = root / f".{target.name}.writing"
    try:
        for left_behind in root.glob(".step-*"):  # by a process that was killed
            shutil.rmtree(left_behind)
        aside.mkdir(parents=True)
        files = {f"{name}.pt": write_part(aside / f"{name}.pt", part) for name, part in parts.items()}
        write_json(aside / MANIFEST, {"step": step, "files": files})
        # A rename can survive a power cut that the renamed file's content does not, so content comes first.
        for path in (aside / MANIFEST, aside):
            sync_to_disk(path)
        publish_folder(aside, target)
        sync_to_disk(root)
        remove_superseded(root, target, keep=keep)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            f"checkpoint {target} could not be written ({error}); free some space and start again, "
            "which continues from the last whole checkpoint"
        ) from None
    return target


def write_part(path: Path, part: Any) -> dict[str, Any]:
    """Save one object; returns `sha256` and `bytes` of the file."""
    with HashingFile(path) as file:
        try:
            torch.save(part, cast(IO[bytes], file))
        except RuntimeError:
            if file.error is None:
                raise
            raise file.error from None
        return file.finish()


def sync_to_disk(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders; its renames are journalled
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_superseded(root: Path, newest: Path, *, keep: int) -> None:
    """Remove all checkpoints but `newest` and the `keep` - 1 before it."""
    earlier = [folder for folder in list_checkpoints(root) if folder.name <= newest.name]
    for folder in set(list_checkpoints(root)) - set(earlier[-keep:]):
        hidden = root / f".{folder.name}.old"  # half removed it must not look like a checkpoint
        folder.rename(hidden)
        shutil.rmtree(hidden)


def list_checkpoints(root: Path) -> list[Path]:
    """The finished checkpoints in `root`, oldest first."""
    return sorted(root.glob("step-*"))


def latest_checkpoint(root: Path) -> Path | None:
    """The newest checkpoint whose files have the hashes they were written with; damaged ones are named.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    checkpoints = list_checkpoints(root)
    for folder in reversed(checkpoints):
        problem = find_damage(folder)
        if problem is None:
            return folder
        logger.warning("checkpoint %s is damaged (%s) and is passed over", folder, problem)
    if checkpoints:
        raise UserError(f"no checkpoint in {root} is whole; delete that folder to begin anew, or bring back a copy")
    return None


def find_damage(folder: Path) -> str | None:
    """What is wrong with the files that a folder's manifest lists, or None."""
    try:
        files = read_json(folder / MANIFEST)["files"].items()
        found = (_find_damage_of_file(folder / name, name, expected) for name, expected in files)
        return next((problem for problem in found if problem is not None), None)
    except (UserError, OSError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be used: {error}"


def _find_damage_of_file(path: Path, name: str, expected: Mapping[str, Any]) -> str | None:
    try:
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        return f"{name} has changed" if hash_file(path) != expected["sha256"] else None
    except OSError as error:
        return f"{name} cannot be read: {error}"


def hash_file(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal_folder(folder: Path) -> None:
    """Write the manifest of a checkpoint that somebody else, a Trainer, has made."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    files = {
        path.relative_to(folder).as_posix(): {"sha256": hash_file(path), "bytes": path.stat().st_size}
        for path in paths
    }
    write_json(folder / MANIFEST, {"files": files})


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """The parts of a checkpoint by name, tensors on the CPU.

    Raises:
        UserError: this process cannot see it.
    """
    if not (folder / MANIFEST).exists():
        raise UserError(f"checkpoint {folder} is not to be seen here; all machines of a run need one shared run_dir")
    return {path.stem: torch.load(path, map_location="cpu", weights_only=True) for path in sorted(folder.glob("*.pt"))}


def save_model_folder(model: Any, tokenizer: Any, folder: Path, *, card: Sequence[str]) -> None:
    """Write a complete model folder: weights, code, tokenizer, chat template, generation settings, model card.

    Args:
        card: paragraphs of the model card, below its heading.

    Raises:
        UserError: the disk is full or not writable; what there was before is still there.
    """
    # Mistakes in the ids would only show when somebody generates.
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.bos_token_id]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.use_cache = True  # Trainers switch it off
    header = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- chatmodel\n---\n"
    aside = folder.with_name(f".{folder.name}.writing")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        (aside / "README.md").write_text("\n\n".join([f"{header}\n# {folder.name}", *card]) + "\n")
        for path in aside.iterdir():
            path.chmod(0o644)  # safetensors writes files only their owner may read; a server may be somebody else
        publish_folder(aside, folder)
    except Exception as error:
        shutil.rmtree(aside, ignore_errors=True)
        if not is_disk_error(error):
            raise
        raise UserError(
            f"model folder {folder} could not be written ({error}); the stage's last checkpoint is safe: free some "
            "space and start again, which finishes it"
        ) from None


def is_disk_error(error: Exception) -> bool:
    """Whether the disk is at fault, also in the words of what is written in Rust: weights and tokenizers."""
    return isinstance(error, OSError | SafetensorError) or "(os error " in str(error)


def load_model(folder: Path, **options: Any) -> Any:
    """The causal model in `folder`.

    Raises:
        UserError: the folder holds no model, or one without weights.
    """
    from transformers import AutoModelForCausalLM

    if not (folder / "config.json").exists():
        raise UserError(explain_no_model(folder))
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} holds no weights (no .safetensors file); train it again or copy the weights there")
    return AutoModelForCausalLM.from_pretrained(folder, **options)
