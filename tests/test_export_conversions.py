"""Models rewritten as classes of Transformers have the same logits, or are refused by the name of the feature."""

import pytest
import torch
from conftest import make_model
from transformers import NanoChatConfig, NanoChatForCausalLM

from chatmodel.export.conversions import from_nanochat, reverse_rotation, to_nanochat, to_qwen3
from chatmodel.export.parity import Parity, compare_logits, encode_prompts, logits_of, require_parity
from chatmodel.runtime import UserError
from chatmodel.scaling import plan_run

PLAIN = {"window_pattern": "L", "value_embeddings": False, "residual_scalars": False, "backout": False}
SEED = PLAIN | {"qk_scale": 1.0, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}
COMPAT = PLAIN | {"gated_mlp": True, "hidden_act": "silu", "intermediate_size": 160, "final_logit_softcapping": None}
IDS = torch.randint(0, 97, (2, 60), generator=torch.Generator().manual_seed(1))
SWAPPED = {1: 2, 2: 1}


def swap_layers(model):
    """The same weights with layers 1 and 2 in each other's places."""
    state = {}
    for name, value in model.state_dict().items():
        layer = name.split(".")[2] if name.startswith("model.layers.") else ""
        other = str(SWAPPED.get(int(layer), layer)) if layer else ""
        state[name.replace(f"layers.{layer}.", f"layers.{other}.", 1) if layer else name] = value.clone()
    model.load_state_dict(state)
    return model


def make_moderate(**changes):
    """Weights of N(0, 0.1): larger ones make logits whose rounding alone exceeds 1e-5."""
    model = make_model(**changes)
    for parameter in model.parameters():
        parameter.data *= 0.5
    return model


def check_parity(ours, theirs):
    expected = ours(IDS).logits
    assert expected.std() > 0.1
    assert (theirs(IDS).logits - expected).abs().max() <= 1e-5
    assert (swap_layers(theirs)(IDS).logits - expected).abs().max() > 1e-2


def test_the_seed_preset_becomes_nanochat_and_comes_back():
    model = make_model(**SEED)
    theirs = to_nanochat(model)
    again = from_nanochat(theirs)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    check_parity(model, theirs)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"final_logit_softcapping": None}])
def test_a_nanochat_of_transformers_becomes_ours(changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    theirs = NanoChatForCausalLM(NanoChatConfig(**sizes, **heads, **special, **changes)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    check_parity(theirs, from_nanochat(theirs))


def test_a_nanochat_with_biases_is_refused():
    sizes = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    theirs = NanoChatForCausalLM(NanoChatConfig(**sizes, intermediate_size=16, attention_bias=True))
    with pytest.raises(UserError, match="attention_bias"):
        from_nanochat(theirs)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"qk_scale": 1.0}, {"head_dim": 24}])
def test_a_compatible_model_becomes_qwen3(changes):
    """Normed embeddings, QK scale and the order of norm and rotation are folded into Qwen3's weights."""
    model = make_moderate(**(COMPAT | changes))
    check_parity(model, to_qwen3(model))


def test_the_compat_recipe_plans_a_model_that_becomes_qwen3():
    plan = plan_run(3, vocab_size=97, sequence_length=64, recipe="compat", head_dim=32)
    model = make_moderate(**(plan.model | {"sliding_window": None, "num_key_value_heads": None}))
    assert sum(p.numel() for p in model.parameters()) == plan.parameters
    assert plan.model["intermediate_size"] == 512  # 8/3 of 192
    assert (to_qwen3(model)(IDS).logits - model(IDS).logits).abs().max() <= 1e-5


def test_compat_at_depth_12_has_qwen3s_usual_heads():
    plan = plan_run(12, vocab_size=32_768, recipe="compat")
    assert (plan.model["hidden_size"], plan.model["intermediate_size"]) == (768, 2048)
    assert plan.model_config().head_dim == 128


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"value_embeddings": True}, "value_embeddings"),
        ({"residual_scalars": True}, "residual_scalars"),
        ({"backout": True}, "backout"),
        ({"smear": True}, "smear"),
        ({"window_pattern": "SL"}, "sliding_window=6"),
        ({"value_embeddings": True, "backout": True}, "value_embeddings, backout"),
    ],
)
def test_a_feature_no_target_has_is_named(changes, named):
    for target, convert, settings in (("NanoChat", to_nanochat, SEED), ("Qwen3", to_qwen3, COMPAT)):
        with pytest.raises(UserError, match=f"{target} cannot express {named}; --recipe"):
            convert(make_model(**(settings | changes)))


@pytest.mark.parametrize(
    ("convert", "settings", "changes", "named"),
    [
        (to_nanochat, SEED, {"qk_scale": 1.2}, "qk_scale=1.2"),
        (to_nanochat, SEED, {"gated_mlp": True}, "gated_mlp"),
        (to_qwen3, COMPAT, {"final_logit_softcapping": 15.0}, "final_logit_softcapping=15.0"),
        (to_qwen3, COMPAT, {"hidden_act": "relu2"}, "hidden_act=relu2"),
        (to_qwen3, COMPAT, {"gated_mlp": False}, "an MLP that is not gated"),
        (
            to_qwen3,
            COMPAT,
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type",
        ),
    ],
)
def test_a_feature_one_target_lacks_is_named(convert, settings, changes, named):
    with pytest.raises(UserError, match=f"cannot express {named}"):
        convert(make_model(**(settings | changes)))


def test_reversed_rotation_negates_the_second_half_of_each_head():
    weight = torch.arange(1.0, 9.0)[:, None]
    assert reverse_rotation(weight, 4).flatten().tolist() == [1, 2, -3, -4, 5, 6, -7, -8]


def test_a_comparison_by_hand():
    """Logits of two positions: one differs by 0.5 and changes the likeliest token, the other is equal."""
    expected = torch.tensor([[[1.0, 2.0], [4.0, 3.0]]])
    found = torch.tensor([[[2.25, 2.0], [4.0, 3.0]]])
    parity = compare_logits(lambda ids: expected, lambda ids: found, [[0, 1]])
    assert parity.max_logit_error == 1.25
    assert (parity.argmax_agreement, parity.positions) == (0.5, 2)
    assert parity.logits_std == pytest.approx(1.25**0.5)  # of 1, 2, 4, 3
    with pytest.raises(UserError, match=r"differ by up to 1.25, more than 1.12e-05"):  # 1e-5 of 1.118
        require_parity(parity, 1e-5, "the copy")
    require_parity(parity, 1.25, "the copy")


def test_logits_that_are_no_numbers_are_no_parity():
    broken = compare_logits(lambda ids: torch.zeros(1, 1, 2), lambda ids: torch.full((1, 1, 2), torch.nan), [[0]])
    with pytest.raises(UserError, match="differ by up to nan"):
        require_parity(broken, 1e9, "the copy")
    assert Parity(0.0, 1.0, 1, 1.0).describe().startswith("On 1 positions")


def test_prompts_fit_the_context(tokenizer):
    rows = encode_prompts(tokenizer, len(tokenizer), 24)
    assert max(len(row) for row in rows) == 24
    assert all(row[0] == tokenizer.bos_token_id for row in rows[:-1])
    assert rows == encode_prompts(tokenizer, len(tokenizer), 24)
    assert logits_of(make_model(vocab_size=len(tokenizer)))(torch.tensor([rows[0]])).shape[2] == len(tokenizer)
