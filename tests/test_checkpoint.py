"""Checkpoints are whole or absent, damage is noticed, and model folders load with nothing but Transformers."""

import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoTokenizer

from chatmodel.checkpoint import (
    find_damage,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_model,
    save_checkpoint,
    save_model_folder,
)
from chatmodel.runtime import UserError


@pytest.fixture
def trained():
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(3, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    return accelerator, model, optimizer


def step(model, optimizer):
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_checkpoint_brings_everything_back(trained, tmp_path):
    accelerator, model, optimizer = trained
    step(model, optimizer)
    folder = save_checkpoint(accelerator, tmp_path, 1, {"position": 7})
    step(model, optimizer)
    expected = model.weight.clone()
    assert load_checkpoint(accelerator, folder) == {"position": 7}
    assert not torch.equal(model.weight, expected)
    step(model, optimizer)
    assert torch.equal(model.weight, expected)


def test_only_the_newest_are_kept(trained, tmp_path):
    for number in (1, 2, 3, 10):
        save_checkpoint(trained[0], tmp_path, number, None, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000010"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest"])
def test_a_damaged_checkpoint_is_passed_over(trained, tmp_path, caplog, damage):
    good = save_checkpoint(trained[0], tmp_path, 1, None)
    bad = save_checkpoint(trained[0], tmp_path, 2, None)
    weights = bad / "model.safetensors"
    content = bytearray(weights.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        weights.write_bytes(content)
    elif damage == "truncate":
        weights.write_bytes(content[:-5])
    elif damage == "delete":
        weights.unlink()
    else:
        (bad / "manifest.json").write_text("{")
    assert find_damage(bad) is not None
    with caplog.at_level("WARNING", logger="chatmodel"):
        assert latest_checkpoint(tmp_path) == good
    assert str(bad) in caplog.text


def test_an_unfinished_write_is_no_checkpoint(trained, tmp_path):
    save_checkpoint(trained[0], tmp_path, 1, None)
    (tmp_path / ".step-00000002.writing").mkdir()
    assert latest_checkpoint(tmp_path).name == "step-00000001"


def test_another_number_of_processes_is_refused(trained, tmp_path):
    folder = save_checkpoint(trained[0], tmp_path, 1, None)
    (folder / "rank-00001.pt").write_bytes(b"")
    with pytest.raises(UserError, match="made by 2 processes, not 1"):
        load_checkpoint(trained[0], folder)


def test_a_full_disk_is_one_sentence(trained, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", refuse)
    with pytest.raises(UserError, match="No space left on device"):
        save_checkpoint(trained[0], tmp_path, 1, None)
    assert latest_checkpoint(tmp_path) is None


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
