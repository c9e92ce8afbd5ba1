"""An export or import reaches its folder whole and proven, or leaves nothing but one clear sentence."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import chatmodel.export.exports as exports
from chatmodel.checkpoint import save_model_folder
from chatmodel.export.exports import export_model
from chatmodel.export.imports import import_transformers_nanochat
from chatmodel.posttraining import load_stage_model
from chatmodel.runtime import UserError, entry_point, read_json
from chatmodel.tokenizer import calculator_table, convert_tokens

ROOT = Path(__file__).parents[1]
PLAIN = {"window_pattern": "L", "value_embeddings": False, "residual_scalars": False, "backout": False}
SETTINGS = {
    "transformers-nanochat": PLAIN | {"qk_scale": 1.0},
    "compat": PLAIN | {"gated_mlp": True, "hidden_act": "silu", "final_logit_softcapping": None},
}
QUESTION = [{"role": "user", "content": "What is 12 plus 30?"}]


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """A model folder for each target."""
    root, made = tmp_path_factory.mktemp("models"), {}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for target, settings in SETTINGS.items():
        sizes = {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 128,
            "calculator": calculator_table(tokenizer),
        }
        model = make_model(**sizes, **settings, **ids)
        for parameter in model.parameters():
            parameter.data *= 0.5
        made[target] = root / target
        save_model_folder(model, tokenizer, made[target], card=["Pretrained on 12 words."])
    return made


@pytest.mark.parametrize(("target", "name"), [("compat", "Qwen3"), ("transformers-nanochat", "NanoChat")])
def test_an_export_is_a_whole_folder_of_transformers_own(target, name, folders, tokenizer, tmp_path):
    output = tmp_path / "out" / "exported"
    parity = export_model(folders[target], output, target=target, tolerance=1e-5)
    assert parity.max_logit_error <= 1e-5
    assert parity.logits_std > 0.1
    ours, _ = load_stage_model(folders[target])
    theirs = AutoModelForCausalLM.from_pretrained(output).eval()
    assert type(theirs).__name__ == f"{name}ForCausalLM"
    again = AutoTokenizer.from_pretrained(output)
    prompt = again.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert torch.equal(
        prompt["input_ids"],
        tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
            "input_ids"
        ],
    )
    ours.config.calculator = None
    settings = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(theirs.generate(**prompt, **settings), ours.generate(**prompt, **settings))
    assert theirs.generation_config.eos_token_id == [tokenizer.eos_token_id, tokenizer.bos_token_id]

    record, card = read_json(output / "parity.json"), (output / "README.md").read_text()
    assert record["max_logit_error"] == parity.max_logit_error
    assert (record["target"], record["read_as"], record["compared"]) == (target, f"{name}ForCausalLM", True)
    assert record["software"]["transformers"]
    assert "Pretrained on 12 words." in card
    assert parity.describe() in card
    assert "calculator of chatmodel's own folders is not part of it" in card
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert not list(output.glob("*.py")), "the export needs no code of ours"
    assert [path.name for path in output.parent.iterdir()] == ["exported"]


def test_a_nanochat_of_transformers_comes_back(folders, tokenizer, tmp_path):
    source = folders["transformers-nanochat"]
    export_model(source, tmp_path / "theirs", target="transformers-nanochat", tolerance=1e-5)
    parity = import_transformers_nanochat(tmp_path / "theirs", tmp_path / "ours", tolerance=1e-5)
    assert parity is not None
    assert parity.max_logit_error <= 1e-5
    (first, _), (again, found) = load_stage_model(source), load_stage_model(tmp_path / "ours")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in first.state_dict().items())
    assert again.config.calculator == calculator_table(tokenizer)
    assert found.chat_template == tokenizer.chat_template
    assert "Pretrained on 12 words." in (tmp_path / "ours" / "README.md").read_text()


def test_another_model_is_never_published(folders, tmp_path, monkeypatch):
    """A conversion with a mistake in it: the folder that was there before stays."""
    output = tmp_path / "exported"
    export_model(folders["compat"], output, target="compat", tolerance=1e-5)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in output.iterdir())

    def convert_wrongly(model):
        theirs = to_qwen3(model)
        theirs.model.layers[1].self_attn.q_norm.weight.data[3] *= 1.01
        return theirs

    to_qwen3 = exports.CONVERSIONS["compat"]
    monkeypatch.setitem(exports.CONVERSIONS, "compat", convert_wrongly)
    for place in (output, tmp_path / "new"):
        with pytest.raises(UserError, match=r"the compat export is not the same model: its logits .* differ by up to"):
            export_model(folders["compat"], place, target="compat", tolerance=1e-5)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in output.iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]
    parity = export_model(folders["compat"], tmp_path / "accepted", target="compat", tolerance=1.0)
    assert 1e-5 < parity.max_logit_error < 1.0


def test_a_tokenizer_that_changed_on_the_way_is_noticed(folders, tmp_path, monkeypatch):
    other = convert_tokens([bytes([byte]) for byte in range(256)])
    monkeypatch.setattr(exports.AutoTokenizer, "from_pretrained", lambda *args, **options: other)
    with pytest.raises(UserError, match="the compat export has another tokenizer: 'The capital of France is'"):
        export_model(folders["compat"], tmp_path / "exported", target="compat", tolerance=1e-5)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def run_recipe(monkeypatch):
    """Run a recipe's main with arguments, as its entry point does."""

    def run(name: str, *arguments: str) -> None:
        specification = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
        module = importlib.util.module_from_spec(specification)
        monkeypatch.setitem(sys.modules, name, module)
        specification.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        entry_point(module.main)

    return run


