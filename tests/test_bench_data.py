"""The benchmarks of the data path and of tokenizers run, on next to nothing, and print their tables."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from chatmodel.tokenizer import save_tokenizer

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def texts(tmp_path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a", "b", "c"):
        rows = [
            {"text": f"{name} document {n}, which has some words in it, and the number {n * n}"} for n in range(60)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def run_script(name: str, arguments: list[str], monkeypatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    specification = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    module.main()


def read_table(output: str, title: str) -> list[str]:
    """The first cell of each row of the table whose first cell begins so."""
    table = next(part for part in output.split("\n\n") if part.startswith(f"| {title}"))
    return [line.split("|")[1].strip() for line in table.splitlines()[2:]]


def test_data_path(texts, tokenizer, tmp_path, capsys, monkeypatch):
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    sizes = ["--sequence_length", "16", "--batch_size", "2", "--batches", "3", "--repeats", "1"]
    run_script(
        "bench_data", ["--dataset", str(texts), "--tokenizer", str(tmp_path / "tokenizer"), *sizes], monkeypatch
    )
    output = capsys.readouterr().out
    assert len(read_table(output, "vocabulary 512")) == 2
    assert len(read_table(output, "batches of (2, 16)")) == 6
    assert len(read_table(output, "opening a store")) == 1


def test_tokenizers(texts, capsys, monkeypatch):
    run_script("bench_tokenizer", ["--dataset", str(texts), "--vocab_size", "300", "--repeats", "1"], monkeypatch)
    output = capsys.readouterr().out
    assert len(read_table(output, "training 300 tokens")) == 2
    assert len(read_table(output, "encoding 0.0 MB")) == 4
