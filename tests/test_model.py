"""The model behaves as Transformers expects, and its seed preset is transformers' own NanoChat."""

import pytest
import torch
from conftest import make_model
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import DynamicCache, NanoChatConfig, NanoChatForCausalLM

from chatmodel import GPTConfig, GPTForCausalLM, GPTModel
from chatmodel.model.configuration_gpt import expand_window_pattern
from chatmodel.scaling import plan_run

PLAIN = {"window_pattern": "L", "value_embeddings": False, "residual_scalars": False, "backout": False}


def random_ids(*shape, seed=1):
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["extras", "plain"])
def model(request):
    return make_model(**({} if request.param == "extras" else PLAIN))


def test_cached_generation_gives_the_same_tokens(model):
    ids = random_ids(2, 15)  # longer than the window of 6
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, use_cache=False, **settings)
    assert torch.equal(model.generate(ids, **settings), expected)
    assert torch.equal(model.generate(ids, cache_implementation="static", disable_compile=True, **settings), expected)


def test_one_token_at_a_time_gives_the_same_logits(model):
    ids, cache = random_ids(1, 14), DynamicCache(config=model.config)
    steps = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(14)]
    torch.testing.assert_close(torch.cat(steps, dim=1), model(ids).logits, atol=1e-4, rtol=1e-4)


def test_left_padding_changes_nothing(model):
    ids = random_ids(1, 9)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 5, dtype=torch.long), torch.ones_like(ids)], dim=1)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(ids, **settings)[:, 9:]
    assert torch.equal(model.generate(padded, attention_mask=mask, **settings)[:, 14:], alone)


def test_left_padding_changes_no_gradient(model):
    """Padding that may see nothing must not turn gradients into NaN, nor into anything else."""
    ids = random_ids(1, 9)
    padding = torch.zeros(1, 8, dtype=torch.long)  # longer than the window
    padded, mask = torch.cat([padding, ids], dim=1), torch.cat([padding, torch.ones_like(ids)], dim=1)

    def gradients(**inputs):
        model.zero_grad()
        model.train()(**inputs, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    expected = gradients(input_ids=ids, labels=ids)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    labels = padded.masked_fill(positions == 0, -100)  # the first token would be scored from the padding before it
    found = gradients(input_ids=padded, labels=labels, attention_mask=mask, position_ids=positions)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("use_cache", [None, False])
def test_packed_documents_do_not_see_each_other(model, use_cache):
    ids = random_ids(1, 20)
    position_ids = torch.cat([torch.arange(9), torch.arange(11)])[None]
    packed = model(ids, position_ids=position_ids, use_cache=use_cache).logits
    apart = torch.cat([model(ids[:, :9]).logits, model(ids[:, 9:]).logits], dim=1)
    torch.testing.assert_close(packed, apart, atol=2e-5, rtol=1e-4)


def test_a_token_sees_its_window_and_no_further():
    model = make_model(num_hidden_layers=1, layer_types=["sliding_attention"], sliding_window=3, backout=False)
    ids = random_ids(1, 10)
    changed = ids.clone()
    changed[0, 4] = (changed[0, 4] + 1) % 97
    moved = (model(ids).logits - model(changed).logits).abs().amax(dim=-1)[0] > 1e-6
    assert moved.tolist() == [position in (4, 5, 6) for position in range(10)]


def test_attention_implementations_agree(model):
    ids = random_ids(2, 12)
    expected = model(ids).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-4)