def test_the_recipes_write_folders(folders, tmp_path, run_recipe):
    model, theirs, ours = str(folders["transformers-nanochat"]), str(tmp_path / "theirs"), str(tmp_path / "ours")
    run_recipe("export", "--to", "transformers-nanochat", "--model", model, "--output", theirs)
    run_recipe("import_model", "--model", theirs, "--output", ours)
    assert load_stage_model(Path(ours))[0].config.model_type == "chatmodel"


@pytest.mark.parametrize(
    ("recipe", "arguments", "sentence"),
    [
        ("export", ("--to", "compat"), "error: Qwen3 cannot express final_logit_softcapping=15.0"),
        ("import_model", (), "a model of type 'chatmodel'; give one of type 'nanochat'"),
        ("import_model", ("--nanochat_root", "x"), "error: --tokenizer and --nanochat_root are for nanochat's"),
        ("import_model", ("--model", "none.pt"), "error: --model none.pt does not exist; give a model_<step>.pt"),
    ],
)
def test_a_recipe_ends_with_a_sentence_and_code_2(recipe, arguments, sentence, folders, tmp_path, run_recipe, capsys):
    model, output = str(folders["transformers-nanochat"]), tmp_path / "exported"
    with pytest.raises(SystemExit) as ended:
        run_recipe(recipe, "--model", model, "--output", str(output), *arguments)
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_wrong_arguments_are_one_sentence(folders, tokenizer, tmp_path):
    source, output = folders["compat"], tmp_path / "exported"

    def refuse(sentence, *, model=source, output=output, target="compat"):
        with pytest.raises(UserError, match=sentence):
            export_model(model, output, target=target, tolerance=1e-5)

    refuse("--to onnx is unknown; choose one of transformers-nanochat, compat, gguf", target="onnx")
    refuse("holds no model", model=tmp_path / "nowhere")
    refuse("would replace --model", output=source)
    refuse("would replace --model", output=source.parent)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear")
    refuse("holds other files", output=tmp_path / "notes")
    refuse("is a file", output=tmp_path / "notes" / "diary.txt")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "llama"}))
    refuse("a model of type 'llama'; give one of type 'chatmodel'", model=other)
    damaged = tmp_path / "damaged"
    save_model_folder(make_model(vocab_size=len(tokenizer), **SETTINGS["compat"]), tokenizer, damaged, card=[])
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    refuse("damaged cannot be loaded", model=damaged)
    weights.unlink()
    refuse("holds no weights", model=damaged)
    assert not output.exists()
