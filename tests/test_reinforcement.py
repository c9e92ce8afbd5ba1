"""A step of RL has the published formula's gradient; runs repeat; a stopped one continues to the same weights."""

import importlib.util
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model
from trl import GRPOTrainer

from chatmodel.conversations.render import render_prompt
from chatmodel.conversations.sources import MixtureEntry, open_entry
from chatmodel.evaluation.statistics import pack_decisions
from chatmodel.optim.groups import build_optimizer
from chatmodel.problems import build_problems
from chatmodel.reinforcement.arguments import apply_mode, check_sampling
from chatmodel.reinforcement.micro_batches import mask_choices, split_rows
from chatmodel.reinforcement.results import collect_metrics, collect_samples
from chatmodel.reinforcement.trainer import LearnFromCompletions, SkipEmptySteps
from chatmodel.rewards import reward_task
from chatmodel.rollouts import Completion, Sampler
from chatmodel.runtime import UserError, write_json
from chatmodel.scaling import plan_run
from chatmodel.tokenizer import calculator_table

ROOT = Path(__file__).parents[1]
CALL = "<|python_start|>12+30<|python_end|><|output_start|>42<|output_end|>"
END = "<|assistant_end|>"


def load_recipe():
    """Under a name of its own: its arguments are pickled, and another test loads it too."""
    spec = importlib.util.spec_from_file_location("recipe_grpo_for_rl", ROOT / "recipes" / "grpo.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


grpo = load_recipe()


class Script:
    """A sampler that says what it was told, problem by problem."""

    def __init__(self, model, tokenizer, texts):
        self.replies = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        self.ends, self.tokens = (tokenizer.eos_token_id, tokenizer.bos_token_id), 0

    def sample(self, prompts, place):
        return [Completion(ids) for ids in self.replies]


class Stop(Exception):
    pass


def build(
    tokenizer,
    folder,
    *,
    mode="default",
    sampler=None,
    seed=3,
    tasks="Arithmetic",
    model=None,
    rewards=(reward_task,),
    **settings,
):
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 160, "sliding_window": 24}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    if model is None:
        model = make_model(calculator=calculator_table(tokenizer), **sizes, **ends)
        for parameter in model.parameters():
            parameter.data *= 0.1  # so small that 1e-6 is far above fp32's rounding
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.bos_token_id]
    options = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "num_generations": 4,
        "max_completion_length": 24,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    training = grpo.RewardConfig(output_dir=str(folder / "checkpoints"), seed=seed, **(options | settings))
    apply_mode(training, mode, settings)
    training.dataloader_pin_memory = False
    write_json(folder / "plan.json", plan_run(4, vocab_size=97, sequence_length=64).as_dict())
    limits = {"max_new_tokens": training.max_completion_length, "temperature": 1.0, "rows": 8, "longest_prompt": 100}
    trainer = grpo.RewardTrainer(
        model=model,
        args=training,
        train_dataset=build_problems([tasks], [open_entry(MixtureEntry(tasks, rows=8))], seed=0),
        reward_funcs=list(rewards),
        processing_class=tokenizer,
        mode=mode,
        sampler=sampler(model, tokenizer) if sampler else Sampler(model, tokenizer, seed=seed, **limits),
        plan_folder=folder,
        lr_fraction=0.05,
    )
    trainer.add_callback(SkipEmptySteps(lambda: trainer.nothing_to_learn))
    return trainer


def gradient_of_a_step(trainer):
    found = {}

    def look(args, state, control, model, **kwargs):
        found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        raise Stop

    trainer.callback_handler.callbacks[-1].on_pre_optimizer_step = look
    with pytest.raises(Stop):
        trainer.train()
    return found


