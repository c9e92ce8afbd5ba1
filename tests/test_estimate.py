"""Predictions: worked by hand, held against real tensors, files and measured runs, and what is refused."""

import importlib.util
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from chatmodel import GPTForCausalLM
from chatmodel.checkpoint import write_checkpoint
from chatmodel.devices import Device, describe_device, describe_named
from chatmodel.estimate import memory, prediction
from chatmodel.estimate.memory import (
    checkpoint_bytes,
    largest_batch,
    peak_bytes,
    predict_disk,
    predict_memory,
    split_parameters,
)
from chatmodel.estimate.prediction import check_resources, predict_run
from chatmodel.estimate.setup import Setup
from chatmodel.estimate.speed import Rates, Speed, predict_from_rates, predict_speed, time_model, time_small_models
from chatmodel.runs import Run
from chatmodel.runtime import UserError, read_json
from chatmodel.scaling import plan_run
from chatmodel.train_step import TrainStep

CPU = torch.device("cpu")
H200 = Setup(device=describe_named("H200"), precision="bf16", compiled=True, device_batch_size=4)
HERE = Setup(device=describe_device(CPU), precision="no", compiled=False, device_batch_size=2, data_is_ready=True)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps the precision of a process's first Accelerator."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def plan():
    """Depth 2, width 128: 24 x 128^2 = 393,216 weights in matrices and 12,800 in each of three vocabulary tables."""
    return plan_run(2, vocab_size=100, sequence_length=128, train_tokens=40_960, total_batch_tokens=4096)


def build_step(plan, precision: str, rows: int) -> TrainStep:
    torch.manual_seed(0)
    model = GPTForCausalLM(plan.model_config())
    return TrainStep(
        model, plan, Accelerator(mixed_precision=precision, cpu=True), device_batch_size=rows, compile=False
    )


def test_memory_worked_by_hand(plan):
    others = plan.parameters - 393_216  # three tables and what is small
    optimizer = 12 * others + 8 * 393_216  # two momenta and a master, or one and a master
    parts = predict_memory(plan, H200)
    assert parts == {
        "weights": 2 * plan.parameters,
        "gradients": 4 * plan.parameters,
        "optimizer": optimizer,
        "activations": 512 * 128 * (2 * memory.COMPILED_LAYER_VALUES + memory.COMPILED_VALUES) * 2,
        "logits": 512 * 100 * 2,
        "head": 100 * 128 * 8,
        "update": 24 * (2 * 4 * 128 * 128),
        "validation": 8192 * 100 * 2 * 3,  # its batches are its own
    }
    micro_batch = parts["activations"] + parts["logits"] + parts["head"]
    assert peak_bytes(parts) == 6 * plan.parameters + optimizer + micro_batch


@pytest.mark.parametrize(
    ("recipe", "depth", "vocab_size", "measured"), [("seed", 10, 65_536, 11.4), ("chatmodel", 12, 32_768, 17.0)]
)
def test_memory_foretells_what_was_measured(recipe, depth, vocab_size, measured):
    """GiB of one H200 with 32 rows at once (docs/experiments.md)."""
    plan = plan_run(depth, vocab_size=vocab_size, recipe=recipe)
    predicted = peak_bytes(predict_memory(plan, replace(H200, device_batch_size=32))) / 2**30
    assert predicted / memory.MEMORY_FACTOR < measured < memory.MEMORY_FACTOR * predicted


def test_optimizer_state_is_divided_among_devices(plan):
    alone, two = (predict_memory(plan, replace(H200, num_devices=n)) for n in (1, 2))
    assert two["optimizer"] == alone["optimizer"] // 2
    assert two["weights"] == alone["weights"]
    divided = predict_memory(plan, replace(H200, num_devices=2, divided=True))
    assert divided["weights"] == alone["weights"] // 2
    # Under FSDP each rank moves whole matrices, with all of their momentum (`MuonAdamW._step_muon`).
    muon = 4 * split_parameters(plan.model_config())[1]
    assert divided["optimizer"] == muon + (alone["optimizer"] - muon) // 2
    assert divided["update"] == alone["update"]


