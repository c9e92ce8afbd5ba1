"""Contamination: n-grams against a plain count by words, which examples are found, and the script."""

import json
import random
import re
import sys

import numpy as np
import pytest

from chatmodel.evaluation import contamination
from chatmodel.evaluation.contamination import (
    RULES,
    build_index,
    judge_examples,
    read_benchmarks,
    read_decisions,
    render_contamination,
    report_contamination,
    scan_texts,
)
from chatmodel.evaluation.core_tasks import CoreTask
from chatmodel.evaluation.ngrams import hash_ngrams, hash_words, write_ngram
from chatmodel.evaluation.statistics import summarize_task, unpack_decisions
from scripts.check_contamination import main


def list_words(text):
    text = re.sub("[\u2000-\u203f\u00a0]", " ", text.lower())
    return re.findall(r"[0-9a-z\u0080-\U0010ffff]+", text)


def make_text(generator, length):
    words = ["Don\u2019t", "stop", "naïve", "x2", "the", "The", "of\u00a0a", "(and)", "42,", "—", "été", "a"]
    return " ".join(generator.choice(words) for _ in range(length))


def test_words_are_those_of_a_plain_split():
    texts = ["“Don't stop!” she said…", "", "...", "Été\u00a0NAÏVE x2—y\n\tz", "ö", "\U0001f600 ok"]
    words = hash_words(texts)
    found = [words.data[start:end].decode() for start, end in zip(words.starts, words.ends, strict=True)]
    assert found == [word for text in texts for word in list_words(text)]
    assert found == ["don", "t", "stop", "she", "said", "été", "naïve", "x2", "y", "z", "ö", "\U0001f600", "ok"]
    assert words.texts.tolist() == [0] * 5 + [3] * 5 + [4] + [5] * 2
    # Equal words have equal hashes wherever they stand, and others have others.
    again = hash_words(["x " * 999 + " ".join(found)]).hashes[999:]
    assert (again == words.hashes).all()
    assert len(set(again.tolist())) == len(found)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_ngrams_are_those_of_a_plain_count(n):
    generator = random.Random(n)
    texts = [make_text(generator, generator.randrange(12)) for _ in range(60)]
    ngrams = hash_ngrams(hash_words(texts), n)
    plain = [tuple(words[i : i + n]) for words in map(list_words, texts) for i in range(len(words) - n + 1)]
    assert len(ngrams.hashes) == len(plain)
    assert dict(zip(plain, ngrams.hashes.tolist(), strict=True)).keys() == set(plain)
    pairs = set(zip(plain, ngrams.hashes.tolist(), strict=True))
    assert len(pairs) == len(set(plain)) == len(set(ngrams.hashes.tolist()))


def test_no_collisions_among_many_words():
    numbers = [str(n) for n in range(200_000)]
    assert len(np.unique(hash_words([" ".join(numbers)]).hashes)) == 200_000


PASSAGE = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
CLEAN = "no run of these words was ever written down before in a text for training"


@pytest.fixture
def benchmarks():
    own = "Please choose the right answer to the question that follows here and now:"
    return {
        "reading": [f"{PASSAGE}?", CLEAN, "too short"],
        "worded": [f"{own} {word}" for word in ("a b c d e f g h", *(f"w{i} x{i} y{i}" for i in range(19)))],
        "half": [f"{PASSAGE.split(' nine')[0]} and then some quite different words follow up to the very end of it"],
    }


def find(benchmarks, texts, **options):
    indices = [build_index(benchmarks, n) for n in (13, 8)]
    totals = scan_texts(texts, indices, num_workers=2)
    return report_contamination(benchmarks, indices, **options), totals, indices


def test_what_is_found(benchmarks, monkeypatch):
    monkeypatch.setattr(contamination, "BATCH_CHARS", 50)  # so that texts fall into several batches
    own = "Please choose the right answer to the question that follows here and now: something else"
    texts = [f"He said: {PASSAGE.upper()}, and left.", own, "one two three", "four five six seven"]
    report, totals, indices = find(benchmarks, texts)
    assert totals == {"documents": 4, "words": sum(len(list_words(t)) for t in texts), "chars": sum(map(len, texts))}
    reading = report["reading"]
    assert (reading["touched"]["checked"], reading["touched"]["found"], reading["touched"]["share"]) == (2, 1, 0.5)
    assert unpack_decisions(reading["touched"]["examples"], 3) == [True, False, False]
    assert reading["covered"]["found"] == 1
    assert reading["samples"] == ["one two three four five six seven eight nine ten eleven twelve thirteen"]
    # The wording that all examples of a task share counts for none of them.
    assert [report["worded"][rule.name]["found"] for rule in RULES] == [0, 0, 0]
    # One run of eight words is there, but not 70 % of them, and no run of 13.
    assert [report["half"][rule.name]["found"] for rule in RULES] == [0, 1, 0]
    # Nothing spans the border between two texts, and counting adds up.
    assert indices[1].seen.max() == 1
    scan_texts(texts[:1], indices, num_workers=1)
    assert indices[1].seen.max() == 2
    text = render_contamination(report, totals)
    assert "| reading | 3 | 50.0 % (1 of 2) |" in text
    assert "4 documents" in text


