"""The inspector's numbers against the model's own logits, and the lens against a model that really ends earlier."""

import math

import pytest
import torch
from conftest import make_model

from chatmodel.chat.inspection import inspect_layers, inspect_tokens
from chatmodel.conversations.render import render_conversation
from chatmodel.runtime import UserError
from chatmodel.tokenizer import calculator_table

CALL = [{"type": "python", "text": "12+30"}, {"type": "python_output", "text": "42"}]
MESSAGES = [
    {"role": "user", "content": "12+30?"},
    {"role": "assistant", "content": [*CALL, {"type": "text", "text": "It is 42."}]},
]


@pytest.fixture
def ids(tokenizer):
    return render_conversation(tokenizer, MESSAGES).input_ids


def test_tokens_have_the_probabilities_of_the_model(chat_model, tokenizer, ids):
    with torch.no_grad():
        logits = chat_model(torch.tensor([ids])).logits[0].double()
    inspected = inspect_tokens(chat_model, tokenizer, ids, start=4, top_k=3)
    assert [token.token_id for token in inspected] == ids[4:]
    for position, token in enumerate(inspected, start=4):
        row = logits[position - 1]
        total = sum(math.exp(value) for value in row.tolist())
        assert token.probability == pytest.approx(math.exp(row[token.token_id]) / total, rel=1e-4)
        order = row.argsort(descending=True).tolist()
        assert token.rank == order.index(token.token_id) + 1
        assert [each.token_id for each in token.alternatives] == order[:3]
        assert token.alternatives[0].probability == pytest.approx(math.exp(row.max()) / total, rel=1e-4)
        assert token.text == tokenizer.decode([token.token_id])
    everything = inspect_tokens(chat_model, tokenizer, ids, top_k=10_000)
    assert len(everything) == len(ids) - 1
    assert sum(each.probability for each in everything[0].alternatives) == pytest.approx(1)


def test_what_the_calculator_wrote_is_marked(chat_model, tokenizer, ids):
    forced = "".join(token.text for token in inspect_tokens(chat_model, tokenizer, ids) if token.forced)
    assert forced == "<|output_start|>42<|output_end|>"
    silent = make_model(vocab_size=len(tokenizer), max_position_embeddings=256)
    assert not any(token.forced for token in inspect_tokens(silent, tokenizer, ids))


EXTRAS = {
    "none": {"backout": False, "residual_scalars": False, "value_embeddings": False, "final_logit_softcapping": None},
    "all": {"backout": True, "residual_scalars": True, "smear": True, "final_logit_softcapping": 5.0},
    "two layers": {"backout": True, "num_hidden_layers": 2},
    "one layer": {"backout": True, "num_hidden_layers": 1},
}


@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
def test_the_last_layer_is_the_model(tokenizer, ids, extras):
    table = calculator_table(tokenizer)
    model = make_model(vocab_size=len(tokenizer), max_position_embeddings=256, calculator=table, **extras)
    layers = inspect_layers(model, tokenizer, ids, start=2)
    assert [layer.name for layer in layers][:2] == ["embeddings", "layer 1"]
    assert len(layers) == model.config.num_hidden_layers + 1
    output = inspect_tokens(model, tokenizer, ids, start=2)
    for seen, said in zip(layers[-1].tokens, output, strict=True):
        assert seen.probability == pytest.approx(said.probability, rel=1e-4)
        assert (seen.token_id, seen.rank, seen.forced) == (said.token_id, said.rank, said.forced)
        assert [each.token_id for each in seen.alternatives] == [each.token_id for each in said.alternatives]


def test_an_inner_layer_is_a_model_that_ends_there(tokenizer, ids):
    changes = {"backout": False, "final_logit_softcapping": 5.0, "value_embeddings": False}
    model = make_model(vocab_size=len(tokenizer), max_position_embeddings=256, **changes)
    layers = inspect_layers(model, tokenizer, ids)
    for depth in (1, 2, 3):
        model.config.num_hidden_layers = depth
        expected = [token.probability for token in inspect_tokens(model, tokenizer, ids)]
        assert [token.probability for token in layers[depth].tokens] == pytest.approx(expected, rel=1e-4)


def test_backout_is_taken_off_from_the_middle_on(tokenizer, ids):
    model = make_model(vocab_size=len(tokenizer), max_position_embeddings=256, backout=True)
    with torch.no_grad():
        model.model.backout_scale.fill_(0.5)
        kept = []
        hooks = [
            layer.register_forward_hook(lambda _, __, output: kept.append(output)) for layer in model.model.layers
        ]
        model(torch.tensor([ids]))
        for hook in hooks:
            hook.remove()
        for depth, hidden_states in ((2, kept[1]), (3, kept[2]), (4, kept[3])):  # the middle is layer 3 of 4
            states = hidden_states - (0.5 * kept[2] if depth >= 3 else 0)
            cap = model.config.final_logit_softcapping
            logits = torch.tanh(model.lm_head(model.model.norm(states)) / cap) * cap
            expected = logits[0, :-1].softmax(-1).gather(1, torch.tensor(ids)[1:, None])[:, 0]
            layer = inspect_layers(model, tokenizer, ids)[depth]
            assert [token.probability for token in layer.tokens] == pytest.approx(expected.tolist(), rel=1e-3)


def test_what_cannot_be_inspected_is_refused(chat_model, tokenizer, ids):
    with pytest.raises(UserError, match="nothing to inspect"):
        inspect_tokens(chat_model, tokenizer, ids[:1])
    with pytest.raises(UserError, match="context holds 256"):
        inspect_layers(chat_model, tokenizer, ids * 50)