def test_loss_is_the_mean_over_scored_positions(model):
    ids = random_ids(2, 8)
    labels = ids.clone()
    labels[0, :6] = -100
    log_probabilities = model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    scored = torch.cat([log_probabilities[0, 5:], log_probabilities[1]])
    torch.testing.assert_close(model(ids, labels=labels).loss, -scored.mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_and_loading(model, tmp_path, dtype):
    ids = random_ids(1, 9)
    model.to(dtype).save_pretrained(tmp_path)
    again = GPTForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == dtype
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert torch.equal(GPTModel.from_pretrained(tmp_path)(ids)[0], model.model(ids)[0])
    assert {"configuration_gpt.py", "layers_gpt.py", "modeling_gpt.py", "calculator.py"} <= {
        path.name for path in tmp_path.iterdir()
    }
    heads = {"AutoModelForCausalLM", "AutoModelForSequenceClassification"}
    assert set(again.config.auto_map) == {"AutoConfig", "AutoModel", *heads}


@pytest.mark.parametrize("plan", ["auto", "by hand"])
def test_a_device_map_changes_nothing(model, tmp_path, plan):
    """By hand, the second half of the layers stays on the disk until it is needed."""
    ids = random_ids(2, 9)
    model.save_pretrained(tmp_path)
    parts = [name for name, _ in model.model.named_children() if name != "layers"]
    parts += [name for name, _ in model.model.named_parameters(recurse=False)]
    places = dict.fromkeys([*(f"model.{name}" for name in parts), "lm_head"], "cpu")
    places |= {f"model.layers.{n}": "cpu" if n < 2 else "disk" for n in range(4)}
    device_map = "auto" if plan == "auto" else places
    placed = GPTForCausalLM.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "offload")
    assert (placed.model.layers[3].mlp.up_proj.weight.device.type == "meta") == (plan == "by hand")
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(placed.generate(ids, **settings), model.generate(ids, **settings))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(model, reentrant):
    ids = random_ids(2, 10)

    def gradients():
        model.zero_grad()
        model.train()(ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    expected = gradients()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)


def test_seed_preset_is_transformers_nanochat():
    """The rotation turns the other way there: the second half of each head's rows changes its sign."""
    plan = plan_run(2, vocab_size=97, sequence_length=64, recipe="seed", head_dim=32)
    model = make_model(**(plan.model | {"sliding_window": None}), num_key_value_heads=2)
    config = model.config
    theirs = NanoChatForCausalLM(
        NanoChatConfig(
            vocab_size=97,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=2,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    ).eval()
    signs = torch.ones(config.head_dim, 1)
    signs[config.head_dim // 2 :] = -1
    state = {}
    for name, value in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            value = (value.view(-1, config.head_dim, value.shape[1]) * signs).view_as(value)
        state[name.replace("up_proj", "fc1").replace("down_proj", "fc2")] = value
    theirs.load_state_dict(state)
    ids = random_ids(2, 40)
    expected = theirs(ids).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=0)


def test_new_models_start_as_the_recipe_says():
    torch.manual_seed(0)
    model = GPTForCausalLM(GPTConfig(vocab_size=500, hidden_size=256, num_hidden_layers=3, num_attention_heads=2))
    layer = model.model.layers[1]
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.8, rel=0.02)
    assert model.lm_head.weight.std().item() == pytest.approx(0.001, rel=0.02)
    assert layer.self_attn.q_proj.weight.std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert layer.mlp.up_proj.weight.std().item() == pytest.approx(0.4 * 256**-0.5, rel=0.02)
    assert layer.self_attn.o_proj.weight.abs().max() == 0
    assert layer.mlp.down_proj.weight.abs().max() == 0
    assert [round(each.residual_scale.item(), 3) for each in model.model.layers] == [1.15, 1.10, 1.05]
    assert [each.self_attn.value_embed is not None for each in model.model.layers] == [True, False, True]


def test_seed_init_is_the_seeds():
    """Without extras too: a layer that holds no weight of its own must not be passed over."""
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=500, hidden_size=256, num_attention_heads=2, num_hidden_layers=2, init_scheme="normal"
    )
    model = GPTForCausalLM(config)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(1.0, rel=0.02)
    assert model.lm_head.weight.abs().max() == 0
    assert model.model.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert model.model.layers[0].mlp.down_proj.weight.abs().max() == 0


def test_window_patterns():
    short, full = "sliding_attention", "full_attention"
    assert expand_window_pattern("SSSL", 6) == [short, short, short, full, short, full]
    assert expand_window_pattern("S", 2) == [short, full]
    with pytest.raises(ValueError, match="window_pattern='SX'"):
        expand_window_pattern("SX", 2)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"init_scheme": "xavier"}, "init_scheme"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, named):
    with pytest.raises(StrictDataclassClassValidationError, match=named):
        make_model(**changes)
