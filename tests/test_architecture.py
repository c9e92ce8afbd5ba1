"""The shape of the package: imports point downwards, the model folder stands alone, no file grows long."""

import ast
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "chatmodel"
LAYERS = [  # lowest first
    {"launchers"},
    {"model", "runtime", "execution", "vllm_plugin"},
    {"arguments", "environment", "model_folders", "progress"},
    {"runs", "scaling", "tokenizer", "devices", "workers"},
    {"kernels", "data", "optim", "tokenizer_comparison"},
    {"losses", "attention", "training_layers", "gradients"},
    {"conversations", "checkpoint", "train_step", "decoding"},
    {"trainer_callbacks"},
    {"estimate", "probes", "generation", "rewards", "posttraining", "preferences", "export"},
    {"evaluation", "rollouts", "chat"},
    {"training", "problems"},
    {"finetuning", "reinforcement"},
    {"report"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
LINES = 400


def imported_modules(path: Path) -> set[str]:
    """Top names of the chatmodel modules that `path` imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == "chatmodel":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").startswith("chatmodel."):
            names.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("chatmodel.")}
    return names


def test_imports_point_downwards():
    for path in PACKAGE.rglob("*.py"):
        module = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if module == "__init__":
            continue
        assert module in RANK, f"give chatmodel.{module} a place in LAYERS"
        for target in imported_modules(path) - {module, "GPTConfig", "GPTForCausalLM", "GPTModel"}:
            assert RANK.get(target, 99) < RANK[module], f"{path} may not import chatmodel.{target}"


def test_relative_imports_only_in_model():
    for path in PACKAGE.rglob("*.py"):
        relative = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and n.level]
        assert not relative or path.parent.name == "model", path


def test_no_file_is_long():
    for folder in ("chatmodel", "recipes", "scripts"):
        for path in (ROOT / folder).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= LINES, path


def test_public_names():
    import chatmodel

    assert chatmodel.__all__ == [
        "LORA_TARGETS", "GPTConfig", "GPTForCausalLM", "GPTForSequenceClassification", "GPTModel"
    ]  # fmt: skip
    assert all(hasattr(chatmodel, name) for name in chatmodel.__all__)


def test_importing_the_package_registers_the_model(tmp_path):
    """In a process of its own: here other tests may have imported the package already."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "chatmodel", "num_hidden_layers": 2}))
    code = "import chatmodel, sys; from transformers import AutoConfig, AutoModel, AutoModelForCausalLM\n"
    code += "c = AutoConfig.from_pretrained(sys.argv[1]); c.vocab_size = 8; c.hidden_size = 12; c.head_dim = 2\n"
    code += "print(type(c).__name__, type(AutoModel.from_config(c)).__name__, end=' ')\n"
    code += "print(type(AutoModelForCausalLM.from_config(c)).__name__)"
    output = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert output.stdout.split() == ["GPTConfig", "GPTModel", "GPTForCausalLM"]
