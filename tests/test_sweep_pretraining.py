"""Variants of a sweep: what cannot be is refused in one sentence before any of them runs."""

import importlib.util
import sys
from pathlib import Path

import pytest

from chatmodel.data.store import build_token_store
from chatmodel.runtime import UserError
from chatmodel.tokenizer import save_tokenizer, train_tokenizer

SCRIPT = Path(__file__).parents[1] / "scripts" / "sweep_pretraining.py"


@pytest.fixture
def sweep(monkeypatch, tmp_path):
    """Run the script on the run folder of a test."""
    specification = importlib.util.spec_from_file_location("sweep_pretraining", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)

    def start(*variants):
        monkeypatch.setattr(sys, "argv", ["sweep_pretraining.py", "--run_dir", str(tmp_path), *variants])
        module.main()

    return start


@pytest.mark.parametrize(
    ("variant", "named"),
    [
        ("a:lr=x", "lr=x must be a number"),
        ("a:lr_head=x", "lr_head=x must be a number"),
        ("a:depth=2.5", "depth=2.5 must be a whole number"),
        ("a:sliding_window=big", "cannot be: .*sliding_window"),
        ("a:packing=loose", "packing=loose is unknown"),
        ("a:batch=1e5", "total_batch_tokens=100000 is no multiple"),
        ("a:lr_tail=2", "lr_tail names no group"),
    ],
)
def test_a_variant_that_cannot_be(sweep, tokenizer, tmp_path, variant, named):
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    make_stores(tokenizer, tmp_path)
    with pytest.raises(UserError, match=named):
        sweep("plain:", variant)


def test_a_store_of_another_tokenizer(sweep, tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    make_stores(train_tokenizer(["other words"] * 10, 270, max_chars=1000, doc_cap=100), tmp_path)
    with pytest.raises(UserError, match=r"data.train was made with another tokenizer; delete it and make it anew"):
        sweep("plain:")


def test_a_run_without_a_tokenizer(sweep):
    with pytest.raises(UserError, match=r"has no tokenizer yet; run recipes/train_tokenizer\.py"):
        sweep("plain:")


def make_stores(tokenizer, folder):
    for split in ("train", "validation"):
        facts = {"name": "words", "manifest": ""}
        build_token_store(["some words"] * 4, tokenizer, folder / "data" / split, dataset=facts, split=split)
