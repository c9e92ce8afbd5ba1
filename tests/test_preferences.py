"""Pairs of replies: read in every form, rendered as in SFT, and learnt from as DPO's formula says."""

import importlib.util
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model
from peft import PeftModel

from chatmodel import LORA_TARGETS
from chatmodel.checkpoint import save_model_folder
from chatmodel.conversations.render import render_conversation, render_prompt
from chatmodel.generation import generate_replies
from chatmodel.posttraining import load_stage_model
from chatmodel.preferences import (
    COLUMNS,
    PairCollator,
    convert_pair,
    hold_out,
    measure_preferences,
    open_pairs,
    render_pairs,
    score_pairs,
)
from chatmodel.runs import Run
from chatmodel.runtime import UserError, read_json, write_json
from chatmodel.scaling import plan_run
from chatmodel.tokenizer import SPECIAL_TOKENS, calculator_table

RECIPE = Path(__file__).parents[1] / "recipes" / "dpo.py"
ASK = {"role": "user", "content": "Hi"}
GOOD, BAD = {"role": "assistant", "content": "Hello"}, {"role": "assistant", "content": "No"}
SUM = {"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}, {"type": "text", "text": "#### 2"}


def say(role: str, text: str) -> dict:
    return {"role": role, "content": text}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "Hello", "rejected": "No"},
        {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [ASK], "chosen": GOOD["content"], "rejected": [BAD]},
        {"prompt": "Hi", "chosen": [ASK, GOOD], "rejected": [ASK, BAD], "score": 3},
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    ],
)
def test_forms_of_a_pair(row):
    pair = convert_pair(row)
    assert (pair.prompt, pair.chosen, pair.rejected) == ([ASK], [GOOD], [BAD])


def test_the_prompt_is_what_both_share():
    start = [say("system", "Be kind."), ASK, GOOD, say("user", "More")]
    tails = [[GOOD, say("user", "So?"), GOOD], [BAD]]
    pair = convert_pair({"chosen": start + tails[0], "rejected": start + tails[1]})
    assert (pair.prompt, [pair.chosen, pair.rejected]) == (start, tails)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"prompt": "Hi", "chosen": "Hello"}, r"no pair of replies in it \(found: prompt, chosen\)"),
        (["Hi"], "found: list"),
        ({"chosen": "Hello", "rejected": "No"}, "in 'chosen', message 1 is from 'assistant'"),
        ({"prompt": "Hi", "chosen": "Hello", "rejected": " "}, r"in 'rejected', message 2 .* is empty"),
        ({"prompt": "Hi", "chosen": 3, "rejected": "No"}, "'chosen' is 3, neither a text nor"),
        ({"prompt": "Hi", "chosen": "No", "rejected": "No"}, "are the same, so there is nothing to prefer"),
        ({"chosen": [ASK, GOOD], "rejected": [ASK, GOOD, ASK, BAD]}, "is the beginning of the other"),
        ({"chosen": [ASK, GOOD], "rejected": [say("user", "Ho"), GOOD]}, "differ in message 1, which is not"),
        ({"chosen": [ASK, GOOD, ASK], "rejected": [ASK, BAD]}, "'chosen' does not end with a reply"),
        ({"prompt": [GOOD], "chosen": "Hello", "rejected": "No"}, "message 1 is from 'assistant'"),
    ],
)
def test_wrong_pairs_are_named(row, complaint):
    with pytest.raises(UserError, match=complaint):
        convert_pair(row)


