"""Evaluation beside nanochat's own code, on real data: `--data-root DIR --nanochat-root CHECKOUT` (c75fe54)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_model

from chatmodel.data.files import read_texts
from chatmodel.tokenizer import calculator_table, save_tokenizer, train_tokenizer

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def folder(data_root, tmp_path):
    """A random model with a tokenizer of the validation text."""
    texts = read_texts(data_root / "pretrain" / "shard_00010.parquet", text_column="text")
    tokenizer = train_tokenizer(texts, 2048, max_chars=3_000_000, doc_cap=10_000)
    model = make_model(
        vocab_size=2048,
        max_position_embeddings=2048,
        sliding_window=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        calculator=calculator_table(tokenizer),
    )
    model.save_pretrained(tmp_path)
    save_tokenizer(tokenizer, tmp_path)
    return tmp_path


def run_script(name: str, *arguments: object) -> str:
    command = [sys.executable, str(SCRIPTS / name), *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.data
def test_core_decides_as_nanochat_does(folder, data_root, nanochat_roots):
    checkout = next(root for root in nanochat_roots if (root / "tasks" / "spellingbee.py").exists())
    output = run_script(
        "compare_core.py", "--nanochat", checkout, "--model", folder, "--eval_bundle", data_root / "eval_bundle.zip",
        "--max_per_task", 11,
    )  # fmt: skip
    summary = json.loads(output.splitlines()[-1])
    assert (summary["equal"], summary["decisions"]) == (22 * 11, 22 * 11)


@pytest.mark.data
def test_chatcore_asks_and_decides_as_nanochat_does(folder, data_root, nanochat_roots):
    checkout = next(root for root in nanochat_roots if (root / "tasks" / "spellingbee.py").exists())
    output = run_script(
        "compare_chatcore.py", "--nanochat", checkout, "--model", folder, "--chatcore", data_root / "chatcore"
    )
    rows = json.loads(output.splitlines()[-1])
    assert [row["prompts"] for row in rows.values()] == [[100, 100]] * 6
    for row in rows.values():
        for equal, compared in row.values():
            assert equal == compared
