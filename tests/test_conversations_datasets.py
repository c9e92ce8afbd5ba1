import gzip
import json

import pytest
from datasets import Dataset

from chatmodel.conversations import datasets as known
from chatmodel.conversations.answers import reference_answer
from chatmodel.conversations.datasets import (
    PUBLIC_TASKS,
    DataAbsent,
    load_task_rows,
    load_word_list,
    read_hub_rows,
    task_letters,
    task_messages,
)
from chatmodel.conversations.render import check_messages
from chatmodel.runtime import UserError

ARC = {
    "question": "What melts ice?",
    "choices": {"text": ["heat", "cold", "dark"], "label": ["1", "2", "3"]},
    "answerKey": "1",
}
MMLU = {"question": "2 + 2?", "subject": "arithmetic", "choices": ["3", "4", "5", "6"], "answer": 1}


def test_arc_puts_the_letter_behind_its_choice():
    assert task_messages("ARC-Easy", ARC) == [
        {
            "role": "user",
            "content": "Multiple Choice question: What melts ice?\n- heat=1\n- cold=2\n- dark=3\n\n"
            "Respond only with the letter of the correct answer.",
        },
        {"role": "assistant", "content": "1"},
    ]
    assert task_letters("ARC-Easy", ARC) == ["1", "2", "3"]


@pytest.mark.parametrize("row", [MMLU, {"train": MMLU}])
def test_mmlu_also_wrapped_as_on_the_hub(row):
    question, reply = task_messages("MMLU", row)
    assert question["content"] == (
        "Multiple Choice question: 2 + 2?\n- 3=A\n- 4=B\n- 5=C\n- 6=D\n\n"
        "Respond only with the letter of the correct answer."
    )
    assert reply["content"] == "B"
    assert task_letters("MMLU", row) == ["A", "B", "C", "D"]


def test_gsm8k_annotations_become_calculator_calls():
    answer = "Weng earns 12/60 = $<<12/60=6/30=0.2>>0.2 per minute.\nIn 50: <<50*0.2=10>><<10>>10.\n#### 1,010"
    messages = task_messages("GSM8K", {"question": "How much?", "answer": answer})
    assert messages[0] == {"role": "user", "content": "How much?"}
    assert messages[1]["content"] == [
        {"type": "text", "text": "Weng earns 12/60 = $"},
        {"type": "python", "text": "12/60=6/30"},
        {"type": "python_output", "text": "0.2"},
        {"type": "text", "text": "0.2 per minute.\nIn 50: "},
        {"type": "python", "text": "50*0.2"},
        {"type": "python_output", "text": "10"},
        {"type": "text", "text": ""},
        {"type": "python", "text": "10"},
        {"type": "python_output", "text": ""},
        {"type": "text", "text": "10.\n#### 1,010"},
    ]
    assert reference_answer(messages) == "1010"


def test_humaneval_and_smoltalk():
    row = {"prompt": "def f():", "canonical_solution": "    return 1"}
    assert task_messages("HumanEval", row)[1]["content"] == "def f():\n    return 1"
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert task_messages("SmolTalk", {"messages": talk, "source": "x"}) == talk


@pytest.mark.parametrize(
    ("name", "row", "complaint"),
    [
        ("ARC-Easy", ARC | {"answerKey": "A"}, "'A' is none of the letters 1, 2, 3"),
        ("MMLU", MMLU | {"choices": ["3"]}, "4 letters for 1 choices"),
        ("MMLU", MMLU | {"answer": 7}, "has not the columns of MMLU"),
        ("GSM8K", {"text": "x"}, "has not the columns of GSM8K"),
    ],
)
def test_rows_of_another_form_are_refused(name, row, complaint):
    with pytest.raises(UserError, match=complaint):
        task_messages(name, row)


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl", ".parquet"])
def test_rows_come_in_the_order_of_a_shuffle_with_seed_42(tmp_path, ending):
    rows = [{"question": f"{n}?", "answer": f"#### {n}"} for n in range(100)]
    path = tmp_path / f"gsm8k_test{ending}"
    if ending == ".parquet":
        Dataset.from_list(rows).to_parquet(str(path))
    else:
        text = "\n".join(map(json.dumps, rows)).encode()
        path.write_bytes(gzip.compress(text) if ending.endswith("gz") else text)
    found = list(load_task_rows("GSM8K", "test", tmp_path))
    assert found == list(Dataset.from_list(rows).shuffle(seed=42))
    assert found != rows