def test_it_agrees_with_a_plain_search():
    generator = random.Random(0)
    benchmarks = {"made_up": [make_text(generator, 10) for _ in range(200)]}
    texts = [make_text(generator, 200) for _ in range(20)]
    index = build_index(benchmarks, 4)
    scan_texts(texts, [index], num_workers=1)
    seen = {tuple(words[i : i + 4]) for words in map(list_words, texts) for i in range(len(words) - 3)}
    expected = []
    for words in map(list_words, benchmarks["made_up"]):
        expected.append(any(tuple(words[i : i + 4]) in seen for i in range(len(words) - 3)))
    _, dirty = judge_examples(index, RULES[0], 200)
    assert dirty.tolist() == expected
    assert 0 < sum(expected) < 200


def test_accuracies_on_both_sides(benchmarks):
    right = [True, False, True]
    report, totals, _ = find(benchmarks, [PASSAGE], decisions={"reading": right, "worded": [True, False]})
    touched = report["reading"]["touched"]
    assert touched["accuracy_dirty"] == {"accuracy": 1.0, "n": 1, "stderr": 0.0}
    assert touched["accuracy_clean"]["accuracy"] == 0.5
    assert "accuracy_dirty" not in report["worded"]["touched"]
    assert "0.500 ± 0.354 (2) / 1.000 ± 0.000 (1)" in render_contamination(report, totals)


def test_texts_of_the_benchmarks(tmp_path, monkeypatch):
    kinds = [
        ("choose", {"query": "Q", "choices": ["x", "y"], "gold": 1}, "multiple_choice"),
        ("refer", {"context_options": ["A", "B"], "continuation": "end", "gold": 0}, "schema"),
        ("finish", {"context": "It is", "continuation": "so"}, "language_modeling"),
    ]
    tasks = [CoreTask(label, kind, 0, " ", 0.0, [example]) for label, example, kind in kinds]
    monkeypatch.setattr(contamination, "load_core_tasks", lambda bundle: iter(tasks))
    rows = {
        "arc_easy": {"question": "Why?", "choices": {"text": ["so", "no"], "label": ["A", "B"]}, "answerKey": "B"},
        "mmlu": {"question": "Who?", "choices": ["a", "b", "c", "d"], "answer": 2},
        "gsm8k": {"question": "How many?", "answer": "It is <<1+1=2>>2\n#### 2"},
        "humaneval": {"prompt": "def f():\n", "canonical_solution": "    pass\n"},
    }
    rows["arc_challenge"] = rows["arc_easy"]
    for name, row in rows.items():
        (tmp_path / f"{name}_test.jsonl").write_text(json.dumps(row))
    (tmp_path / "words_alpha.txt").write_text("banana\ncat\ndog\n")
    texts = read_benchmarks(tmp_path, tmp_path)
    assert [texts[label] for label, _, _ in kinds] == [["Q y"], ["A end"], ["It is so"]]
    assert texts["ChatCORE ARC-Easy"] == ["Why? no"]
    assert texts["ChatCORE MMLU"] == ["Who? c"]
    assert texts["ChatCORE GSM8K"] == ["How many? It is 2\n#### 2"]
    assert texts["ChatCORE HumanEval"][0].startswith("def f():")
    assert len(texts["ChatCORE SpellingBee"]) == 256


def test_the_script(tmp_path, monkeypatch, capsys):
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": PASSAGE}) + "\n")
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": CLEAN}]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(chat) + "\n")
    task = CoreTask("copa", "language_modeling", 0, " ", 0.0, [])
    task.examples.extend({"context": text, "continuation": ""} for text in (PASSAGE, CLEAN, "w " * 20))
    monkeypatch.setattr(contamination, "load_core_tasks", lambda bundle: iter([task]))
    metrics = {"core": {"tasks": {"copa": summarize_task([True, True, False], baseline=0.5, seconds=1.0)}}}
    assert read_decisions(metrics) == {"copa": [True, True, False]}
    (tmp_path / "result.json").write_text(json.dumps({"metrics": metrics}))
    options = ["--text", str(tmp_path / "text.jsonl"), "--conversations", str(tmp_path / "chat.jsonl")]
    options += ["--eval_bundle", str(tmp_path), "--results", str(tmp_path / "result.json"), "--num_workers", "1"]
    monkeypatch.setattr(sys, "argv", ["check_contamination.py", *options, "--output", str(tmp_path / "out.json")])
    main()
    assert "| copa | 3 | 66.7 % (2 of 3) |" in capsys.readouterr().out
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["tasks"]["copa"]["touched"]["accuracy_dirty"]["accuracy"] == 1.0
    assert written["text"]["documents"] == 2


def test_an_ngram_is_written_in_words():
    assert write_ngram(hash_words(["A (b), C!"]), 1, 2) == "b c"
