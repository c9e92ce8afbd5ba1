"""Checkpoints are whole or absent, damage is noticed, and model folders load with nothing but Transformers."""

import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from tiny_pretraining import fork, wait
from transformers import AutoTokenizer

from chatmodel import checkpoint
from chatmodel.checkpoint import (
    CheckpointWriter,
    HashingFile,
    find_damage,
    hash_file,
    latest_checkpoint,
    list_checkpoints,
    load_model,
    read_checkpoint,
    save_model_folder,
    seal_folder,
    write_checkpoint,
)
from chatmodel.runtime import UserError, read_json

PARTS = {
    "model": {"weight": torch.arange(3000.0).view(30, 100), "half": torch.ones(7, dtype=torch.bfloat16) / 3},
    "optimizer": {"state": {0: {"step": torch.tensor(4.0)}}, "groups": [{"lr": 0.1, "betas": (0.8, 0.95)}]},
    "run": {"step": 7, "history": [{"loss": 1 / 3}], "none": None},
}


def test_everything_comes_back(tmp_path):
    folder = write_checkpoint(tmp_path, 7, PARTS)
    found = read_checkpoint(folder)
    assert found.keys() == PARTS.keys()
    assert torch.equal(found["model"]["weight"], PARTS["model"]["weight"])
    assert torch.equal(found["model"]["half"], PARTS["model"]["half"])
    assert found["optimizer"] == PARTS["optimizer"]
    assert found["run"] == PARTS["run"]


def test_what_is_hashed_while_writing_is_what_lies_on_the_disk(tmp_path):
    folder = write_checkpoint(tmp_path, 7, PARTS)
    files = read_json(folder / "manifest.json")["files"]
    assert files.keys() == {"model.pt", "optimizer.pt", "run.pt"}
    for name, facts in files.items():
        assert facts == {"sha256": hash_file(folder / name), "bytes": (folder / name).stat().st_size}


def test_only_the_newest_are_kept(tmp_path):
    (tmp_path / ".step-00000002.writing").mkdir()  # of a process that was killed
    for number in (1, 2, 3, 10):
        write_checkpoint(tmp_path, number, PARTS, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000010"]


def test_a_checkpoint_that_was_passed_over_does_not_outlive_a_good_one(tmp_path):
    """Continued from 4 because 8 is damaged: saving 6 keeps 4 and 6, not 6 and 8."""
    for number in (4, 8):
        write_checkpoint(tmp_path, number, PARTS)
    (tmp_path / "step-00000008" / "model.pt").write_bytes(b"")
    write_checkpoint(tmp_path, 6, PARTS)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000004", "step-00000006"]


@pytest.mark.parametrize(
    ("damage", "named"),
    [("flip", "has changed"), ("truncate", "bytes instead of"), ("delete", "is missing"), ("manifest", "manifest")],
)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, caplog, damage, named):
    good, bad = (write_checkpoint(tmp_path, number, PARTS) for number in (1, 2))
    weights = bad / "model.pt"
    content = bytearray(weights.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
    elif damage == "truncate":
        weights.write_bytes(content[:-5])
    elif damage == "delete":
        weights.unlink()
    else:
        (bad / "manifest.json").write_text("{")
    assert named in find_damage(bad)
    with caplog.at_level("WARNING", logger="chatmodel"):
        assert latest_checkpoint(tmp_path) == good
    assert str(bad) in caplog.text
    (good / "run.pt").unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("unreadable", ["model.pt", "manifest.json"])
def test_a_checkpoint_that_cannot_be_read_is_passed_over(tmp_path, monkeypatch, caplog, unreadable):
    good, bad = (write_checkpoint(tmp_path, number, PARTS) for number in (1, 2))
    open_file = Path.open

    def open_badly(self, *args, **options):
        if self == bad / unreadable:
            raise OSError(5, "Input/output error", str(self))
        return open_file(self, *args, **options)

    monkeypatch.setattr(Path, "open", open_badly)
    assert latest_checkpoint(tmp_path) == good
    assert f"{bad} is damaged ({unreadable} cannot be" in caplog.text
    assert "Input/output error" in caplog.text


def test_an_unfinished_write_is_no_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    write_checkpoint(tmp_path, 1, PARTS)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".step-00000002.writing")
    assert latest_checkpoint(tmp_path).name == "step-00000001"


def test_another_machines_checkpoint_is_missed_by_name(tmp_path):
    with pytest.raises(UserError, match="one shared run_dir"):
        read_checkpoint(tmp_path / "step-00000001")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    """/dev/full says "no space left" after the first bytes, as a full disk does."""
    write_checkpoint(tmp_path, 1, PARTS)
    monkeypatch.setattr(checkpoint, "HashingFile", lambda path: HashingFile(Path("/dev/full")))
    with pytest.raises(UserError, match=r"step-00000002 could not be written .*No space left on device"):
        write_checkpoint(tmp_path, 2, PARTS)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert find_damage(tmp_path / "step-00000001") is None


