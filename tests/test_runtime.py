"""JSON files and errors, as every program uses them."""

import json
import subprocess
import sys

import pytest

from chatmodel.runtime import UserError, read_json, write_json


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
