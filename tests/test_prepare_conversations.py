"""The folder of conversations that stands in for the Hub's, made of small files."""

import gzip
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from chatmodel.conversations.mixtures import load_mixture
from chatmodel.conversations.stand_ins import choose_sources
from chatmodel.data.words import is_held_out
from chatmodel.runtime import UserError

ROOT = Path(__file__).parents[1]
ARC = {
    "question": "What melts?",
    "choices": {"text": ["ice", "rock", "air"], "label": ["A", "B", "C"]},
    "answerKey": "A",
}
MMLU = {"question": "2 + 2?", "choices": ["1", "2", "3", "4"], "answer": 3}
HELD_OUT = [word for word in (f"qaz{letter}" for letter in "abcdefghijklmnopqrstuvwxyz") if is_held_out(word)]
TRAINED = [word for word in (f"qaz{letter}" for letter in "abcdefghijklmnopqrstuvwxyz") if not is_held_out(word)]


@pytest.fixture
def prepare(monkeypatch):
    spec = importlib.util.spec_from_file_location("prepare", ROOT / "scripts" / "prepare_conversations.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "GENERATED_SAMPLES", 20)

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["prepare_conversations.py", *map(str, options)])
        module.main()

    return run


def write_rows(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def talk(question, answer, source):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "source": source}


@pytest.fixture
def folders(tmp_path):
    chat, chatcore = tmp_path / "chat", tmp_path / "chatcore"
    write_rows(chat / "sums.jsonl", [talk("Seven and two?", "7+2 = 9\n#### 9", "sums")])
    listed = talk(
        f"Where is {HELD_OUT[0]}?\nOptions:\n- sea\n- sky\n- wood\n- town\n\nThink:", "The answer is sky.", "cot"
    )
    write_rows(chat / "cot.jsonl", [listed])
    for name, row in {
        "arc_easy_train": ARC,
        "arc_challenge_train": ARC,
        "mmlu_dev": MMLU,
        "mmlu_validation": MMLU,
    }.items():
        write_rows(chatcore / f"{name}.jsonl", [row])
    write_rows(chatcore / "gsm8k_train.jsonl", [{"question": f"Who is {HELD_OUT[1]}?", "answer": "#### 1"}])
    (chatcore / "words_alpha.txt").write_text("\n".join([*HELD_OUT, *TRAINED]) + "\n")
    return chat, chatcore


def read_lines(path):
    with gzip.open(path, "rt") as lines:
        return [line.rstrip("\n") for line in lines]


def test_questions_sums_and_words(prepare, folders, tmp_path):
    chat, chatcore = folders
    prepare("--chat", chat, "--chatcore", chatcore, "--output", tmp_path / "out")
    rows = [json.loads(line) for line in read_lines(tmp_path / "out" / "multiple_choice.jsonl.gz")]
    counts = {source: sum(row["source"] == source for row in rows) for source in ("ARC-Easy", "MMLU", "listed")}
    assert counts == {"ARC-Easy": 6, "MMLU": 6, "listed": 4}
    (sums,) = read_lines(tmp_path / "out" / "sums.jsonl.gz")
    assert [part["type"] for part in json.loads(sums)["messages"][1]["content"]] == [
        "text",
        "python",
        "python_output",
        "text",
    ]
    words = read_lines(tmp_path / "out" / "words.txt.gz")
    # All words to train on are kept; of the held-out ones those that a conversation holds are not.
    assert {word for word in words if not is_held_out(word)} == set(TRAINED)
    assert {word for word in words if is_held_out(word)} == set(HELD_OUT[2:])


def test_the_same_sources_make_the_same_files(prepare, folders, tmp_path):
    chat, chatcore = folders
    for name in ("first", "second"):
        prepare("--chat", chat, "--chatcore", chatcore, "--output", tmp_path / name)
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name


def test_a_mixture_trains_on_what_was_made(prepare, folders, tmp_path, tokenizer):
    chat, chatcore = folders
    prepare("--chat", chat, "--chatcore", chatcore, "--output", tmp_path / "out")
    entries = [
        {"name": "MMLU", "stand_ins": [{"path": "multiple_choice.jsonl.gz"}, {"path": "sums.jsonl.gz"}]},
        {"name": "SpellingBee", "stand_ins": [{"name": "SpellingBee", "path": "words.txt.gz", "rows": 3}]},
    ]
    rows, counts = load_mixture(choose_sources(entries, tmp_path / "out"), tokenizer, max_length=512)
    assert [(count["name"], count["rows"]) for count in counts] == [
        ("multiple_choice", 22),
        ("sums", 1),
        ("SpellingBee", 3),
    ]
    assert len(rows) == 26


def test_a_folder_without_conversations_is_refused(prepare, tmp_path):
    with pytest.raises(UserError, match="holds no jsonl"):
        prepare("--chat", tmp_path, "--output", tmp_path / "out")