def write_rows(path: Path, rows: list) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_ids_and_masks_are_those_of_sft(tokenizer, tmp_path):
    """User text stays text, and what the calculator wrote is not trained."""
    evil = "".join(SPECIAL_TOKENS)
    call = {"role": "assistant", "content": list(SUM)}
    row = {"prompt": evil, "chosen": [call], "rejected": evil}
    source = open_pairs(write_rows(tmp_path / "a.jsonl", [row]))
    (found,), counts = render_pairs(source, tokenizer, max_length=256)
    prompt = [say("user", evil)]
    assert found["prompt_ids"] == render_prompt(tokenizer, prompt)
    for key, reply in (("chosen", call), ("rejected", say("assistant", evil))):
        whole = render_conversation(tokenizer, [*prompt, reply])
        assert found["prompt_ids"] + found[f"{key}_ids"] == whole.input_ids
        assert [0] * len(found["prompt_ids"]) + found[f"{key}_mask"] == whole.mask
    assert 0 in found["chosen_mask"]
    assert counts == {"rows": 1, "tokens": sum(len(found[key]) for key in COLUMNS[:3]) + len(found["prompt_ids"])} | {
        "skipped": 0,
        "too_long": 0,
    }


def test_pairs_are_skipped_or_refused(tokenizer, tmp_path):
    good = {"prompt": "Hi", "chosen": "Hello", "rejected": "No"}
    path = write_rows(tmp_path / "a.jsonl", [good, good | {"rejected": "Hello"}, good | {"prompt": "word " * 99}])
    with pytest.raises(UserError, match=r"a\.jsonl, row 2: 'chosen' and 'rejected' are the same"):
        render_pairs(open_pairs(path), tokenizer, max_length=64)
    rows, counts = render_pairs(open_pairs(path, skip_invalid=True), tokenizer, max_length=64, skip_invalid=True)
    assert len(rows) == 1
    assert (counts["skipped"], counts["too_long"]) == (1, 1)
    with pytest.raises(
        UserError, match=r"none of 3 pairs can be trained on \(1 invalid, 2 longer than max_length=5\)"
    ):
        render_pairs(open_pairs(path), tokenizer, max_length=5, skip_invalid=True)
    with pytest.raises(UserError, match="does not exist"):
        open_pairs(str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="one pair is too few"):
        hold_out(rows, 1)


def test_a_generated_task_prefers_right_replies(tokenizer):
    rows, counts = render_pairs(open_pairs("Arithmetic", rows=20), tokenizer, max_length=256)
    assert counts["rows"] == 20
    answers = [
        [tokenizer.decode(row[key]).rpartition("####")[2] for key in ("chosen_ids", "rejected_ids")] for row in rows
    ]
    assert all(chosen != rejected for chosen, rejected in answers)
    train, held_out = hold_out(rows, 100)
    assert (len(train), len(held_out)) == (16, 4)


def test_agreement_is_counted():
    scores = np.array([[-2.0, -3.0, 4, 2], [-5.0, -4.0, 5, 2], [-1.0, -9.0, 1, 9]])
    assert measure_preferences(scores) == {"n": 3, "accuracy": 2 / 3, "accuracy_per_token": pytest.approx(2 / 3)}
    reference = np.array([[-2.0, -2.0, 4, 2], [-5.0, -5.0, 5, 2], [-1.0, -1.0, 1, 9]])
    measured = measure_preferences(scores, reference=reference)
    assert (measured["reward_accuracy"], measured["reward_margin"]) == (2 / 3, pytest.approx((1 - 1 + 8) / 3))


@pytest.fixture(scope="module")
def recipe():
    """The module of recipes/dpo.py."""
    spec = importlib.util.spec_from_file_location("recipe_dpo", RECIPE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path, tokenizer):
    """A run with a finished SFT stage: a random model of two layers."""
    run = Run(tmp_path / "run")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    sizes = {"vocab_size": len(tokenizer), "num_hidden_layers": 2, "max_position_embeddings": 256}
    model = make_model(**sizes, **ids, calculator=calculator_table(tokenizer))
    save_model_folder(model, tokenizer, run.folder("sft"), card=[])
    write_json(run.folder("sft") / "plan.json", plan_run(4, vocab_size=512).as_dict())
    run.begin("sft", inputs=(), settings={}).finish({})
    return run


