"""Rendering, masks, tasks and their mixture against nanochat's own code at c75fe54, run from a checkout of it."""

import gzip
import importlib
import json
import sys
from collections import defaultdict
from itertools import islice
from pathlib import Path
from types import ModuleType, SimpleNamespace

import datasets
import pytest

from chatmodel.conversations.datasets import load_task_rows, load_word_list, task_messages
from chatmodel.conversations.files import read_rows
from chatmodel.conversations.generated import GENERATED_TASKS, generate_conversation, select_words
from chatmodel.conversations.mixtures import load_mixture
from chatmodel.conversations.render import render_conversation, render_prompt
from chatmodel.data.corpus import stream_documents
from chatmodel.runtime import UserError
from chatmodel.tokenizer import build_encoding, train_tokenizer

pytestmark = pytest.mark.data
PER_SOURCE = 1000


@pytest.fixture(scope="module")
def large_tokenizer(request):
    root = request.config.getoption("--data-root")
    texts = islice(stream_documents(str(root / "pretrain"), "validation"), 1500)
    return train_tokenizer(texts, 8192, max_chars=5_000_000, doc_cap=10_000)


@pytest.fixture
def nanochat(nanochat_roots, data_root, large_tokenizer, monkeypatch, tmp_path):
    """nanochat's tokenizer class over our vocabulary, and its task classes over the files of `data_root`."""
    root = next((root for root in nanochat_roots if (root / "scripts" / "mid_train.py").exists()), None)
    if root is None:
        pytest.skip("needs --nanochat-root PATH, a checkout of nanochat at c75fe54")
    for name in [name for name in sys.modules if name.partition(".")[0] in ("nanochat", "tasks")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rustbpe", ModuleType("rustbpe"))  # trains tokenizers, and is not built here
    monkeypatch.syspath_prepend(str(root))
    monkeypatch.setattr(datasets, "load_dataset", lambda hub, *rest, split: open_local(data_root, hub, rest, split))
    tasks = {
        name: importlib.import_module(f"tasks.{name}")
        for name in ("common", "arc", "gsm8k", "mmlu", "smoltalk", "spellingbee")
    }
    words = tmp_path / "words_alpha.txt"
    words.write_text("\n".join(load_word_list(data_root / "chatcore")) + "\n")
    monkeypatch.setattr(tasks["spellingbee"], "download_file_with_lock", lambda url, filename: str(words))
    tokenizer = importlib.import_module("nanochat.tokenizer").RustBPETokenizer(
        build_encoding(large_tokenizer), "<|bos|>"
    )
    yield SimpleNamespace(tokenizer=tokenizer, **tasks)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("nanochat", "tasks")]:
        del sys.modules[name]


def open_local(data_root: Path, hub: str, subset: tuple[str, ...], split: str) -> datasets.Dataset:
    """What `datasets.load_dataset` would fetch, from the folders of real data."""
    stems = {"ARC-Easy": "arc_easy", "ARC-Challenge": "arc_challenge", "all": "mmlu", "main": "gsm8k"}
    path = data_root / "chat" / "topical_chat.jsonl.gz"  # in place of SmolTalk
    if subset:
        path = data_root / "chatcore" / f"{stems[subset[0]]}_{split}.jsonl.gz"
    return datasets.Dataset.from_list(list(read_rows(path).rows))


def list_conversations(data_root: Path) -> dict[str, list]:
    """Up to `PER_SOURCE` conversations of everything that is trained or tested on."""
    found: dict[str, list] = defaultdict(list)
    for path in sorted((data_root / "chat").glob("*.jsonl.gz")):
        with gzip.open(path, "rt") as lines:
            for row in map(json.loads, lines):
                found[f"{path.name.partition('.')[0]}/{row['source']}"].append(row["messages"])
    for name, split in [("ARC-Easy", "train"), ("ARC-Challenge", "train"), ("MMLU", "test"), ("GSM8K", "train")]:
        rows = load_task_rows(name, split, data_root / "chatcore")
        found[name] = [task_messages(name, row) for row in rows[:PER_SOURCE]]
    words = select_words(load_word_list(data_root / "chatcore"), "train")
    for name in GENERATED_TASKS:
        found[name] = [generate_conversation(name, i, split="train", words=words) for i in range(PER_SOURCE)]
    return {name: rows[:PER_SOURCE] for name, rows in found.items()}