def write_with_little_room(root: Path, room: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    write_checkpoint(root, 2, PARTS)


def test_a_file_that_cannot_grow_is_one_sentence(tmp_path):
    """In the middle of a tensor, by the kernel: a process may not write files of more than 9,000 bytes."""
    root, log = tmp_path / "root", tmp_path / "log"
    write_checkpoint(root, 1, PARTS)
    assert wait(fork(write_with_little_room, root, 9_000, log=log)) == [2]
    assert "step-00000002 could not be written" in log.read_text()
    assert [path.name for path in root.iterdir()] == ["step-00000001"]


def test_the_writer_does_not_keep_training_waiting(tmp_path, monkeypatch):
    may_go_on = threading.Event()
    monkeypatch.setattr(checkpoint, "sync_to_disk", lambda path: may_go_on.wait(10))
    writer = CheckpointWriter(tmp_path)
    writer.write(1, PARTS)
    assert latest_checkpoint(tmp_path) is None
    assert not writer.has_failed()
    may_go_on.set()
    writer.wait()
    assert latest_checkpoint(tmp_path).name == "step-00000001"


def test_the_writer_says_later_that_it_failed(tmp_path):
    (tmp_path / "file").write_text("")
    writer = CheckpointWriter(tmp_path / "file")
    writer.write(1, PARTS)
    with pytest.raises(UserError, match="could not be written"):
        writer.write(2, PARTS)
    writer.wait()


def test_a_sealed_folder_shows_what_happens_to_it(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.bin").write_bytes(b"abc")
    seal_folder(tmp_path)
    assert find_damage(tmp_path) is None
    os.truncate(tmp_path / "inner" / "a.bin", 2)
    assert find_damage(tmp_path) == "inner/a.bin has 2 bytes instead of 3"


def test_a_model_folder_is_complete(chat_model, tokenizer, tmp_path):
    chat_model.config.use_cache = False
    save_model_folder(chat_model, tokenizer, tmp_path / "sft", card=["A test."])
    model = load_model(tmp_path / "sft")
    assert model.config.use_cache
    assert (tmp_path / "sft" / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, tokenizer.bos_token_id]
    assert model.config.calculator == chat_model.config.calculator
    assert AutoTokenizer.from_pretrained(tmp_path / "sft").chat_template == tokenizer.chat_template
    assert (tmp_path / "sft" / "README.md").read_text().startswith("---\nlibrary_name: transformers")
    assert [path.name for path in tmp_path.iterdir()] == ["sft"]


@pytest.mark.parametrize("too_large", ["weights", "tokenizer"])
def test_a_full_disk_at_the_end_is_one_sentence(chat_model, tokenizer, tmp_path, too_large):
    """Each writer has an error of its own; the model before stays."""
    save_model_folder(chat_model, tokenizer, tmp_path / "base", card=["The one before."])

    def save_where_files_cannot_grow():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        if too_large == "tokenizer":
            chat_model.save_pretrained = lambda folder: None
        save_model_folder(chat_model, tokenizer, tmp_path / "base", card=[])

    assert wait(fork(save_where_files_cannot_grow, log=tmp_path / "log")) == [2]
    said = (tmp_path / "log").read_text()
    assert "could not be written" in said
    assert "the stage's last checkpoint is safe: free some space and start again" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "log"]
    assert "The one before." in (tmp_path / "base" / "README.md").read_text()


def test_a_bug_while_a_model_is_written_stays_one(chat_model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "save_pretrained", lambda *_: {}["a bug"])
    with pytest.raises(KeyError, match="a bug"):
        save_model_folder(chat_model, tokenizer, tmp_path / "base", card=[])
    assert not list(tmp_path.iterdir())


def test_a_folder_without_model_or_weights_is_refused(chat_model, tokenizer, tmp_path):
    with pytest.raises(UserError, match="holds no model"):
        load_model(tmp_path)
    save_model_folder(chat_model, tokenizer, tmp_path / "sft", card=[])
    (tmp_path / "sft" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        load_model(tmp_path / "sft")


def test_the_folder_loads_where_this_package_is_not_imported(chat_model, tokenizer, tmp_path):
    save_model_folder(chat_model, tokenizer, tmp_path / "sft", card=[])
    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "t = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "assert 'chatmodel' not in sys.modules\n"
        "print(m(**t('a b c', return_tensors='pt')).logits.sum().item())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "sft")]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    with torch.no_grad():
        expected = chat_model(**tokenizer("a b c", return_tensors="pt")).logits.sum()
    assert float(output) == pytest.approx(expected.item(), rel=1e-5)