def scripted(trainer_options, tokenizer, tmp_path):
    """A trainer whose two problems get four completions each, of every kind there is."""
    rows = build_problems(["Arithmetic"], [open_entry(MixtureEntry("Arithmetic", rows=8))], seed=0)
    first, second = rows[0]["answer"], rows[1]["answer"]
    texts = [
        f"{CALL}#### {first}{END}",
        f"so {CALL} and {CALL} #### 7{END}",
        END,  # says nothing
        f"#### {first} the library of",  # has no end
        f"it is #### {second}<|bos|>",
        f"#### 1{END}",
        f"#### 2{CALL}{END}",
        f"#### {second}{END}",
    ]
    options = {"shuffle_dataset": False, "max_completion_length": 80} | trainer_options
    trainer = build(tokenizer, tmp_path, sampler=lambda m, t: Script(m, t, texts), **options)
    rewards = torch.tensor([1.0, 0, 0, 1, 1, 0, 0, 1])
    return trainer, rows, [tokenizer.encode(text, add_special_tokens=False) for text in texts], rewards


def token_logps(model, prompt, ids):
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return -F.cross_entropy(logits, torch.tensor(ids, dtype=torch.long), reduction="none")


def test_nanochat_mode_has_nanochats_gradient(tokenizer, tmp_path):
    """The published loop (scripts/chat_rl.py@c75fe54) by hand: passes of two, calculator and end masked."""
    trainer, rows, replies, rewards = scripted({"mode": "nanochat"}, tokenizer, tmp_path)
    model, table = trainer.model, trainer.model.config.calculator
    ends = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    num_passes, examples = 2, 2
    for example in range(examples):
        prompt = render_prompt(tokenizer, rows[example]["prompt"])
        group = slice(4 * example, 4 * example + 4)
        advantages = rewards[group] - rewards[group].mean()
        sequences = [ids[:-1] if ids[-1] in ends else ids for ids in replies[group]]
        for number in range(num_passes):
            rows_of_pass = range(2 * number, 2 * number + 2)
            total, num_valid = torch.zeros(()), 0
            for row in rows_of_pass:
                inside = False
                for token, logp in zip(sequences[row], token_logps(model, prompt, sequences[row]), strict=True):
                    inside = inside or token == table["output_start"]
                    if not inside:
                        total, num_valid = total + logp * advantages[row], num_valid + 1
                    inside = inside and token != table["output_end"]
            (-total / (max(num_valid, 1) * num_passes * examples)).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    found = gradient_of_a_step(trainer)
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert largest > 0.1
    assert expected.keys() == found.keys()
    assert max((expected[name] - found[name]).abs().max() for name in found) < 1e-6


def test_the_default_trains_ends_and_only_what_differs(tokenizer, tmp_path):
    """Mean over all trained tokens of the step; a group that earned the same throughout is left out."""
    trainer, rows, replies, rewards = scripted({}, tokenizer, tmp_path)
    trainer.sampler.replies[4:] = [replies[5]] * 4  # all of the second problem wrong
    model, table = trainer.model, trainer.model.config.calculator
    advantages = rewards[:4] - rewards[:4].mean()
    total, count = torch.zeros(()), 0
    for ids, advantage in zip(replies[:4], advantages, strict=True):
        mask = torch.tensor(mask_choices(ids, table, trainer.sampler.ends, train_end=True))
        total = total + (token_logps(model, render_prompt(tokenizer, rows[0]["prompt"]), ids) * mask).sum() * advantage
        count += int(mask.sum())
    (-total / count).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    found = gradient_of_a_step(trainer)
    assert max((expected[name] - found[name]).abs().max() for name in found) < 1e-6
    assert max(gradient.abs().max() for gradient in found.values()) > 0.1


