"""A folder without a model is told apart from one that is not there."""

import pytest

from chatmodel.model_folders import check_model_name, explain_no_model
from chatmodel.runtime import UserError, write_json


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
