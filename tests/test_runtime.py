"""Arguments, JSON files and errors, as every recipe uses them."""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from chatmodel.runtime import (
    UserError,
    check_model_name,
    choose_precision,
    default_settings,
    explain_no_model,
    parse_arguments,
    read_json,
    requested_settings,
    write_json,
)


@dataclass
class Arguments:
    depth: int = field(default=4, metadata={"help": "layers"})
    name: str | None = None
    fast: bool = False
    rate: float = 1.0
    anything: list[Any] | None = None


def test_command_line_beats_yaml_beats_default(tmp_path, monkeypatch):
    config = tmp_path / "a.yaml"
    config.write_text("depth: 6\nname: x\n")
    monkeypatch.setattr(sys, "argv", ["recipe", "--config", str(config), "--name", "y"])
    (args,) = parse_arguments(Arguments)
    assert (args.depth, args.name, args.fast) == (6, "y", False)


@pytest.mark.parametrize(
    ("text", "named"), [("dept: 6\n", "did you mean depth"), ("- 1\n", "mapping"), ("a: [\n", "YAML")]
)
def test_a_bad_config_is_one_sentence(tmp_path, monkeypatch, text, named):
    config = tmp_path / "a.yaml"
    config.write_text(text)
    monkeypatch.setattr(sys, "argv", ["recipe", "--config", str(config)])
    with pytest.raises(UserError, match=named):
        parse_arguments(Arguments)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("depth: 1e3", {"depth": 1000}),
        ("depth: 1.0e+3", {"depth": 1000}),
        ("rate: 1e-3", {"rate": 0.001}),
        ("rate: 2", {"rate": 2}),
        ("name: no", {"name": "no"}),
        ("name: 12", {"name": "12"}),
        ("name: null", {"name": None}),
        ("fast: off", {"fast": False}),
        ("fast: yes", {"fast": True}),
        ("anything: [1, no]", {"anything": [1, False]}),
    ],
)
def test_values_of_a_config_are_of_their_fields_types(tmp_path, monkeypatch, line, found):
    (tmp_path / "a.yaml").write_text(line)
    monkeypatch.setattr(sys, "argv", ["recipe", "--config", str(tmp_path / "a.yaml")])
    assert parse_arguments(Arguments)[0] == Arguments(**found)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("depth: [2]", "depth=[2] must be a whole number"),
        ("depth: true", "depth=True must be a whole number"),
        ("depth: 2.7", "depth=2.7 must be a whole number"),
        ("depth: null", "depth=None must be a whole number"),
        ("depth: 2e-1", "argument --depth: invalid int value: '2e-1'"),
        ("rate: {a: 1}", "rate={'a': 1} must be a number"),
        ("name: [a]", "name=['a'] must be text or null"),
        ("fast: 3", "fast=3 must be true or false"),
    ],
)
def test_a_value_of_another_type_is_one_sentence(tmp_path, monkeypatch, line, sentence):
    (tmp_path / "a.yaml").write_text(line)
    monkeypatch.setattr(sys, "argv", ["recipe", "--config", str(tmp_path / "a.yaml")])
    with pytest.raises(UserError) as error:
        parse_arguments(Arguments)
    assert str(error.value).startswith(sentence)


def test_a_missing_config_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipe", "--config", "nowhere.yaml"])
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        parse_arguments(Arguments)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--dept", "3"], "there is no option --dept (did you mean --depth?); --help lists the options"),
        (["--no-fats"], "there is no option --no-fats; --help lists the options"),
        (["--depth", "three"], "argument --depth: invalid int value: 'three'; --help lists the options"),
        (["--config"], "--config stands at the end; it takes the path of a YAML file"),
        (["--depth", "3", "4"], "'4' belongs to no option; options are written --name value"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(monkeypatch, words, sentence):
    monkeypatch.setattr(sys, "argv", ["recipe", *words])
    with pytest.raises(UserError) as error:
        parse_arguments(Arguments)
    assert str(error.value) == sentence


def test_options_may_have_hyphens_and_be_switched_off(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipe", "--depth=3", "--fast", "false"])
    assert parse_arguments(Arguments)[0] == Arguments(depth=3)


def test_a_wrong_folder_is_told_where_the_models_lie(tmp_path):
    for stage in ("base", "sft"):
        write_json(tmp_path / "run" / stage / "config.json", {})
    run = tmp_path / "run"
    assert explain_no_model(run) == f"{run} is a run folder; give one of its stages: {run}/base, {run}/sft"
    assert explain_no_model(run / "stf") == f"folder {run}/stf does not exist; its run has {run}/base, {run}/sft"
    assert "does not exist; give a model folder" in explain_no_model(tmp_path / "ran" / "sft")
    assert "holds no model" in explain_no_model(tmp_path)
    assert check_model_name(str(run / "sft"))
    assert not check_model_name("owner/name")
    for wrong in (run, run / "stf"):
        with pytest.raises(UserError, match="run/base, "):
            check_model_name(str(wrong))


def test_requested_settings_reads_what_the_parser_would(tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text("depth: 6\nname: x\n")
    asked = requested_settings(["--config", str(config), "--name", "y", "--fast", "--rate", "1.5", "--list", "1", "2"])
    assert asked == {"depth": 6, "name": "y", "fast": True, "rate": 1.5, "list": [1, 2]}


def test_words_of_the_command_line_stay_as_they_are_written(tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text("mixed_precision: no\ncompile: false\nname: Yes\n")
    asked = requested_settings(["--config", str(config), "--packing", "off", "--fp8", "true", "--name", "[a"])
    assert asked == {"mixed_precision": "no", "compile": False, "name": "[a", "packing": "off", "fp8": True}
    config.write_text("- 1\n")
    with pytest.raises(UserError, match="no YAML mapping"):
        requested_settings(["--config", str(config)])


def test_defaults_are_what_json_can_hold():
    expected = {"depth": 4, "name": None, "fast": False, "rate": 1.0, "anything": None}
    assert default_settings(Arguments) == expected


def test_an_error_is_one_sentence_and_exit_code_2():
    code = "from chatmodel.runtime import *\ndef main(): raise UserError('the cap is missing; put it on')\n"
    code += "entry_point(main)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == "error: the cap is missing; put it on"


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    with pytest.raises(UserError, match="does not exist"):
        read_json(tmp_path / "b.json")
    path.write_text(json.dumps({"a": 1})[:-2])
    with pytest.raises(UserError, match="damaged"):
        read_json(path)


@pytest.mark.parametrize(
    ("launched", "asked", "speedup", "said"),
    [
        ("no", None, 2.0, "precision: bf16 on cpu, not Accelerate's 'no', which does not count: this program's own"),
        ("bf16", None, 1.0, "precision: fp32 on cpu, not Accelerate's 'bf16', which does not count: this"),
        ("fp16", None, 1.0, "precision: fp32 on cpu, not Accelerate's 'fp16'"),
        ("no", None, 1.0, "precision: fp32 on cpu\n"),
        (None, None, 2.0, "precision: bf16 on cpu\n"),
        ("no", "bf16", 1.0, ""),
    ],
)
def test_a_precision_asked_of_accelerate_is_not_passed_over_in_silence(
    monkeypatch, caplog, launched, asked, speedup, said
):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    monkeypatch.setattr("chatmodel.runtime._matmul_speedup", lambda dtype: speedup)
    with caplog.at_level("INFO", logger="chatmodel"):
        chosen = choose_precision(torch.device("cpu"), asked)
    assert chosen == (asked or ("bf16" if speedup > 1.3 else "no"))
    assert said in caplog.text
    assert bool(said) == bool(caplog.text)
