"""The token store made ahead of time: by pretraining's own arguments, and without them nothing is lost."""

import importlib.util
import sys
from pathlib import Path

import pytest
from tiny_pretraining import SETTINGS, make_run, write_text

from chatmodel.data.store import TokenStore
from chatmodel.runs import Run
from chatmodel.runtime import UserError, read_json

SCRIPT = Path(__file__).parents[1] / "scripts" / "prepare_data.py"


@pytest.fixture
def prepare(monkeypatch, tmp_path):
    """Run the script with the tiny run's settings in a file."""
    specification = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)

    def start(**changes):
        lines = [f"{key}: {value}" for key, value in (SETTINGS | {"dataset": tmp_path / "text"} | changes).items()]
        (tmp_path / "pretrain.yaml").write_text("\n".join(lines))
        options = ["--config", str(tmp_path / "pretrain.yaml"), "--run_dir", str(tmp_path / "run")]
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *options])
        module.main()

    return start


def test_a_store_is_made_by_what_pretraining_is_asked(prepare, tokenizer, tmp_path):
    run = make_run(tmp_path / "run", tokenizer, write_text(tmp_path / "text"))
    prepare(max_steps=16, hourly_rate=2.5)
    manifest = read_json(run.folder("data") / "train" / "manifest.json")
    assert manifest["max_tokens"] == int(1.05 * 16 * 64)


def test_text_that_is_read_several_times_is_mentioned(prepare, tokenizer, tmp_path, caplog):
    run = make_run(tmp_path / "run", tokenizer, write_text(tmp_path / "text"))
    with caplog.at_level("INFO", logger="chatmodel"):
        prepare(max_steps=16)
        assert "will be read" not in caplog.text
        prepare(max_steps=10_000)
    tokens = TokenStore.open(run.folder("data") / "train").num_tokens
    times = f"{640_000 / tokens:.1f}"
    assert f"the text has {tokens:,} tokens and will be read {times} times; see decay_fraction" in caplog.text


def test_a_dry_run_is_refused_and_the_store_is_left_alone(prepare, tokenizer, tmp_path):
    run = make_run(tmp_path / "run", tokenizer, write_text(tmp_path / "text"))
    before = read_json(run.folder("data") / "train" / "manifest.json")
    with pytest.raises(UserError, match="leave dry_run out"):
        prepare(max_steps=16, dry_run="true")
    assert read_json(run.folder("data") / "train" / "manifest.json") == before


def test_the_tokenizer_comes_first(prepare, tmp_path):
    with pytest.raises(UserError, match=r"has no tokenizer yet; run recipes/train_tokenizer\.py"):
        prepare()
    assert not Run(tmp_path / "run").folder("data").exists()