def test_absent_data_says_how_to_get_it(tmp_path):
    with pytest.raises(DataAbsent) as caught:
        load_task_rows("MMLU", "test", tmp_path)
    assert caught.value.how == "`hf download cais/mmlu --repo-type dataset` where the Hub can be reached"
    assert f"mmlu_test.jsonl(.gz) is not in {tmp_path}" in caught.value.reason
    assert caught.value.reason in str(caught.value)
    assert caught.value.how in str(caught.value)


def test_unknown_names_and_splits(tmp_path):
    with pytest.raises(UserError, match="no known data set 'ARC'; known are ARC-Easy"):
        load_task_rows("ARC", "test", tmp_path)
    with pytest.raises(UserError, match="GSM8K has no split 'validation'; it has train, test"):
        load_task_rows("GSM8K", "validation", tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        load_task_rows("GSM8K", "test", tmp_path / "none")


def test_the_hub_is_asked_for_the_right_subset(monkeypatch):
    asked = []

    class Api:
        def dataset_info(self, hub, timeout):
            return None

    def load(hub, subset, split):
        asked.append((hub, subset, split))
        return Dataset.from_list([{"question": "?"}])

    monkeypatch.setattr(known, "HfApi", Api)
    monkeypatch.setattr(known, "load_dataset", load)
    for name, split in [("ARC-Challenge", "test"), ("MMLU", "train"), ("MMLU", "test"), ("HumanEval", "test")]:
        load_task_rows(name, split)
    load_task_rows("SmolTalk", "train")
    assert asked == [
        ("allenai/ai2_arc", "ARC-Challenge", "test"),
        ("cais/mmlu", "auxiliary_train", "train"),
        ("cais/mmlu", "all", "test"),
        ("openai/openai_humaneval", None, "test"),
        ("HuggingFaceTB/smol-smoltalk", None, "train"),
    ]
    assert all(task.held_out in task.splits for task in PUBLIC_TASKS.values())


def test_a_split_that_the_hub_has_not(monkeypatch):
    class Api:
        def dataset_info(self, hub, timeout):
            return None

    def load(hub, subset, split):
        raise ValueError('Unknown split "dev". Should be one of\n["train"].')

    monkeypatch.setattr(known, "HfApi", Api)
    monkeypatch.setattr(known, "load_dataset", load)
    with pytest.raises(DataAbsent, match=r"ann/talk \(dev\) is absent: .*Unknown split"):
        read_hub_rows("ann/talk", "dev")


def test_word_list(tmp_path):
    with pytest.raises(DataAbsent, match="no folder is given; to get it: curl"):
        load_word_list(None)
    with pytest.raises(DataAbsent, match="is not in"):
        load_word_list(tmp_path)
    (tmp_path / "words_alpha.txt").write_bytes(b"b\r\na\r\nb\r\n")
    assert load_word_list(tmp_path) == ["b", "a", "b"]
    (tmp_path / "words_alpha.txt.gz").write_bytes(gzip.compress(b"zebra\n"))
    assert load_word_list(tmp_path) == ["zebra"]


@pytest.mark.data
def test_every_row_of_the_chatcore_files_can_be_asked(data_root):
    sizes = {
        ("ARC-Easy", "train"): 2251,
        ("ARC-Easy", "test"): 2376,
        ("ARC-Challenge", "train"): 1119,
        ("ARC-Challenge", "test"): 1172,
        ("MMLU", "validation"): 1531,
        ("MMLU", "test"): 14042,
        ("GSM8K", "train"): 7473,
        ("GSM8K", "test"): 1319,
        ("HumanEval", "test"): 164,
    }
    for (name, split), size in sizes.items():
        rows = load_task_rows(name, split, data_root / "chatcore")
        assert len(rows) == size
        for row in rows:
            messages = task_messages(name, row)
            check_messages(messages)
            assert name != "GSM8K" or reference_answer(messages) is not None
    assert len(load_word_list(data_root / "chatcore")) == 370_105
