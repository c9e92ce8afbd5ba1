"""Embeddings in place of ids, learned prompts, and a vocabulary that grows."""

import pytest
import torch
from conftest import make_model
from peft import PromptTuningConfig, get_peft_model

from chatmodel.model.embeddings_gpt import find_tokens

PLAIN = {"window_pattern": "L", "value_embeddings": False, "residual_scalars": False, "backout": False}


def random_ids(*shape, seed=1):
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["extras", "plain"])
def model(request):
    return make_model(**({} if request.param == "extras" else PLAIN))


def test_tokens_are_found_by_their_embeddings():
    table = torch.randn(50, 64)
    table[7] = table[3]  # of equal rows the first counts
    table[9] = table[8]
    table[9, 40] += 1e-3  # equal in all that is hashed
    ids = torch.tensor([[0, 49, 7], [8, 9, 20]])
    embeddings = table[ids]
    embeddings[0, 1] += 1e-6
    for cast in (torch.float32, torch.bfloat16):
        found, soft = find_tokens(embeddings.to(cast), table.to(cast))
        known = ~soft
        assert torch.equal(table.to(cast)[found[known]], embeddings.to(cast)[known])
        if cast == torch.float32:
            assert soft.tolist() == [[False, True, False], [False, True, False]]
            assert found[known].tolist() == [0, 3, 8, 20]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_do_what_their_ids_do(model, dtype):
    model, ids = model.to(dtype), random_ids(2, 14)
    embeddings = model.get_input_embeddings()(ids)
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embeddings).logits, model(ids).logits)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **settings)[:, 14:]
    assert torch.equal(model.generate(inputs_embeds=embeddings, **settings), expected)
    assert torch.equal(model.generate(inputs_embeds=embeddings, num_beams=1, use_cache=False, **settings), expected)


def test_what_is_no_token_has_no_value_embedding():
    """As in a model whose value tables hold zeros; all other tokens keep theirs."""
    model, ids = make_model(), random_ids(1, 8)
    ids[0, 3] = 96  # this token stands nowhere else
    ids[0, ids[0] == 96] = torch.where(torch.arange(8)[ids[0] == 96] == 3, 96, 0)
    embeddings = model.get_input_embeddings()(ids).clone()
    embeddings[0, 3] *= 2  # the norm behind it takes this out again, but it is no token any more
    with torch.no_grad():
        found = model(inputs_embeds=embeddings).logits
        for layer in model.model.layers:
            if layer.self_attn.value_embed is not None:
                layer.self_attn.value_embed.weight[96] = 0
        torch.testing.assert_close(found, model(ids).logits, atol=1e-5, rtol=0)


def test_ids_and_embeddings_exclude_each_other(model):
    ids = random_ids(1, 3)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(ids, inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


def test_a_prompt_can_be_learned(model):
    adapted = get_peft_model(model, PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    ids = random_ids(2, 9)
    adapted(input_ids=ids, labels=ids).loss.backward()
    gradient = adapted.prompt_encoder["default"].embedding.weight.grad
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0
    output = adapted.eval().generate(input_ids=ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert output.shape == (2, 14)


@pytest.mark.parametrize("new_size", [120, 60])
def test_a_new_vocabulary_size_reaches_every_table(model, new_size, tmp_path):
    ids = random_ids(2, 9) % 60
    with torch.no_grad():
        expected = model(ids).logits[..., :60]
        model.resize_token_embeddings(new_size)
        torch.testing.assert_close(model(ids).logits[..., :60], expected)
        model(torch.full((1, 3), new_size - 1))
    sizes = {len(each.weight) for each in model.modules() if isinstance(each, torch.nn.Embedding)}
    assert sizes == {new_size} == {model.config.vocab_size}
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
