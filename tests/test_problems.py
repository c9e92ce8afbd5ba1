"""Problems of reinforcement learning carry their answers; what training changed is measured on the same ones."""

import json
import math
from dataclasses import replace

import pytest

from chatmodel import problems
from chatmodel.conversations.sources import MixtureEntry, open_entry
from chatmodel.evaluation.statistics import pack_decisions
from chatmodel.problems import (
    build_problems,
    combine_pass,
    compare_pass,
    measure_pass,
    measure_prompts,
    open_problems,
    summarize_samples,
)
from chatmodel.runtime import UserError

# Of both kinds, those for training and those held out.
WORDS = ["banana", "cherry", "apple", "grape", "lemon", "melon", "peach", "plum", "pear", "orange"] * 3


@pytest.fixture(autouse=True)
def few_words(monkeypatch):
    """The embedded list is made from all documentation there is, which takes seconds."""
    monkeypatch.setattr("chatmodel.conversations.sources.load_words", lambda name: WORDS)


def test_problems_hold_question_and_answer():
    (source,), _ = open_problems([{"name": "Arithmetic", "rows": 5}], num_held_out=1)
    rows = build_problems([{"name": "Arithmetic"}], [source], seed=0)
    assert len(rows) == 5
    for index, row in enumerate(rows):
        assert row["prompt"] == source.read(index)[:-1]
        assert source.read(index)[-1]["content"][-1]["text"].endswith(f"#### {row['answer']}")


def test_spelling_holds_the_word():
    source = open_entry(MixtureEntry("SimpleSpelling", rows=4), words=WORDS)
    rows = build_problems(["SimpleSpelling"], [source], seed=0)
    assert all(row["prompt"][0]["content"] == f"Spell the word: {row['answer']}" for row in rows)


@pytest.mark.parametrize("name", ["Arithmetic", "WordProblems", "LetterCounting", "SpellingBee", "SimpleSpelling"])
def test_every_task_can_be_practised(name):
    tasks = [{"name": name, "rows": 3}]
    sources, (held_out,) = open_problems(tasks, num_held_out=2)
    rows = build_problems(tasks, sources, seed=0)
    assert all(row["answer"] for row in rows)
    assert [row["task"] for row in rows] == [name] * 3
    assert held_out.count == 2
    assert held_out.read(0)[:-1] not in rows["prompt"]


def test_tasks_are_mixed_and_repeat():
    tasks = [{"name": "Arithmetic", "rows": 20}, {"name": "LetterCounting", "rows": 10, "epochs": 2}]
    sources, held_out = open_problems(tasks, num_held_out=31)
    rows = build_problems(tasks, sources, seed=1)
    assert len(rows) == 40
    assert len(set(rows["task"][:10])) == 2
    assert rows["prompt"] == build_problems(tasks, sources, seed=1)["prompt"]
    assert rows["prompt"] != build_problems(tasks, sources, seed=2)["prompt"]
    assert [source.count for source in held_out] == [16, 16]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Identity", "task='Identity' has no '#### answer' to reward; choose one of GSM8K"),
        ("ARC-Easy", "task='ARC-Easy' has no '#### answer'"),
        ("GSM9K", r"task='GSM9K' is not known \(did you mean GSM8K\?\); choose one of GSM8K"),
    ],
)
def test_tasks_that_cannot_be_rewarded_are_refused(name, message):
    with pytest.raises(UserError, match=message):
        open_problems([{"name": name}], num_held_out=1)


def test_a_file_without_answers_is_refused_by_its_row(tmp_path):
    path = tmp_path / "chats.jsonl"
    row = '{"messages": [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "two"}]}\n'
    path.write_text(2 * row)
    tasks = [{"name": "mine", "path": str(path)}]
    sources, _ = open_problems(tasks, num_held_out=1)
    with pytest.raises(UserError, match=r"chats.jsonl.* has no '#### answer' to reward"):
        build_problems(tasks, sources, seed=0)
    path.write_text(row)
    with pytest.raises(UserError, match="mine holds a single problem"):
        open_problems(tasks, num_held_out=1)


def test_an_own_files_last_rows_are_held_out(tmp_path):
    path = tmp_path / "chats.jsonl"
    lines = [
        f'{{"messages": [{{"role": "user", "content": "{n}?"}}, {{"role": "assistant", "content": "#### {n}"}}]}}\n'
        for n in range(20)
    ]
    path.write_text("".join(lines))
    tasks = [{"name": "mine", "path": str(path)}]
    sources, (held_out,) = open_problems(tasks, num_held_out=3)
    rows = build_problems(tasks, sources, seed=0)
    assert len(rows) == 17
    asked = {held_out.read(index)[0]["content"] for index in range(held_out.count)}
    assert len(asked) == 3
    assert not asked & {prompt[0]["content"] for prompt in rows["prompt"]}
    assert all(
        prompt[0]["content"] == f"{answer}?" for prompt, answer in zip(rows["prompt"], rows["answer"], strict=True)
    )