def test_disk_worked_by_hand(plan):
    checkpoint = 2 * plan.parameters + 12 * (plan.parameters - 393_216) + 8 * 393_216
    disk = predict_disk(plan, H200)
    assert disk["checkpoints"] == 3 * checkpoint
    assert disk["final model"] == 2 * plan.parameters
    assert disk["token store"] == int((1.05 * 40_960 + H200.eval_tokens) * 2.02)
    cropped = predict_disk(plan, replace(H200, store_share=1.5))
    assert cropped["token store"] == int((1.5 * 40_960 + H200.eval_tokens) * 2.02)
    large = plan_run(2, vocab_size=70_000, sequence_length=128, train_tokens=40_960, total_batch_tokens=4096)
    assert predict_disk(large, H200)["token store"] == int((1.05 * 40_960 + H200.eval_tokens) * 4.02)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_checkpoint_is_as_large_as_predicted(precision, tmp_path):
    plan = plan_run(2, vocab_size=300, sequence_length=32, train_tokens=4096, total_batch_tokens=64)
    step = build_step(plan, precision, rows=2)
    ids = torch.randint(300, (2, 32))
    step.accumulate({"input_ids": ids, "shift_labels": ids})
    step.finish(0)
    folder = write_checkpoint(tmp_path, 1, step.state_dict())
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size == pytest.approx(checkpoint_bytes(plan, replace(HERE, precision=precision)), rel=0.05)