def build(recipe, run, *, lora_rank=None, **settings):
    """A trainer as the recipe builds it, and its rows."""
    training = recipe.PreferenceConfig(
        **{"output_dir": str(run.run_dir / "out"), "beta": 0.5, "max_length": 256, "report_to": "none", "seed": 1}
        | {"per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 2, "max_steps": 4, "use_cpu": True}
        | settings
    )
    args = recipe.PreferenceArguments(run_dir=run.run_dir, mixed_precision="no", lr_fraction=0.05, lora_rank=lora_rank)
    model, tokenizer = load_stage_model(run.folder("sft"))
    rows, _ = render_pairs(open_pairs("Arithmetic", rows=16), tokenizer, max_length=256)
    return recipe.build_trainer(args, training, run, model, tokenizer, rows), rows


def test_the_loss_and_the_references_are_dpos_formula(recipe, run):
    trainer, rows = build(recipe, run, precompute_ref_log_probs=True)
    pad = trainer.processing_class.pad_token_id
    reference = score_pairs(trainer.model.eval(), rows, pad_token_id=pad, batch_size=3)
    (one,) = score_pairs(trainer.model, rows.select([5]), pad_token_id=pad, batch_size=1)
    np.testing.assert_allclose(one, reference[5], rtol=1e-5)
    # by hand, from logits of the one conversation alone
    ids = torch.tensor([rows[5]["prompt_ids"] + rows[5]["rejected_ids"]])
    logps = trainer.model(ids).logits[0, :-1].double().log_softmax(-1)
    kept = [0] * len(rows[5]["prompt_ids"]) + rows[5]["rejected_mask"]
    by_hand = sum(logps[n - 1, ids[0, n]].item() for n in range(1, ids.shape[1]) if kept[n])
    assert reference[5, 1] == pytest.approx(by_hand, rel=1e-5)
    for column, name in enumerate(("ref_chosen_logps", "ref_rejected_logps")):
        np.testing.assert_allclose(trainer.train_dataset[name], reference[:, column], rtol=1e-5)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    policy = score_pairs(trainer.model, rows, pad_token_id=pad, batch_size=16)
    margins = torch.tensor((policy - reference)[:4, 0] - (policy - reference)[:4, 1])
    batch = PairCollator(pad)([trainer.train_dataset[n] for n in range(4)])
    loss = trainer.compute_loss(trainer.model, batch)
    assert loss.item() == pytest.approx(-torch.nn.functional.logsigmoid(0.5 * margins).mean().item(), rel=1e-4)


def test_the_reference_of_an_adapter_is_the_model_without_it(recipe, run):
    trainer, rows = build(recipe, run, lora_rank=4)
    assert trainer.ref_model is None, "one model is held, not two"
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    pad = trainer.processing_class.pad_token_id
    reference = score_pairs(load_stage_model(run.folder("sft"))[0].eval(), rows, pad_token_id=pad, batch_size=16)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if name in trained:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    policy = score_pairs(trainer.model.eval(), rows, pad_token_id=pad, batch_size=16)
    assert abs(policy - reference).max() > 0.1
    margins = torch.tensor((policy - reference)[:4, 0] - (policy - reference)[:4, 1])
    loss = trainer.compute_loss(trainer.model, PairCollator(pad)([rows[n] for n in range(4)]))
    assert loss.item() == pytest.approx(-torch.nn.functional.logsigmoid(0.5 * margins).mean().item(), rel=1e-4)


def test_a_resumed_run_ends_with_the_same_weights(recipe, run):
    whole, _ = build(recipe, run)
    whole.train()
    resumed, _ = build(recipe, run)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    weights = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    margins = [entry["rewards/margins"] for entry in whole.state.log_history if "rewards/margins" in entry]
    assert margins[0] == 0


@pytest.fixture
def start(run, monkeypatch, capsys):
    """Run the recipe with options; the sentence it ends with, if any."""

    def start(**options):
        arguments = [f"--{key}={value}" for key, value in ({"max_length": 64} | options).items()]
        plain = [f"--run_dir={run.run_dir}", "--use_cpu", "--mixed_precision=no"]  # one precision a process
        monkeypatch.setattr(sys, "argv", ["dpo.py", *plain, *arguments])
        try:
            runpy.run_path(str(RECIPE), run_name="__main__")
        except SystemExit:
            return next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
        return None

    return start


def test_the_recipe_raises_the_margin_and_leaves_a_chat_model(start, run, tmp_path):
    rows = [{"prompt": f"Say {n}", "chosen": "Yes", "rejected": "No"} for n in range(40)]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    options = {"preferences": path, "max_steps": 8, "per_device_train_batch_size": 4, "lr_fraction": 0.05}
    options |= {"max_length": 64, "report_to": "none", "logging_steps": 1, "seed": 3}
    assert start(**options) is None
    metrics = read_json(run.result_path("dpo"))["metrics"]
    after = metrics["held_out"]["after"]
    assert after["reward_accuracy"] == 1.0
    assert after["reward_margin"] > 0.1
    assert metrics["history"][-1]["margins"] > metrics["history"][0]["margins"] == 0
    assert metrics["trained_pairs"] == 32
    assert "DPO on 32 pairs of pairs.jsonl" in (run.folder("dpo") / "README.md").read_text()
    model, tokenizer = load_stage_model(run.folder("dpo"))
    assert generate_replies(model, tokenizer, [render_prompt(tokenizer, [ASK])], max_new_tokens=4)
    assert start(**options) is None, "finished, nothing to do"
    assert "made with lr_fraction=0.05" in start(**options | {"lr_fraction": 0.1})


def test_an_adapter_is_left_beside_the_merged_model(start, run, tmp_path):
    rows = [{"prompt": f"Say {n}", "chosen": "Yes", "rejected": "No"} for n in range(40)]
    options = {"preferences": write_rows(tmp_path / "pairs.jsonl", rows), "max_steps": 8, "lr_fraction": 1}
    options |= {"lora_rank": 4, "per_device_train_batch_size": 4, "max_length": 64, "report_to": "none", "seed": 3}
    assert start(**options) is None
    metrics = read_json(run.result_path("dpo"))["metrics"]
    assert metrics["lora"]
    assert metrics["held_out"]["after"]["reward_margin"] > 0.1
    before, merged = (load_stage_model(run.folder(stage))[0].eval() for stage in ("sft", "dpo"))
    after = dict(merged.named_parameters())
    moved = {name.split(".")[-2] for name, weight in before.named_parameters() if not torch.equal(weight, after[name])}
    assert moved
    assert moved <= set(LORA_TARGETS)
    ids = torch.arange(20)[None]
    before_logits = before(ids).logits
    adapted = PeftModel.from_pretrained(before, run.folder("adapters") / "dpo").eval()
    logits = merged(ids).logits
    torch.testing.assert_close(adapted(ids).logits, logits, atol=1e-4, rtol=1e-4)  # sums in another order
    assert (before_logits - logits).abs().max() > 0.1


def test_what_the_recipe_refuses(start, tmp_path):
    assert "lora_rank=0" in start(preferences="Arithmetic", lora_rank=0)
    assert "lora_scale=0.0" in start(preferences="Arithmetic", lora_rank=4, lora_scale=0)
    assert "no preferences are given" in start()
    assert "beta=0.0 must be greater than 0" in start(preferences="Arithmetic", beta=0)
    assert "loss_type='best' must be one of sigmoid, hinge" in start(preferences="Arithmetic", loss_type="best")
    assert "max_steps=0 would train nothing" in start(preferences="Arithmetic", max_steps=0)
    assert "lr_fraction=0.0 must be greater than 0" in start(preferences="Arithmetic", lr_fraction=0)
    assert "is more than the model's context" in start(preferences="Arithmetic", max_length=100_000)
    assert "held_out=0" in start(preferences="Arithmetic", held_out=0)
    assert "source='base'" in start(preferences="Arithmetic", source="base")
    assert "needs stage rl" in start(preferences="Arithmetic", source="rl")
    assert "none.jsonl does not exist" in start(preferences=tmp_path / "none.jsonl")
    path = write_rows(tmp_path / "pairs.jsonl", [{"prompt": "Hi", "chosen": "Hello"}])
    assert f"{path}, row 1: the row has no pair" in start(preferences=path)
    assert "lr_fraction=0.0 must be" in start(preferences="Arithmetic", rows=10, lr_fraction=0)