def test_prompts_are_measured(tokenizer):
    tasks = [{"name": "WordProblems", "rows": 9}]
    sources, held_out = open_problems(tasks, num_held_out=1)
    rows = build_problems(tasks, sources, seed=0)
    prompts = [*rows["prompt"], held_out[0].read(0)]
    assert measure_prompts(tokenizer, rows, held_out) == max(
        len(tokenizer.encode(prompt[0]["content"], add_special_tokens=False)) + 4 for prompt in prompts
    )


QUESTION, ANSWER = {"role": "user", "content": "1?"}, {"role": "assistant", "content": "#### 1"}


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ({"messages": []}, "the conversation has no messages"),
        ({"messages": [QUESTION, ANSWER | {"content": None}]}, "content of type NoneType"),
        ({"question": "1?"}, "the row has no conversation in it"),
        ({"messages": [ANSWER, QUESTION]}, "message 1 is from 'assistant' but should be from 'user'"),
        ({"messages": [QUESTION, ANSWER, QUESTION]}, "the last message is not the assistant's"),
        (5, "the row has no conversation in it"),
    ],
)
def test_a_wrong_problem_is_named(tmp_path, bad, problem):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [{"messages": [QUESTION, ANSWER]}] * 10 + [bad]))
    tasks = [{"name": "own", "path": str(path)}]
    sources, held_out = open_problems(tasks, num_held_out=2)
    everything = replace(sources[0], count=sources[0].count + held_out[0].count)
    with pytest.raises(UserError, match=rf"own\.jsonl, row 11: .*{problem}"):
        build_problems(tasks, [everything], seed=0)


def test_right_replies_are_counted(tokenizer, monkeypatch):
    tasks = [{"name": "Arithmetic"}]
    _, sources = open_problems(tasks, num_held_out=4)
    answers = build_problems(tasks, sources, seed=0)["answer"]
    greedy = [[f"#### {answers[0]}"], ["#### 1234567"], [f"so #### {answers[2]}"], ["no"]]
    sampled = [
        [f"#### {answer}"] * count + ["no"] * (4 - count) for answer, count in zip(answers, range(4), strict=True)
    ]

    def generate(model, tokenizer, prompts, num_samples=1, **options):
        texts = greedy if num_samples == 1 else sampled
        return [[tokenizer.encode(text, add_special_tokens=False) for text in some] for some in texts]

    monkeypatch.setattr(problems, "generate_replies", generate)
    measured = measure_pass(None, tokenizer, sources, max_new_tokens=8, batch_size=4, ks=[1, 4], num_samples=4)
    assert (measured["correct"], measured["n"], measured["accuracy"]) == (2, 4, 0.5)
    assert measured["stderr"] == 0.25
    assert [each["reward"] for each in measured["completions"]] == [1.0, 0.0, 1.0, 0.0]  # by turns
    assert [each["completion"] for each in measured["completions"]] == [greedy[index][0] for index in (0, 1, 2, 3)]
    assert measured["sampled"]["counts"] == [0, 1, 2, 3]
    assert measured["sampled"]["pass_at_k"]["1"]["value"] == pytest.approx(6 / 16)
    assert measured["sampled"]["pass_at_k"]["4"]["value"] == 0.75


def test_pass_at_k_by_hand():
    """Two problems, 4 samples each, 1 and 0 right: one of two samples is right with 1 - C(3,2)/C(4,2) = 1/2."""
    (found,) = summarize_samples([1, 0], 4, [2])["pass_at_k"].values()
    assert found["value"] == 0.25
    assert found["stderr"] == pytest.approx(math.sqrt(0.125 / 2))  # the variance of (0.5, 0) over their number


def measured(right, counts):
    return {
        "n": len(right),
        "decisions": pack_decisions(right),
        "sampled": summarize_samples(counts, 4, [1]),
    }


def test_changes_are_paired():
    """Differences (1, 0, 0, 0): mean 1/4, variance 1/4, standard error sqrt(1/4/4)."""
    before, after = measured([0, 1, 0, 1], [0, 2, 2, 4]), measured([1, 1, 0, 1], [4, 2, 2, 4])
    change = compare_pass(before, after)
    assert change["greedy"] == {"difference": 0.25, "stderr": pytest.approx(0.25)}
    assert change["pass@1"] == {"difference": 0.25, "stderr": pytest.approx(0.25)}


def test_seeds_are_combined():
    before = measured([0, 0, 1, 1], [0, 0, 4, 4])
    runs = [(before, measured(right, [0, 0, 4, 4])) for right in ([1, 0, 1, 1], [1, 1, 1, 1], [1, 0, 1, 0])]
    combined = combine_pass(runs)["greedy"]
    # Means over seeds: (1, 1/3, 0, -1/3); each seed's: 1/4, 1/2, 0.
    assert combined["difference"] == pytest.approx(0.25)
    assert combined["stderr"] == pytest.approx(math.sqrt((0.75**2 + 0.0833333**2 + 0.25**2 + 0.5833333**2) / 3 / 4))
    assert combined["seed_stderr"] == pytest.approx(math.sqrt(0.0625 / 3))
    assert combined["num_seeds"] == 3
    with pytest.raises(UserError, match="not measured alike"):
        combine_pass([runs[0], (measured([1, 0], [0, 0]), measured([1, 1], [0, 0]))])
