"""ChatCORE on made-up data: letters against plain logits, scripted replies with known scores, absent data."""

import json
import math

import pytest
import torch

from chatmodel.conversations.datasets import ask_multiple_choice
from chatmodel.conversations.render import render_prompt
from chatmodel.evaluation import chatcore
from chatmodel.evaluation.chat_tasks import cut_prompt
from chatmodel.evaluation.chatcore import (
    BASELINES,
    ChatLimits,
    choose_letters,
    evaluate_chatcore,
    find_letter_ids,
    write_replies,
)
from chatmodel.evaluation.humaneval import build_program, leading_imports, run_programs
from chatmodel.runtime import UserError

ARC_ROWS = [
    {"id": str(n), "question": f"{n} plus {n}?", "choices": {"text": ["1", "2", str(2 * n)], "label": labels}}
    | {"answerKey": labels[2]}
    for n, labels in enumerate([["A", "B", "C"], ["1", "2", "3"], ["A", "B", "C"], ["A", "B", "C"]], start=3)
]
MMLU_ROWS = [
    {"question": f"What is {n}?", "subject": "numbers", "choices": ["a", "b", str(n), "d"], "answer": 2}
    for n in range(3)
]
GSM8K_ROWS = [
    {"question": f"What is {n} + 1?", "answer": f"It is <<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"} for n in (1, 2)
]
HUMANEVAL_ROWS = [
    {
        "task_id": f"HumanEval/{n}",
        "prompt": f"import math\n\n\ndef add_{n}(x):\n    '''Add {n} to x.'''\n",
        "entry_point": f"add_{n}",
        "canonical_solution": f"    return x + {n}\n",
        "test": f"def check(candidate):\n    assert candidate(1) == {n + 1}\n",
    }
    for n in (1, 2)
]


@pytest.fixture
def folder(tmp_path):
    files = {
        "arc_easy_test": ARC_ROWS,
        "arc_challenge_test": ARC_ROWS[:2],
        "mmlu_test": MMLU_ROWS,
        "gsm8k_test": GSM8K_ROWS,
        "humaneval_test": HUMANEVAL_ROWS,
    }
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "words_alpha.txt").write_text("banana\ncat\ndog\n")
    return tmp_path


@pytest.mark.parametrize("batch_tokens", [1, 300, 100_000])
def test_letters_are_those_of_plain_logits(chat_model, tokenizer, batch_tokens):
    letters = [["A", "B", "C", "D"], ["1", "2"], ["B", "D"], ["A", "B", "C", "D"], ["A", "B", "C"]]
    conversations = [
        ask_multiple_choice("why " * (3 * n + 1), allowed, ["x"] * len(allowed), answer=allowed[0])
        for n, allowed in enumerate(letters)
    ]
    chosen = choose_letters(chat_model, tokenizer, conversations, letters, batch_tokens=batch_tokens)
    for messages, allowed, letter in zip(conversations, letters, chosen, strict=True):
        with torch.no_grad():
            logits = chat_model(torch.tensor([render_prompt(tokenizer, messages[:-1])]), use_cache=False).logits
        scores = {letter: logits[0, -1, tokenizer.convert_tokens_to_ids(letter)].item() for letter in allowed}
        assert letter == max(scores, key=scores.get)
    assert len(set(chosen)) > 1


def test_a_prompt_beyond_the_context_loses_its_end_but_not_the_turn(chat_model, tokenizer):
    long = ask_multiple_choice("why " * 400, ["A", "B"], ["x", "y"], answer="A")
    ids = render_prompt(tokenizer, long[:-1])
    assert len(ids) > 256
    assert cut_prompt(ids, 256, hard_limit=256) == [*ids[:255], ids[-1]]
    assert cut_prompt(ids, None) == ids
    cut = cut_prompt(ids, 256)
    assert cut == [*ids[:256], tokenizer.convert_tokens_to_ids("<|assistant_start|>")]
    assert choose_letters(chat_model, tokenizer, [long], [["A", "B"]], batch_tokens=64)[0] in "AB"


def test_letters_of_several_tokens_are_refused(tokenizer):
    assert find_letter_ids(tokenizer, {"A", "4"}) == {t: tokenizer.convert_tokens_to_ids(t) for t in "A4"}
    with pytest.raises(UserError, match="tokens of the letter 2024"):
        find_letter_ids(tokenizer, {"2024"})


def script_replies(monkeypatch, tokenizer, script):
    """Let generation answer a prompt with what `script` says to its text."""

    def generate(model, _, prompts, **settings):
        return [[tokenizer.encode(script(tokenizer.decode(ids)), add_special_tokens=False)] for ids in prompts]

    monkeypatch.setattr(chatcore, "generate_replies", generate)


