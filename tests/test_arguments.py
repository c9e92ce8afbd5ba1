"""Settings from defaults, YAML files and command lines, and what is said of wrong ones."""

import sys
from dataclasses import dataclass, field
from typing import Any

import pytest

from chatmodel.arguments import default_settings, parse_arguments, requested_settings
from chatmodel.runtime import UserError


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


def test_requested_settings_reads_what_the_parser_would(tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text("depth: 6\nname: x\n")
    asked = requested_settings(["--config", str(config), "--name", "y", "--fast", "--rate", "1.5", "--list", "1", "2"])
    assert asked == {"depth": 6, "name": "y", "fast": True, "rate": 1.5, "list": [1, 2]}


def test_a_list_of_anything_takes_words_and_mappings(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipe", "--anything", "chats.jsonl", "{name: Identity, rows: 5}", "3"])
    assert parse_arguments(Arguments)[0].anything == ["chats.jsonl", {"name": "Identity", "rows": 5}, 3]
    config = tmp_path / "a.yaml"
    config.write_text("anything: GSM8K\n")
    monkeypatch.setattr(sys, "argv", ["recipe", "--config", str(config)])
    assert parse_arguments(Arguments)[0].anything == ["GSM8K"]


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
