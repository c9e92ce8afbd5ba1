"""CORE and ChatCORE through lm_eval: the same answers as our own scorer's, example by example."""

import csv
import io
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from test_evaluation_chatcore import ARC_ROWS, GSM8K_ROWS, HUMANEVAL_ROWS, MMLU_ROWS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from chatmodel.checkpoint import save_model_folder
from chatmodel.evaluation import lm_eval_tasks
from chatmodel.evaluation.bundle import BUNDLE_URL
from chatmodel.evaluation.chat_tasks import BASELINES, load_chat_examples, render_chat_prompts
from chatmodel.evaluation.chatcore import ChatLimits, evaluate_chatcore, write_replies
from chatmodel.evaluation.core import evaluate_core
from chatmodel.evaluation.lm_eval_tasks import settings
from chatmodel.evaluation.scoring import find_hard_limit
from chatmodel.evaluation.statistics import unpack_decisions
from chatmodel.runtime import UserError

TASKS = Path(lm_eval_tasks.__file__).parent
LABELS = [
    name.removeprefix("chatmodel_core_")
    for name in yaml.safe_load((TASKS / "chatmodel_core.yaml").read_text())["task"]
]
QUESTIONS = ["What is a class?", "How is a list sorted?", "Where do modules come from?", "When is a name bound?"]
EXAMPLES = {
    # A choice that is the beginning of another, equal choices, a trailing blank, a name of a special token.
    "multiple_choice": [
        {"query": question, "choices": choices, "gold": gold}
        for question, choices, gold in zip(
            QUESTIONS,
            [["a type", "a type of type"], ["in place", "in place", "never"], ["a file", "<|bos|> "], ["x", "by y"]],
            [1, 1, 0, 1],
            strict=True,
        )
    ],
    "schema": [
        {"context_options": [question, f"{question} And why?"], "continuation": "It is so", "gold": n % 2}
        for n, question in enumerate(QUESTIONS)
    ],
    # Longer than the 256 positions of the models below, which the rotary one goes beyond and the other does not.
    "language_modeling": [
        {"context": "the the " * 150 * n + question, "continuation": " the the"}
        for n, question in enumerate(QUESTIONS)
    ],
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """All 22 labels, the three kinds in turn, with one example shown before each."""
    folder = tmp_path_factory.mktemp("bundle")
    (folder / "eval_data").mkdir()
    entries, table = [], io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["Eval Task", "Task Category", "Random baseline"])
    for n, label in enumerate(LABELS):
        kind = list(EXAMPLES)[n % 3]
        entries.append({"label": label, "dataset_uri": f"{kind}.jsonl", "num_fewshot": [n % 2], "icl_task_type": kind})
        writer.writerow([label, "none", 10 * (n % 4)])
    for kind, examples in EXAMPLES.items():
        (folder / "eval_data" / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in examples))
    (folder / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": entries}))
    (folder / "eval_meta_data.csv").write_text(table.getvalue())
    return folder


@pytest.fixture(scope="module")
def chatcore(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chatcore")
    rows = {"arc_easy": ARC_ROWS, "arc_challenge": ARC_ROWS[:2], "mmlu": MMLU_ROWS, "gsm8k": GSM8K_ROWS}
    for name, examples in (rows | {"humaneval": HUMANEVAL_ROWS}).items():
        (folder / f"{name}_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in examples))
    (folder / "words_alpha.txt").write_text("banana\ncat\ndog\n")
    return folder


@pytest.fixture(scope="module")
def own(chat_model, tokenizer, tmp_path_factory):
    """A model of ours: rotary, so nothing is cut."""
    folder = tmp_path_factory.mktemp("own") / "model"
    save_model_folder(chat_model, tokenizer, folder, card=["made by a test"])
    return folder, chat_model, tokenizer


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A GPT-2 with 256 learned positions, a word tokenizer without BOS, and a chat template of its own."""
    folder = tmp_path_factory.mktemp("foreign")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(QUESTIONS * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    torch.manual_seed(0)
    sizes = {"n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tokenizer.bos_token = "<|end|>"  # as recipes/eval.py fills it in
    return folder, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer


def run_lm_eval(folder, group, options=None, **metadata):
    """(results, decisions by task) of a group."""
    arguments = {"pretrained": str(folder), "dtype": "float32"} | (options or {})
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=arguments | metadata)
    output = simple_evaluate(
        "hf",
        model_args=arguments,
        tasks=[group],
        task_manager=manager,
        device="cpu",
        batch_size=3,
        confirm_run_unsafe_code=True,
    )
    decisions = {name: [sample["acc"] == 1.0 for sample in samples] for name, samples in output["samples"].items()}
    return output, decisions


def check_same(output, decisions, expected, prefix, score):
    for name, task in expected["tasks"].items():
        key = prefix + name.lower().replace("-", "_")
        assert decisions[key] == unpack_decisions(task["decisions"], task["n"]), name
        assert output["results"][key]["acc,none"] == pytest.approx(task["accuracy"])
        assert output["results"][key]["centered,none"] == pytest.approx(task["centered"])
    assert output["groups"][prefix.rstrip("_")]["centered,none"] == pytest.approx(score)


@pytest.mark.parametrize("kind", ["own", "foreign"])
def test_core(kind, bundle, request):
    folder, model, tokenizer = request.getfixturevalue(kind)
    expected = evaluate_core(model, tokenizer, bundle, max_per_task=3, max_length=find_hard_limit(model))
    output, decisions = run_lm_eval(folder, "chatmodel_core", eval_bundle=str(bundle), max_per_task=3)
    assert len(expected["tasks"]) == 22
    assert output["groups"]["chatmodel_core"]["centered_dclm,none"] == pytest.approx(expected["core_dclm"])
    check_same(output, decisions, expected, "chatmodel_core_", expected["core"])
    assert 0 < sum(map(sum, decisions.values())) < 66
    assert output["n-shot"]["chatmodel_core_jeopardy"] == 1


@pytest.mark.parametrize("kind", ["own", "foreign"])
def test_chatcore(kind, chatcore, request, caplog):
    folder, model, tokenizer = request.getfixturevalue(kind)
    limits = ChatLimits(max_per_task=4, max_new_tokens=12)
    expected = evaluate_chatcore(model, tokenizer, folder=chatcore, limits=limits, run_generated_code=True)
    output, decisions = run_lm_eval(
        folder, "chatmodel_chatcore", chatcore=str(chatcore), max_per_task=4, max_new_tokens=12
    )
    check_same(output, decisions, expected, "chatmodel_chatcore_", expected["chatcore"])
    # A random model answers no open question, so the replies themselves are compared.
    messages = [example.messages for example in load_chat_examples("GSM8K", folder=chatcore)]
    replies = write_replies(model, tokenizer, messages, limits=limits, label="GSM8K")
    ids = [tokenizer.encode(reply, add_special_tokens=False) for reply in replies]
    assert [sample["filtered_resps"] for sample in output["samples"]["chatmodel_chatcore_gsm8k"]] == [
        [tokenizer.decode(reply, skip_special_tokens=True)] for reply in ids
    ]
    assert all(replies)
    assert "encodes a prompt otherwise" not in caplog.text


def test_programs_are_only_run_when_confirmed(own, chatcore):
    manager = TaskManager(
        include_path=str(TASKS),
        include_defaults=False,
        metadata={"pretrained": str(own[0]), "chatcore": str(chatcore)},
    )
    with pytest.raises(ValueError, match="marked as unsafe"):
        simple_evaluate("dummy", tasks=["chatmodel_chatcore_humaneval"], task_manager=manager)


def test_the_folder_is_found_and_complete(capsys):
    runpy.run_module("chatmodel.evaluation.lm_eval_tasks", run_name="__main__")  # what `python -m` does
    assert capsys.readouterr().out == f"{TASKS}\n"
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    assert manager.all_groups == ["chatmodel_chatcore", "chatmodel_core"]
    assert len(manager.all_subtasks) == 22 + len(BASELINES)
    for group in manager.all_groups:
        members = yaml.safe_load((TASKS / f"{group}.yaml").read_text())["task"]
        assert set(members) <= set(manager.all_subtasks)


def test_where_data_is_looked_for(bundle, chatcore, tmp_path, monkeypatch):
    def load(name, **metadata):
        TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata).load(name)

    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(settings, "find_bundle", lambda place: asked.append(place) or bundle)
    load("chatmodel_core_copa", max_per_task=2)
    (tmp_path / "eval_bundle.zip").touch()
    load("chatmodel_core_piqa", max_per_task=3)
    assert asked == [BUNDLE_URL, "eval_bundle.zip"]
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"missing\.zip does not exist"):
        load("chatmodel_core_copa", eval_bundle="missing.zip")
    with pytest.raises(UserError, match="need the model's tokenizer"):
        load("chatmodel_chatcore_arc_easy", chatcore=str(chatcore))


def test_our_recipe_asks_a_foreign_model_by_its_own_template(foreign, chatcore, tmp_path, monkeypatch):
    recipe = Path(__file__).parents[1] / "recipes" / "eval.py"
    options = {"--model": foreign[0], "--stage": "sft", "--chatcore": chatcore, "--output": tmp_path / "result.json"}
    options |= {"--max_per_task": 2, "--max_new_tokens": 4, "--num_skill_examples": 2, "--mixed_precision": "no"}
    arguments = [str(part) for pair in options.items() for part in pair]
    monkeypatch.setattr(sys, "argv", [str(recipe), *arguments, "--run_generated_code"])
    runpy.run_path(str(recipe), run_name="__main__")
    metrics = json.loads((tmp_path / "result.json").read_text())["metrics"]
    assert all(task["n"] == 2 for task in metrics["chatcore"]["tasks"].values())
    assert metrics["skills"]["Arithmetic"]["n"] == 2
    assert metrics["samples"][0]["messages"][1]["role"] == "assistant"


def test_a_tokenizer_without_turns_is_refused(foreign):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(foreign[0])
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="neither chatmodel's control tokens nor a chat template"):
        render_chat_prompts(tokenizer, [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]])


@pytest.mark.data
@pytest.mark.parametrize("kind", ["own", "foreign"])
def test_the_real_benchmarks(kind, data_root, request):
    """All 28 tasks on real questions; prompts are cut, because so small a vocabulary makes them very long."""
    folder, model, tokenizer = request.getfixturevalue(kind)
    zipped, chatcore = data_root / "eval_bundle.zip", data_root / "chatcore"
    expected = evaluate_core(model, tokenizer, zipped, max_per_task=20, max_length=256)
    output, decisions = run_lm_eval(
        folder, "chatmodel_core", {"max_length": 256}, eval_bundle=str(zipped), max_per_task=20
    )
    check_same(output, decisions, expected, "chatmodel_core_", expected["core"])
    limits = ChatLimits(max_per_task=20, max_new_tokens=16)
    answers = evaluate_chatcore(model, tokenizer, folder=chatcore, limits=limits, run_generated_code=True)
    output, decisions = run_lm_eval(
        folder, "chatmodel_chatcore", chatcore=str(chatcore), max_per_task=20, max_new_tokens=16
    )
    check_same(output, decisions, answers, "chatmodel_chatcore_", answers["chatcore"])
