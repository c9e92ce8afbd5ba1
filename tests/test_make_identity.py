"""A file of facts becomes a file of conversations that a mixture takes."""

import runpy
import sys
from pathlib import Path

import pytest

from chatmodel.conversations.files import convert_row, read_rows
from chatmodel.conversations.mixtures import load_mixture

SCRIPT = Path(__file__).parents[1] / "scripts" / "make_identity.py"


@pytest.fixture
def make(tmp_path, monkeypatch):
    (tmp_path / "facts.yaml").write_text("name: Tiny\nmaker: Ann\nsize: 3 million parameters\nlanguages: [English]\n")

    def make(output: str, *options: str) -> list:
        arguments = ["make_identity.py", str(tmp_path / "facts.yaml"), f"--output={tmp_path / output}", *options]
        monkeypatch.setattr(sys, "argv", arguments)
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return [convert_row(row) for row in read_rows(tmp_path / output).rows]

    return make


def test_rows_are_many_and_varied_and_follow_from_the_seed(make, tokenizer, tmp_path):
    rows = make("a.jsonl", "--rows=500")
    assert len(rows) == 500
    assert len({str(row) for row in rows}) > 450
    assert {len(row) for row in rows} == {2, 4, 6, 8}
    assert rows == make("b.jsonl", "--rows=500")
    assert not {str(row) for row in rows if len(row) > 4} & {str(row) for row in make("c.jsonl", "--seed=1")}
    dataset, counts = load_mixture([str(tmp_path / "a.jsonl")], tokenizer, max_length=256)
    assert len(dataset) == counts[0]["rows"] == 500


def test_mistakes_end_in_one_sentence(make, tmp_path, capsys):
    with pytest.raises(SystemExit):
        make("a.jsonl", "--rows=0")
    (tmp_path / "facts.yaml").write_text("nam: Tiny")
    with pytest.raises(SystemExit):
        make("a.jsonl")
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "rows=0" in errors[0]
    assert "did you mean name?" in errors[1]