def test_ids_and_masks_are_nanochats(nanochat, data_root, large_tokenizer):
    compared = refused = calls = 0
    sources = list_conversations(data_root)
    for name, conversations in sources.items():
        for messages in conversations:
            try:
                theirs = nanochat.tokenizer.render_conversation({"messages": messages})
            except (AssertionError, ValueError, TypeError):
                theirs = None
            try:
                rendered = render_conversation(large_tokenizer, messages, max_length=2048)
            except UserError:
                rendered = None
            assert (theirs is None) <= (rendered is None), f"{name}: nanochat refuses what is accepted here"
            if rendered is None:
                refused += 1
                continue
            assert (rendered.input_ids, rendered.mask) == theirs, (name, messages)
            compared += 1
            calls += any(isinstance(message["content"], list) for message in messages)
            if messages[-1]["role"] == "assistant" and not rendered.cut:
                prompt = nanochat.tokenizer.render_for_completion({"messages": messages})
                assert render_prompt(large_tokenizer, messages[:-1]) == prompt
    counts = f"{len(sources)} sources, {compared} conversations alike, {calls} with calls, {refused} refused"
    assert compared > 30_000, counts
    assert calls > 4_000, counts
    assert refused == 0, counts


def test_conversations_of_the_tasks_are_nanochats(nanochat, data_root):
    folder = data_root / "chatcore"
    words = load_word_list(folder)
    pairs = [
        ("ARC-Easy", "train", nanochat.arc.ARC("ARC-Easy", "train")),
        ("ARC-Challenge", "test", nanochat.arc.ARC("ARC-Challenge", "test")),
        ("GSM8K", "train", nanochat.gsm8k.GSM8K("main", "train")),
        ("MMLU", "validation", nanochat.mmlu.MMLU("all", "validation")),
    ]
    for name, split, task in pairs:
        rows = load_task_rows(name, split, folder)
        assert len(rows) == len(task)
        for index in range(1000):
            assert task_messages(name, rows[index]) == task[index]["messages"], (name, index)
    for split in ("train", "test"):
        bee = nanochat.spellingbee.SpellingBee(size=1000, split=split)
        for index in range(1000):
            ours = generate_conversation("SpellingBee", index, split=split, words=words)
            assert ours == bee[index]["messages"]
        assert len(bee) == 1000


def test_a_mixture_has_nanochats_rows_in_its_order(nanochat, data_root, large_tokenizer, tmp_path):
    """The parts of its SFT mixture that are public, with a stand-in for SmolTalk, all of it rendered."""
    (tmp_path / "smoltalk_train.jsonl.gz").symlink_to(data_root / "chat" / "topical_chat.jsonl.gz")
    entries = [
        {"name": "ARC-Easy"},
        {"name": "ARC-Challenge"},
        {"name": "GSM8K", "rows": 2000},
        {"name": "SmolTalk", "path": str(tmp_path), "rows": 500},
    ]
    ours, counts = load_mixture(entries, large_tokenizer, max_length=2048, chatcore_folder=data_root / "chatcore")
    theirs = nanochat.common.TaskMixture(
        [
            nanochat.arc.ARC("ARC-Easy", "train"),
            nanochat.arc.ARC("ARC-Challenge", "train"),
            nanochat.gsm8k.GSM8K("main", "train", stop=2000),
            nanochat.smoltalk.SmolTalk("train", stop=500),
        ]
    )
    assert [count["rows"] for count in counts] == theirs.lengths
    assert len(ours) == len(theirs)
    for index, row in enumerate(ours):
        ids, mask = nanochat.tokenizer.render_conversation(theirs[index])
        assert row["input_ids"] == ids
        assert row["labels"] == [token_id if kept else -100 for token_id, kept in zip(ids, mask, strict=True)]
