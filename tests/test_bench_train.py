"""What the benchmark of training cannot measure is refused before anything runs."""

import importlib.util
import sys
from pathlib import Path

import pytest

from chatmodel.runtime import UserError

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_train.py"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--device_batch_size", "7"], "device_batch_size=7 does not divide the 256 rows"),
        (["--depths", "2", "0"], "depth=0"),
        (["--nanochat", "/nonexistent"], "/nonexistent is no checkout of nanochat"),
    ],
)
def test_what_cannot_be_measured(monkeypatch, options, named):
    specification = importlib.util.spec_from_file_location("bench_train", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    monkeypatch.setattr(module, "run_child", None)
    monkeypatch.setattr(sys, "argv", ["bench_train.py", *options])
    with pytest.raises(UserError, match=named):
        module.main()
