"""What vLLM's Transformers backend asks of a model, tried without vLLM.

Source: vllm/model_executor/models/registry.py@0002bff, transformers/base.py@03bf3cc and fusers/ of vllm-project/vllm.
"""

import inspect
import tomllib
from pathlib import Path

import pytest
import torch
import transformers
from conftest import make_model
from torch import nn
from transformers import AutoModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from chatmodel import GPTConfig, GPTForCausalLM
from chatmodel.vllm_plugin import register

PLAIN = {"window_pattern": "L", "value_embeddings": False, "residual_scalars": False, "backout": False}
ROOT = Path(__file__).parents[1]


def test_the_plugin_makes_the_architecture_known(monkeypatch):
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    assert entry == {"chatmodel": "chatmodel.vllm_plugin:register"}
    for name in ("GPTForCausalLM", "GPTForSequenceClassification"):
        monkeypatch.setattr(transformers, name, None, raising=False)
    register()
    register()
    assert transformers.GPTForCausalLM is GPTForCausalLM
    assert transformers.GPTForCausalLM.is_backend_compatible()


def attend_as_vllm(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **kwargs):
    """vLLM's attention looks its own instance of the layer up, keeps windows itself, and is given no mask."""
    assert attention_mask is None
    instance = attention_instances[module.layer_idx]
    assert query.shape[0] == 1, "one row of all requests"
    assert query.shape[1] == instance["num_heads"]
    assert key.shape[1] == instance["num_kv_heads"]
    length = query.shape[2]
    window = instance["window"] or length
    distance = torch.arange(length)[:, None] - torch.arange(length)
    mask = ((distance >= 0) & (distance < window))[None, None]
    return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)[0], None


@pytest.mark.parametrize("changes", [{}, PLAIN], ids=["extras", "plain"])
def test_the_decoder_runs_as_vllm_calls_it(changes, monkeypatch):
    expected_model = make_model(**changes)
    ids = torch.randint(0, 97, (1, 14), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = expected_model.model(ids).last_hidden_state

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "vllm", attend_as_vllm)
    config = GPTConfig(**expected_model.config.to_dict())
    config._attn_implementation = "vllm"
    with torch.device("meta"):  # vLLM makes it without memory, then loads by names
        decoder = AutoModel.from_config(config).eval()
    assert all(parameter.is_meta for parameter in decoder.parameters())
    assert {"input_ids", "inputs_embeds", "position_ids"} <= set(inspect.signature(decoder.forward).parameters)
    decoder = AutoModel.from_config(config).eval()
    decoder.load_state_dict(expected_model.model.state_dict())
    instances = {
        index: {
            "num_heads": config.num_attention_heads,
            "num_kv_heads": config.num_key_value_heads,
            "window": config.sliding_window if kind == "sliding_attention" else None,
        }
        for index, kind in enumerate(config.layer_types)
    }
    positions = torch.arange(14)[None]
    with torch.no_grad():
        (found,) = decoder(
            input_ids=ids,
            inputs_embeds=None,
            use_cache=False,
            position_ids=positions,
            attention_instances=instances,
            return_dict=False,
        )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_what_vllm_reads_of_the_configuration():
    """It caps logits and sets windows itself, by these names; weights are found below `model.` and `lm_head.`."""
    config = GPTConfig()
    assert config.final_logit_softcapping == 15.0
    assert len(config.layer_types) == config.num_hidden_layers
    assert config.get_text_config() is config
    names = {name.partition(".")[0] for name in make_model().state_dict()}
    assert names == {"model", "lm_head"}
    assert set(config.auto_map) >= {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert next(iter(config.auto_map)) == "AutoConfig", "the configuration must be loaded before the models"


def make_share(linear: nn.Linear, rank: int, ranks: int, *, rows: bool = True) -> nn.Linear:
    weight = linear.weight.chunk(ranks, dim=0 if rows else 1)[rank]
    share = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    share.weight = nn.Parameter(weight.detach().clone())
    share.tp_rank = rank
    return share


def test_each_rank_adds_the_value_embeddings_of_its_heads():
    """The table is whole on every rank in vLLM; the layer that says which rank it is, is the gate."""
    model, ranks = make_model(), 2
    attention = model.model.layers[1].self_attn
    assert attention.value_embed is not None
    hidden_states, ids = torch.randn(1, 5, 64), torch.tensor([[4, 8, 15, 16, 23]])
    inputs = {
        "position_embeddings": model.model.rotary_emb(hidden_states, torch.arange(5)[None]),
        "input_ids": ids,
        "attention_mask": None,
    }
    with torch.no_grad():
        expected, _ = attention(hidden_states, **inputs)
        whole = {name: getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj", "value_gate", "o_proj")}
        parts = []
        for rank in range(ranks):
            for name, linear in whole.items():
                setattr(attention, name, make_share(linear, rank, ranks, rows=name != "o_proj"))
            parts.append(attention(hidden_states, **inputs)[0])
    torch.testing.assert_close(sum(parts), expected, atol=1e-5, rtol=0)
