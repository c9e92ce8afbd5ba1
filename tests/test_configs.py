"""Every configuration file in recipes/configs is understood by its recipe, and mixtures name known data sets."""

import importlib.util
import sys
from pathlib import Path

import pytest
import yaml

from chatmodel.arguments import parse_arguments
from chatmodel.conversations.mixtures import parse_mixture
from chatmodel.conversations.stand_ins import choose_sources

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "recipes" / "configs"
RECIPES = {
    "tokenizer": ("train_tokenizer", ["TokenizerArguments"]),
    "pretrain": ("pretrain", ["PretrainArguments"]),
    "midtrain": ("sft", ["ConversationArguments", "ConversationConfig"]),
    "sft": ("sft", ["ConversationArguments", "ConversationConfig"]),
    "grpo": ("grpo", ["RewardArguments", "RewardConfig"]),
    "eval": ("eval", ["EvalArguments"]),
    "dpo": ("dpo", ["PreferenceArguments", "PreferenceConfig"]),
}
FILES = sorted(path for path in CONFIGS.glob("*/*.yaml") if path.parent.name != "accelerate")


def load_recipe(name):
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_recipe_understands_its_file(path, monkeypatch, tmp_path):
    recipe, names = RECIPES[path.stem]
    module = load_recipe(recipe)
    monkeypatch.setattr(sys, "argv", [recipe, "--config", str(path), "--run_dir", str(tmp_path)])
    arguments = parse_arguments(*(getattr(module, name) for name in names))
    settings = yaml.safe_load(path.read_text())
    settings.pop("report_to", None)  # Transformers reads "none" as an empty list
    for key, value in settings.items():
        found = [getattr(part, key) for part in arguments if hasattr(part, key)]
        assert found, key
        assert str(value) in [str(getattr(each, "value", each)) for each in found]
    for mixture in ("mixture", "validation_mixture"):
        if getattr(arguments[0], mixture, None):
            assert parse_mixture(choose_sources(getattr(arguments[0], mixture), None))


def test_every_preset_is_whole():
    for preset in ("cpu", "smoke", "gpu", "seed", "h200", "rtx5090", "gpu24gb", "node8"):
        # DPO is beside the pipeline, and a preset need not have it.
        assert {path.stem for path in (CONFIGS / preset).glob("*.yaml")} - {"dpo"} == set(RECIPES) - {"dpo"}, preset


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "multi_node"])
def test_accelerate_files_name_what_they_are_for(name):
    text = (CONFIGS / "accelerate" / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    settings = yaml.safe_load(text)
    assert settings["num_processes"] > 1
    if name == "fsdp2":
        from chatmodel import GPTForCausalLM

        wrapped = settings["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"]
        assert wrapped in GPTForCausalLM._no_split_modules
