"""What is measured while a model is fine-tuned: loss by source, bits per byte, samples, a few questions of tasks."""

import json

import pytest
import torch
from conftest import make_model
from datasets import Dataset
from tiny_finetuning import LENGTH, build_trainer, make_conversations

from chatmodel.evaluation.bits_per_byte import bits_per_byte
from chatmodel.finetuning.evaluation import TaskCheck, ValidationLoss, answer_samples
from chatmodel.finetuning.loss import PackedLoss
from chatmodel.finetuning.results import describe_evaluation, gather_metrics
from chatmodel.finetuning.rows import ConversationRows
from chatmodel.runtime import UserError
from chatmodel.tokenizer import token_byte_lengths


def chat_conversations(tokenizer):
    texts = [f"What is {n} and {n * 7}? They are numbers." for n in range(10, 22)]
    ids = [[tokenizer.bos_token_id, *tokenizer.encode(text)][: LENGTH * 2] for text in texts]
    labels = [[-100] * 4 + row[4:] for row in ids]
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "source": ["A", "A", "B"] * 4})


def test_losses_by_source_and_bits_per_byte(tokenizer, chat_model):
    conversations = chat_conversations(tokenizer)
    rows = ConversationRows(conversations, length=80, batch_size=2, pad_token_id=tokenizer.pad_token_id)
    loss = PackedLoss(chat_model, batch_size=2, length=80, compiled=False)
    found = ValidationLoss(rows, tokenizer).measure(loss)
    loss.remove()
    nats, tokens = {"A": 0.0, "B": 0.0}, {"A": 0, "B": 0}
    for row in conversations:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        trained = int((labels[:, 1:] != -100).sum())
        nats[row["source"]] += chat_model(ids, labels=labels, use_cache=False).loss.item() * trained
        tokens[row["source"]] += trained
    assert found["sources"] == pytest.approx({name: nats[name] / tokens[name] for name in nats}, rel=1e-5)
    assert found["loss"] == pytest.approx(sum(nats.values()) / sum(tokens.values()), rel=1e-5)
    batches = [
        {"input_ids": torch.tensor([row["input_ids"][:-1]]), "shift_labels": torch.tensor([row["labels"][1:]])}
        for row in conversations
    ]
    expected = bits_per_byte(chat_model, batches, token_byte_lengths(tokenizer))
    assert found["bits_per_byte"] == pytest.approx(expected, rel=1e-5)


def test_samples_are_greedy_answers_and_leave_training_on(tokenizer, chat_model):
    loss = PackedLoss(chat_model, batch_size=2, length=80, compiled=False)
    samples = answer_samples(loss, tokenizer)
    assert chat_model.training
    loss.remove()
    assert not chat_model.training
    assert samples[0]["messages"][0]["content"] == "Who are you?"
    assert all(sample["messages"][1]["role"] == "assistant" for sample in samples)


@pytest.fixture
def arc_folder(tmp_path):
    rows = [
        {
            "question": f"What is {n}?",
            "choices": {"text": ["one", "two", "three", "four"], "label": ["A", "B", "C", "D"]},
            "answerKey": "ABCD"[n % 4],
        }
        for n in range(6)
    ]
    (tmp_path / "arc_easy_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_tasks_are_asked_when_due_and_reach_the_metrics(tmp_path, tokenizer, arc_folder):
    conversations = chat_conversations(tokenizer)
    rows = ConversationRows(conversations, length=LENGTH * 2, batch_size=2, pad_token_id=tokenizer.pad_token_id)
    tasks = TaskCheck(every=2, examples=6, tasks=["ARC-Easy"], folder=arc_folder)
    tasks.check()
    trainer = build_trainer(
        tmp_path,
        tokenizer,
        model=make_model(vocab_size=len(tokenizer), max_position_embeddings=256),
        conversations=make_conversations(),
        validation=ValidationLoss(rows, tokenizer),
        tasks=tasks,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
    )
    outcome = trainer.train()
    trainer.finish()
    metrics = gather_metrics(trainer, outcome, [{"name": "A", "rows": 40}])
    assert [entry["step"] for entry in metrics["evaluations"]] == [1, 2, 3]
    assert [list(entry["sources"]) for entry in metrics["evaluations"]] == [["A", "B"]] * 3
    asked = [entry["accuracies"]["ARC-Easy"] for entry in metrics["evaluations"] if "accuracies" in entry]
    assert asked == [pytest.approx(asked[0])]
    assert asked[0] in [n / 6 for n in range(7)]
    assert metrics["validation_loss"] == metrics["evaluations"][-1]["validation_loss"]
    assert sorted({sample["step"] for sample in metrics["samples"]}) == [1, 2, 3]
    assert [entry["step"] for entry in metrics["history"]] == [1, 2, 3]
    assert metrics["tokens_per_second"] > 0
    json.dumps(metrics)


def test_an_evaluation_in_our_names():
    entry = {
        "step": 5,
        "eval_loss": 2.0,
        "eval_bits_per_byte": 0.5,
        "eval_A_loss": 1.0,
        "eval_ARC-Easy_accuracy": 0.25,
    }
    found = describe_evaluation(entry)
    assert (found["step"], found["validation_loss"], found["validation_bpb"]) == (5, 2.0, 0.5)
    assert (found["sources"], found["accuracies"]) == ({"A": 1.0}, {"ARC-Easy": 0.25})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"every": 0}, "chatcore_every=0"),
        ({"every": 5, "examples": 0}, "chatcore_examples=0"),
        ({"every": 5, "tasks": ["HumanEval"]}, "HumanEval"),
        ({"every": 5, "tasks": ["ARC-Hard"]}, "ARC-Hard"),
    ],
)
def test_tasks_that_cannot_be_asked(options, named):
    with pytest.raises(UserError, match=named):
        TaskCheck(**options).check()