def test_all_six_tasks_give_chatcore(monkeypatch, chat_model, tokenizer, folder):
    def script(prompt):
        if "def add_" in prompt:
            return "```python\ndef add_1(x):\n    return math.floor(x) + 1\n```"  # the other function is missing
        return "#### 2" if "What is 1 + 1?" in prompt else "#### 0"

    script_replies(monkeypatch, tokenizer, script)
    limits = ChatLimits(batch_tokens=500)
    result = evaluate_chatcore(chat_model, tokenizer, folder=folder, limits=limits, run_generated_code=True)
    tasks = result["tasks"]
    assert list(tasks) == ["ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee"]
    assert {name: task["n"] for name, task in tasks.items()} == {
        "ARC-Easy": 4,
        "ARC-Challenge": 2,
        "MMLU": 3,
        "GSM8K": 2,
        "HumanEval": 2,
        "SpellingBee": 256,
    }
    assert tasks["GSM8K"]["accuracy"] == tasks["HumanEval"]["accuracy"] == 0.5
    assert tasks["HumanEval"]["stderr"] == pytest.approx(math.sqrt(0.125))
    assert 0 < tasks["SpellingBee"]["accuracy"] < 0.2  # a random letter that is not in the word
    for name, task in tasks.items():
        baseline = BASELINES[name]
        assert task["centered"] == pytest.approx((task["accuracy"] - baseline) / (1 - baseline))
    assert result["chatcore"] == pytest.approx(sum(task["centered"] for task in tasks.values()) / 6)
    assert result["stderr"] > 0


def test_without_all_six_there_is_no_chatcore(monkeypatch, chat_model, tokenizer, folder):
    script_replies(monkeypatch, tokenizer, lambda prompt: "#### 3")
    (folder / "gsm8k_test.jsonl").unlink()
    (folder / "words_alpha.txt").unlink()
    result = evaluate_chatcore(chat_model, tokenizer, folder=folder, limits=ChatLimits(max_per_task=2))
    assert result["chatcore"] is None
    assert result["stderr"] is None
    assert result["max_per_task"] == 2
    tasks = result["tasks"]
    assert "data absent" in tasks["GSM8K"]["not_run"]
    assert "openai/gsm8k" in tasks["GSM8K"]["how"]
    assert "words_alpha.txt" in tasks["SpellingBee"]["how"]
    assert tasks["HumanEval"]["how"] == "evaluate again with `--run_generated_code`"
    assert [tasks[name]["n"] for name in ("ARC-Easy", "ARC-Challenge", "MMLU")] == [2, 2, 2]
    with pytest.raises(UserError, match="max_per_task is -1"):
        evaluate_chatcore(chat_model, tokenizer, folder=folder, limits=ChatLimits(max_per_task=-1))


def test_prompts_that_leave_no_room_count_as_wrong(chat_model, tokenizer, caplog):
    conversations = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": "#### 1"}]
        for text in ("hi", "why " * 400)
    ]
    limits = ChatLimits(max_new_tokens=3)
    short, long = write_replies(chat_model, tokenizer, conversations, limits=limits, label="made up")
    assert short != ""
    assert long == ""
    assert "1 of 2 prompts do not fit" in caplog.text


def test_programs_from_replies():
    row = HUMANEVAL_ROWS[0] | {
        "prompt": "# a comment\nfrom typing import List\n\nimport os\ndef f():\n    import re\n"
    }
    assert leading_imports(row["prompt"]) == "from typing import List\nimport os"
    tail = f"{row['test']}\ncheck(add_1)"
    head = "from typing import List\nimport os"
    assert build_program(row, " code ") == f"{head}\n\ncode\n\n{tail}"
    reply = "Here:\n```python\nfirst\n```\nor\n```\nsecond\n```"
    assert build_program(row, reply) == f"{head}\n\nfirst\n\n{tail}"


def test_the_reference_solutions_pass_and_broken_ones_fail():
    programs = [build_program(row, row["prompt"] + row["canonical_solution"]) for row in HUMANEVAL_ROWS]
    programs.append(build_program(HUMANEVAL_ROWS[0], "def add_1(x):\n    return x"))
    programs.append(build_program(HUMANEVAL_ROWS[0], "import sys\nsys.exit(0)"))
    assert [result.success for result in run_programs(programs)] == [True, True, False, False]


@pytest.mark.data
def test_all_reference_solutions_of_humaneval_pass(data_root):
    from chatmodel.conversations.datasets import load_task_rows

    rows = load_task_rows("HumanEval", "test", data_root / "chatcore")
    programs = [build_program(row, row["prompt"] + row["canonical_solution"]) for row in rows]
    assert all(result.success for result in run_programs(programs))
    assert len(programs) == 164
