"""Decisions that outlive a crash, and what makes them invalid."""

import pytest
import torch
from conftest import make_model

from chatmodel.evaluation.decisions import KeptDecisions, hash_values, model_key


def test_decisions_are_read_back_by_their_key(tmp_path):
    path = tmp_path / "base.decisions"
    right = [True, False, True] * 5
    KeptDecisions(path, model_key="m").keep("key", "piqa", right, 1.5)
    again = KeptDecisions(path, model_key="m")
    assert again.find("key") == (right, 1.5)
    assert again.find("other key") is None
    again.keep("second", "copa", [False], 2.0)
    assert KeptDecisions(path, model_key="m").find("key") == (right, 1.5)


def test_another_models_decisions_and_damaged_files_are_not_believed(tmp_path, caplog):
    caplog.set_level("INFO")
    path = tmp_path / "base.decisions"
    KeptDecisions(path, model_key="m").keep("key", "piqa", [True], 1.0)
    assert KeptDecisions(path, model_key="n").find("key") is None
    assert "of another model or other settings" in caplog.text
    path.write_text('{"version": 1, "mod')
    assert KeptDecisions(path, model_key="m").find("key") is None
    assert "is damaged" in caplog.text


def test_nothing_is_kept_nowhere():
    kept = KeptDecisions.nowhere()
    kept.keep("key", "piqa", [True], 1.0)
    assert kept.path is None


def test_models_are_told_apart_by_each_weight_tokenizer_and_setting(tokenizer):
    model = make_model()
    key = model_key(model, tokenizer, "bf16")
    assert model_key(make_model(), tokenizer, "bf16") == key
    assert model_key(model, tokenizer, "no") != key
    weight = model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight[0, 0], weight[0, 1] = weight[0, 1].item() + 1e-3, weight[0, 0].item()
    assert model_key(model, tokenizer, "bf16") != key


def test_hashes_are_of_the_content():
    assert hash_values({"a": 1, "b": [2]}) == hash_values({"b": [2], "a": 1})
    assert hash_values(["a"]) != hash_values(["b"])
    with pytest.raises(TypeError):
        hash_values(object())