@pytest.mark.parametrize(("depth", "precision"), [(2, "no"), (5, "bf16")])
def test_activations_are_those_kept_for_the_backward_pass(depth, precision):
    rows, length = 4, 256
    plan = plan_run(
        depth, vocab_size=128, sequence_length=length, head_dim=64, total_batch_tokens=rows * length, max_steps=1
    )
    step = build_step(plan, precision, rows)
    weights = {parameter.data_ptr() for parameter in step.model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(128, (rows, length))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step.loss_module(ids, ids)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    predicted = predict_memory(plan, replace(HERE, precision=precision, device_batch_size=rows))["activations"]
    assert predicted / 1.25 < measured < 1.25 * predicted


def test_speed_worked_by_hand(plan):
    """Two layers (S: 32 of 128 positions, L), rates of 1e9: every part of the sum."""
    setup, rates = H200, Rates(1e9, 2e9, 1e8)
    speed = predict_from_rates(plan, setup, rates, 1.3, "by hand")
    positions = (32 - 32**2 / 256) + (128 - 128**2 / 256)
    products = 6 * 393_216 / 1e9 + 6 * 12_800 / 2e9
    attention = 14 * 128 * positions / (0.72 * 1e9)
    traffic = (2 * 128 * (57 + 130) + 10 * 100) / 1e8
    assert speed.token_seconds == pytest.approx(products + attention + traffic)
    others = plan.parameters - 393_216
    update = (28 * others + 40 * 393_216) / 1e8 + 30 * 128 * 393_216 / 1e9
    assert speed.update_seconds == pytest.approx(update)


@pytest.mark.parametrize(
    ("device", "depth", "vocab_size", "measured"),
    [
        ("H200", 10, 65_536, 638_800),
        ("H200", 12, 32_768, 555_200),
        ("H200", 20, 65_536, 154_400),
        ("RTX 5090", 10, 65_536, 228_000),
    ],
)
def test_datasheets_foretell_what_was_measured(device, depth, vocab_size, measured):
    """Tokens a second of nanochat of October 2025 (karpathy/nanochat@c75fe54), of its report and on an H200."""
    plan = plan_run(depth, vocab_size=vocab_size, recipe="seed")
    setup = replace(H200, device=describe_named(device), device_batch_size=32)
    assert predict_run(plan, setup).tokens_per_second == pytest.approx(measured, rel=0.15)


def test_time_and_cost_worked_by_hand(plan):
    """Ten steps of 4,096 tokens: 0.001 s a token and 0.904 s an update make 5 s a step."""
    setup = replace(H200, eval_every=4, eval_tokens=8192, data_is_ready=True, hourly_rate=7.2)
    found = predict_run(plan, setup, speed=Speed(0.001, 0.904, 1.5, "given"))
    assert found.tokens_per_second == pytest.approx(4096 / 5)
    validation = 4 * 8192 * 0.4 / (4096 / 5)  # after 0, 4, 8 and 10 steps
    assert found.seconds == pytest.approx(
        {"tokenizing": 0, "compiling": prediction.COMPILE_SECONDS, "training": 50, "validation": validation}
    )
    assert found.cost == pytest.approx((50 + validation + prediction.COMPILE_SECONDS) * 0.002)
    assert found.mfu == pytest.approx(4096 / 5 * plan.flops_per_token / 989e12)
    assert found.disk_bytes - found.disk_kept_bytes == checkpoint_bytes(plan, setup)
    assert found.as_dict()["peak_memory_bytes"] == peak_bytes(predict_memory(plan, setup))


def test_several_devices_share_the_work(plan):
    speed = Speed(0.001, 0.0, 1.5, "given")
    found = predict_run(plan, replace(H200, num_devices=2), speed=speed)
    assert found.tokens_per_second == pytest.approx(2 * 1000 * 0.93)


def narrow_plan(depth: int):
    plan = plan_run(depth, vocab_size=64, sequence_length=32, total_batch_tokens=64, max_steps=3)
    return replace(plan, model=plan.model | {"hidden_size": 32, "num_attention_heads": 1})


def test_small_models_are_timed_and_leave_nothing(caplog):
    plan = narrow_plan(6)
    before = torch.get_rng_state()
    speed = predict_speed(plan, HERE)
    assert torch.equal(torch.get_rng_state(), before)
    assert caplog.records == []
    assert "2 and 4 layers" in speed.basis
    assert 0 < speed.token_seconds < 1
    assert 0 < speed.update_seconds < 10
    assert "steps of this model" in time_small_models(narrow_plan(3), HERE).basis


@pytest.mark.gpu
def test_a_gpu_does_what_was_predicted():
    """Products and copies timed, beside steps of the model; within what a first guess may be off."""
    device = torch.device("cuda", 0)
    plan = plan_run(8, vocab_size=32_768)
    setup = Setup(device=describe_device(device), precision="bf16", compiled=True, device_batch_size=16)
    predicted, happened = predict_run(plan, setup), predict_run(plan, setup, speed=time_model(plan, setup))
    assert 0.5 < happened.tokens_per_second / predicted.tokens_per_second < 2
    assert 0.6 < happened.peak_memory_bytes / predicted.peak_memory_bytes < 1.4


def test_the_largest_batch_fits(plan):
    device = Device("small", 20 * 2**20, None, None)
    setup = replace(H200, device=device)
    rows = largest_batch(plan, setup)
    assert rows in (1, 2, 4, 8, 16, 32)
    small, large = (peak_bytes(predict_memory(plan, replace(setup, device_batch_size=n))) for n in (rows, 2 * rows))
    assert small <= device.memory_bytes / memory.MEMORY_FACTOR < large
    assert largest_batch(plan, replace(setup, device=Device("tiny", 1000, None, None))) is None


def refuse(plan, memory_bytes: int, run_dir, *, present=None, rows: int = 32) -> None:
    setup = replace(H200, device=Device("card", memory_bytes, None, present), device_batch_size=rows)
    check_resources(plan, setup, predict_run(plan, setup, speed=Speed(1e-6, 0.0, 1.5, "given")), Run(run_dir))


def test_too_little_memory_is_refused_with_what_would_fit(plan, tmp_path):
    needed = int(memory.MEMORY_FACTOR * peak_bytes(predict_memory(plan, H200))) + 1  # for four rows
    with pytest.raises(UserError, match=r"device_batch_size=32 needs about .* set device_batch_size to 4 "):
        refuse(plan, needed, tmp_path)
    with pytest.raises(UserError, match="lower depth"):
        refuse(plan, 2**20, tmp_path, rows=1)


def test_memory_that_may_not_be_enough_is_a_warning(plan, tmp_path, caplog):
    refuse(plan, int(1.1 * peak_bytes(predict_memory(plan, H200))), tmp_path, rows=4)
    assert "may not be enough" in caplog.text


def test_a_full_disk_is_refused_unless_what_is_needed_is_there(plan, tmp_path, monkeypatch, caplog):
    needed = sum(predict_disk(plan, H200).values())
    monkeypatch.setattr(prediction, "free_disk_bytes", lambda folder: needed - 1)
    refuse(plan, 2**40, tmp_path)  # another machine's disk is not this one's
    with pytest.raises(UserError, match=r"free some space .*run_dir"):
        refuse(plan, 2**40, tmp_path, present=CPU)
    Run(tmp_path).folder("data").mkdir()
    (tmp_path / "data" / "tokens.bin").write_bytes(bytes(1000))
    refuse(plan, 2**40, tmp_path, present=CPU)
    assert "will take" in caplog.text


def test_free_space_is_that_of_the_nearest_folder(tmp_path):
    assert prediction.free_disk_bytes(tmp_path / "not" / "yet") == prediction.free_disk_bytes(tmp_path)


def test_bytes_per_token_go_through_what_was_measured():
    assert prediction.bytes_per_token(2048) == pytest.approx(3.31)
    assert prediction.bytes_per_token(32_768) == pytest.approx(4.45)
    assert math.isclose(prediction.bytes_per_token(65_536), 4.735)


@pytest.fixture
def recipe():
    path = Path(__file__).parents[1] / "recipes" / "pretrain.py"
    specification = importlib.util.spec_from_file_location("recipe_pretrain", path)
    module = importlib.util.module_from_spec(specification)
    sys.modules["recipe_pretrain"] = module
    specification.loader.exec_module(module)
    return module


def dry_run(recipe, monkeypatch, run_dir, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--dry_run", "--run_dir", str(run_dir), *options])
    recipe.main()


def test_a_dry_run_for_another_machine_costs_nothing(recipe, monkeypatch, tmp_path, capsys):
    options = ["--device_name", "RTX 4090", "--num_devices", "4", "--hourly_rate", "2.5", "--device_batch_size", "8"]
    run_dir = tmp_path / "run"
    dry_run(recipe, monkeypatch, run_dir, *options, "--plan_json", str(tmp_path / "plan.json"))
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["parameters"].strip() == "286,261,705, vocabulary 32,768"
    assert lines["device"].strip() == "4 x RTX 4090, bf16"
    assert "at $2.50 an hour" in lines["cost"]
    known = read_json(tmp_path / "plan.json")
    assert known["plan"]["parameters"] == 286_261_705
    assert known["prediction"]["num_devices"] == 4
    assert not run_dir.exists()


@pytest.mark.parametrize(("packing", "share"), [("best_fit_whole", 1.05), ("best_fit", 1.5), ("contiguous", 1.05)])
def test_another_machine_makes_the_store_with_its_own_cores(recipe, monkeypatch, tmp_path, packing, share):
    monkeypatch.setattr(recipe, "count_cores", lambda: 2)
    options = ["--device_name", "H200", "--packing", packing, "--plan_json", str(tmp_path / "plan.json")]
    dry_run(recipe, monkeypatch, tmp_path / "run", *options)
    known = read_json(tmp_path / "plan.json")
    tokens = share * known["plan"]["train_tokens"]
    assert known["prediction"]["seconds"]["tokenizing"] == pytest.approx(tokens * 4.45 / (16 * 9e6))
    assert known["prediction"]["disk"]["token store"] == int((tokens + 20 * 2**19) * 2.02)


def test_this_machine_makes_the_store_with_the_cores_there_are(recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(recipe, "count_cores", lambda: 3)
    options = "--depth 2 --head_dim 32 --sequence_length 32 --total_batch_tokens 64 --max_steps 3 --vocab_size 2048"
    options += f" --mixed_precision no --plan_json {tmp_path / 'plan.json'}"
    dry_run(recipe, monkeypatch, tmp_path / "run", *options.split())
    seconds = read_json(tmp_path / "plan.json")["prediction"]["seconds"]["tokenizing"]
    assert seconds == pytest.approx(1.05 * 192 * 3.31 / (3 * 9e6))


def test_a_dry_run_here_times_the_model(recipe, monkeypatch, tmp_path, capsys):
    options = "--depth 2 --head_dim 32 --sequence_length 32 --total_batch_tokens 64 --max_steps 3 --vocab_size 300"
    options += " --device_batch_size 2 --eval_tokens 100 --measure --mixed_precision no"
    dry_run(recipe, monkeypatch, tmp_path, *options.split())
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["known by"].strip().startswith("steps of this model timed on this CPU")
    assert lines["a step is"].strip() == "1 x 2 rows of 32 tokens on 1 device(s)"


@pytest.mark.parametrize(
    ("options", "step"),
    [
        (["--config", "recipes/configs/gpu/pretrain.yaml", "--num_devices", "8"], "1 x 8 rows of 2,048 tokens on 8"),
        (["--depth", "2"], "1 x 16 rows of 2,048 tokens on 1"),
        (["--depth", "8", "--device_batch_size", "5"], "8 x 4 rows of 2,048 tokens on 1"),
    ],
)
def test_rows_that_do_not_fit_are_lowered(recipe, monkeypatch, tmp_path, capsys, options, step):
    monkeypatch.chdir(Path(__file__).parents[1])
    dry_run(recipe, monkeypatch, tmp_path, "--device_name", "H100", *options)
    assert f"a step is:      {step}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--device_name", "abacus"], "'abacus' is not known"),
        (["--device_name", "RTX 4090"], "set device_batch_size to 8"),
        (["--device_name", "H200", "--num_devices", "3"], "256 rows of 2048 tokens, which 3 processes"),
        (["--num_devices", "2"], "num_devices is for --device_name"),
        (["--device_name", "H200", "--measure"], "leave one out"),
        (["--hourly_rate", "-1"], "hourly_rate=-1"),
        (["--packing", "foo"], "packing='foo' is unknown; choose one of best_fit,"),
        (["--on_bad_shard", "foo"], "on_bad_shard='foo' is unknown; choose one of stop,"),
        (["--on_bad_shard", "refetch", "--dataset", "embedded"], "on_bad_shard 'refetch' is for data sets of the Hub"),
        (["--recipe", "best"], "recipe='best' is unknown; choose one of chatmodel,"),
        (["--mixed_precision", "fp16", "--device_name", "H100"], "mixed_precision='fp16' is unknown"),
        (["--dataset", "/nonexistent"], "dataset /nonexistent does not exist"),
        (["--fp8", "true"], "fp8 needs "),
        (["--fp8", "true", "--device_name", "RTX 3090"], "the RTX 3090 has no 8-bit floats"),
        (["--lr_fraction", "-1"], "lr_fraction=-1.0 must be greater than 0"),
        (["--lr_fraction", "nan"], "lr_fraction=nan"),
        (["--lr_fraction", "inf"], "lr_fraction=inf"),
        (["--decay_fraction", "nan"], "decay_fraction=nan"),
        (["--rank_timeout", "inf"], "rank_timeout=inf"),
        (["--window_pattern", "XYZ"], "window_pattern='XYZ' may only hold the letters"),
        (["--head_dim", "31"], "head_dim=31 must be even"),
        (["--seed", "-1"], "seed=-1 must be 0 or more"),
        (["--eval_tokens", "1"], "eval_tokens=1 must be at least 2"),
    ],
)
def test_a_dry_run_refuses(recipe, monkeypatch, tmp_path, options, named):
    with pytest.raises(UserError, match=re.escape(named)):
        dry_run(recipe, monkeypatch, tmp_path, *options, "--total_batch_tokens", str(2**19), "--depth", "16")


def test_what_is_for_a_dry_run_is_refused_without(recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--run_dir", str(tmp_path), "--device_name", "H200"])
    with pytest.raises(UserError, match="device_name is for a dry run"):
        recipe.main()
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--run_dir", str(tmp_path), "--vocab_size", "32768"])
    with pytest.raises(UserError, match="vocab_size is for a dry run"):
        recipe.main()


def test_a_dry_run_chooses_the_batch_it_is_to_find(recipe, monkeypatch, tmp_path, capsys):
    dry_run(recipe, monkeypatch, tmp_path, "--device_name", "RTX 4090", "--auto_batch", "--depth", "16")
    assert " x 8 rows of 2,048 tokens" in capsys.readouterr().out
