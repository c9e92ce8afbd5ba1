"""The benchmark of decoding runs at its smallest, and finds that our tokens are those of plain `generate`."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def bench():
    path = Path(__file__).parents[1] / "scripts" / "bench_infer.py"
    specification = importlib.util.spec_from_file_location("bench_infer", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def arguments(bench, monkeypatch):
    sizes = "--depths 1 --vocab_size 300 --context 64 --prompt_tokens 40 --new_tokens 6 --batch_sizes 1 3"
    monkeypatch.setattr(
        sys, "argv", ["bench_infer.py", *sizes.split(), "--prefill_batch", "2", "--parity_prompts", "3"]
    )
    return bench.parse()


def test_every_figure_is_there(bench, arguments, monkeypatch):
    monkeypatch.setattr(bench, "measure_copy", lambda device: 1e10)
    result = bench.measure_ours(arguments, torch.device("cpu")) | {"system": "ours", "depth": 1}
    assert [batch["rows"] for batch in result["batches"]] == [1, 3]
    for batch in result["batches"]:
        assert batch["tokens_per_second"] == pytest.approx(batch["rows"] / batch["seconds_per_step"])
        assert 0 < batch["share_of_limit"] < 1
        assert batch["seconds_to_first_token"] > 0
    table = bench.render([result]).splitlines()
    assert len(table) == 5
    assert table[2].startswith("| 1 | ours | 1 |")


def test_parity_is_found(bench, arguments):
    result = bench.measure_parity(arguments, torch.device("cpu"))
    assert result["equal"] == result["prompts"] == 3
    assert result["divergences"] == []
    assert bench.render_parity(result) == "3 of 3 prompts: the tokens of plain generate (torch.float32)"
    parted = result | {"equal": 2, "divergences": [{"prompt_tokens": 7, "at": 3, "margin": 0.01}]}
    assert bench.render_parity(parted).splitlines()[1:] == ["prompt of 7 tokens: another token at 3, behind by 0.0100"]