def test_log_probabilities_are_trls(tokenizer, tmp_path):
    trainer, _, _, _ = scripted({}, tokenizer, tmp_path)
    trainer.model.train()
    batch = trainer._generate_and_score_completions([trainer.train_dataset[i // 4] for i in range(8)])
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    options = {"logits_to_keep": batch["completion_ids"].shape[1], "batch_size": 3, "compute_entropy": True}
    expected = GRPOTrainer._get_per_token_logps_and_entropies(trainer, trainer.model, ids, mask, **options)
    found = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, **options)
    scored = batch["completion_mask"].bool()
    for one, other in zip(expected[:2], found[:2], strict=True):
        torch.testing.assert_close(one[scored], other[scored], atol=2e-5, rtol=0)


def test_micro_batches_lose_padding_and_keep_rows():
    batch = {
        "prompt_ids": torch.tensor([[0, 0, 5], [6, 7, 8], [0, 9, 9], [0, 0, 4]]),
        "prompt_mask": torch.tensor([[0, 0, 1], [1, 1, 1], [0, 1, 1], [0, 0, 1]]),
        "completion_ids": torch.tensor([[1, 0, 0], [1, 2, 3], [1, 2, 0], [1, 0, 0]]),
        "completion_mask": torch.tensor([[1, 0, 0], [1, 1, 1], [1, 1, 0], [1, 0, 0]]),
        "advantages": torch.tensor([1.0, 2.0, 3.0, 4.0]),
        "num_items_in_batch": torch.tensor(7),
    }
    wide, narrow = split_rows(batch, [1, 2, 0, 3], 2)
    assert (wide["prompt_ids"].shape, wide["completion_ids"].shape) == ((2, 3), (2, 3))
    assert narrow["prompt_ids"].tolist() == [[5], [4]]
    assert narrow["completion_ids"].tolist() == [[1], [1]]
    assert narrow["advantages"].tolist() == [1, 4]
    assert narrow["num_items_in_batch"] == 7
    first, last = split_rows(batch, [2], 2)
    assert first == {}
    assert last["prompt_ids"].tolist() == [[9, 9]]


def test_masks():
    table = {"output_start": 10, "output_end": 11}
    assert mask_choices([1, 10, 5, 11, 2, 9], table, (9,), train_end=True) == [1, 0, 0, 0, 1, 1]
    assert mask_choices([1, 10, 5, 11, 2, 9], table, (9,), train_end=False) == [1, 0, 0, 0, 1, 0]
    assert mask_choices([1, 2], table, (9,), train_end=False) == [1, 1]
    assert mask_choices([9], table, (9,), train_end=False) == [0]


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def lucky(completions, **columns):
    """Rewards that differ although the model of the test knows nothing."""
    return [float(len(c[0]["content"]) % 3) for c in completions]


@pytest.mark.slow
def test_runs_repeat_and_a_stopped_one_continues_to_the_same_weights(tokenizer, tmp_path):
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}

    def run(folder, checkpoint=None):
        folder.mkdir()
        trainer = build(tokenizer, folder, **settings)
        trainer.reward_funcs = [lucky]
        start = weights(trainer)
        if checkpoint is not None:
            torch.rand(7)  # another past must not matter
            shutil.copytree(checkpoint, folder / "checkpoints" / checkpoint.name)
        trainer.train(resume_from_checkpoint=checkpoint and str(folder / "checkpoints" / checkpoint.name))
        return trainer, start

    first, start = run(tmp_path / "first")
    second, _ = run(tmp_path / "second")
    resumed, _ = run(tmp_path / "resumed", tmp_path / "first" / "checkpoints" / "checkpoint-2")
    expected = weights(first)
    assert any((start[name] != value).any() for name, value in expected.items())
    for other in (second, resumed):
        assert all((value == expected[name]).all() for name, value in weights(other).items())
        assert collect_samples(other.state.log_history) == collect_samples(first.state.log_history)
        assert [e.get("reward") for e in other.state.log_history] == [e.get("reward") for e in first.state.log_history]
    history = [entry for entry in first.state.log_history if "reward" in entry]
    assert all(entry["rollout_tokens_per_second"] > 0 for entry in history)
    # In fp32 on both sides all that differs is the token that only the calculator may write.
    assert all(entry["sampling_logp_difference"] < 5e-3 for entry in history)
    assert len(collect_samples(first.state.log_history)) == 6


def test_nothing_to_learn_moves_nothing_and_is_said_once(tokenizer, tmp_path, caplog):
    trainer = build(tokenizer, tmp_path, max_steps=12, max_completion_length=2)
    trainer.reward_funcs = [lambda completions, **columns: [0.1] * len(completions)]  # no exact number
    start = weights(trainer)
    with caplog.at_level("WARNING", logger="chatmodel"):
        trainer.train()
    said = [record.getMessage() for record in caplog.records if "nothing to" in record.getMessage()]
    assert len(said) == 1
    assert "an easier task, or sample hotter" in said[0]
    assert all((value == start[name]).all() for name, value in weights(trainer).items())


def test_several_rewards_are_weighed_and_recorded_each(tokenizer, tmp_path):
    def same(completions, **columns):
        return [4.0] * len(completions)

    trainer = build(tokenizer, tmp_path, rewards=[lucky, same], max_steps=2, reward_weights=[1.0, 0.25])
    trainer.train()
    measured = {"decisions": pack_decisions([False]), "correct": 0, "n": 1, "accuracy": 0.0, "stderr": 0.0}
    measured["completions"] = []
    metrics = collect_metrics(trainer, {"task": ["Arithmetic"]}, measured, measured)
    assert metrics["rewards"] == {"lucky": 1.0, "same": 0.25}
    assert len(metrics["history"]) == 2
    for record in metrics["history"]:
        assert record["rewards/same"] == 4
        assert record["reward"] == pytest.approx(record["rewards/lucky"] + 1)
    assert {shown["reward"] for shown in metrics["completions_sampled"]} <= {1.0, 2.0, 3.0}


def test_a_penalty_on_the_distance_is_recorded(tokenizer, tmp_path):
    make = build(tokenizer, tmp_path)
    make.model.save_pretrained(tmp_path / "model")
    model = type(make.model).from_pretrained(tmp_path / "model")
    trainer = build(tokenizer, tmp_path, model=model, beta=0.1, max_steps=2)
    trainer.reward_funcs = [lucky]
    trainer.train()
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kl[0] == pytest.approx(0, abs=1e-5)
    assert kl[1] > 1e-4


def test_modes_and_what_they_exclude():
    training = SimpleNamespace()
    apply_mode(training, "nanochat", {"loss_type": "bnpo", "num_generations": 16})
    assert (training.loss_type, training.scale_rewards, training.beta) == ("bnpo", "none", 0.0)
    with pytest.raises(UserError, match="mode=nanochat stands for loss_type=bnpo, but loss_type=dapo"):
        apply_mode(training, "nanochat", {"loss_type": "dapo"})
    with pytest.raises(UserError, match="mode='seed' must be one of default, nanochat"):
        apply_mode(training, "seed", {})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"use_vllm": True}, "vllm is not installed here"),
        ({"temperature": 0.0}, "temperature=0.0 must be finite and greater than 0"),
        ({"min_p": 0.1}, "min_p is not known to the decoding engine"),
        ({"repetition_penalty": 1.1}, "repetition_penalty is not known"),
    ],
)
def test_sampling_the_engine_cannot_do_is_refused(setting, message, monkeypatch):
    monkeypatch.setattr("chatmodel.reinforcement.arguments.importlib.util.find_spec", lambda name: None)
    training = grpo.RewardConfig(output_dir="x", report_to="none", use_cpu=True)
    for key, value in setting.items():
        setattr(training, key, value)
    with pytest.raises(UserError, match=message):
        check_sampling(training)


def test_the_optimizer_leaves_weights_without_gradients_alone():
    model = make_model()
    plan = plan_run(4, vocab_size=97, sequence_length=64)
    optimizer = build_optimizer(model, plan.groups, lr_fraction=1.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    SkipEmptySteps(lambda: True).on_pre_optimizer_step(None, None, None, model=model)
    optimizer.step()
    assert all((old == new).all() for old, new in zip(before, model.parameters(), strict=True))


def test_the_mixin_is_before_trls_trainer():
    """So that what it says wins."""
    order = grpo.RewardTrainer.__mro__
    assert order.index(LearnFromCompletions) < order.index(GRPOTrainer)
