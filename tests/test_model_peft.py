"""LoRA by the published names: trained, merged, saved, loaded again, and used through a pipeline."""

import pytest
import torch
from conftest import make_model
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, pipeline

import chatmodel
from chatmodel.checkpoint import save_model_folder


def random_ids(*shape, seed=1):
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def folder(chat_model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "sft"
    save_model_folder(chat_model, tokenizer, folder, card=["A test."])
    return folder


@pytest.mark.parametrize("gated", [False, True])
def test_a_config_without_names_takes_every_matrix_but_gates_and_head(gated):
    adapted = get_peft_model(make_model(gated_mlp=gated), LoraConfig(task_type=TaskType.CAUSAL_LM))
    ends = {name.rpartition(".")[2] for name in adapted.targeted_module_names}
    assert ends == set(chatmodel.LORA_TARGETS) - (set() if gated else {"gate_proj"})
    assert len(adapted.targeted_module_names) == 4 * len(ends)
    assert not any("value" in name or "head" in name for name in adapted.targeted_module_names)


def test_an_adapter_learns_is_merged_saved_and_loaded(folder, tokenizer, tmp_path):
    start = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([tokenizer.encode("What is 12 plus 30?")])
    before = start(ids).logits
    adapted = get_peft_model(start, LoraConfig(r=4, lora_alpha=8, task_type=TaskType.CAUSAL_LM))
    torch.testing.assert_close(adapted(ids).logits, before)  # B starts at zero
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(10):
        loss = adapted(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    adapted.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted(ids).logits
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected, atol=1e-4, rtol=0)
        save_model_folder(merged, tokenizer, tmp_path / "merged", card=["A test."])
        torch.testing.assert_close(
            AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits, expected, atol=1e-4, rtol=0
        )
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter").eval()
        torch.testing.assert_close(again(ids).logits, expected)

    # The adapter's folder names its start; a pipeline finds both, and the calculator works on.
    tokenizer.save_pretrained(tmp_path / "adapter")
    chat = pipeline("text-generation", model=str(tmp_path / "adapter"))
    call = "<|bos|><|user_start|>12+30?<|user_end|><|assistant_start|><|python_start|>12+30<|python_end|>"
    (found,) = chat(call, max_new_tokens=4, do_sample=False, skip_special_tokens=False, add_special_tokens=False)
    assert found["generated_text"] == call + "<|output_start|>42<|output_end|>"


def test_an_adapter_with_new_tokens_and_trained_embeddings(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "start")
    model.resize_token_embeddings(101)
    config = LoraConfig(r=2, task_type=TaskType.CAUSAL_LM, modules_to_save=["embed_tokens", "lm_head", "value_embed"])
    adapted = get_peft_model(model, config)
    ids = torch.tensor([[1, 5, 99, 100]])
    adapted(ids, labels=ids).loss.backward()
    adapted.save_pretrained(tmp_path / "adapter")
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    start.resize_token_embeddings(101)
    again = PeftModel.from_pretrained(start, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, adapted.eval()(ids).logits)
        embeddings = again.get_input_embeddings()(ids)
        torch.testing.assert_close(again(inputs_embeds=embeddings).logits, again(ids).logits)


def test_a_reward_model_starts_from_a_language_model(folder, tokenizer, tmp_path):
    reward = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    short, long = tokenizer.encode("Yes."), tokenizer.encode("No, it is not.")
    padded = torch.tensor([short + [tokenizer.pad_token_id] * (len(long) - len(short)), long])
    mask = torch.tensor([[1] * len(short) + [0] * (len(long) - len(short)), [1] * len(long)])
    with torch.no_grad():
        together = reward(padded, attention_mask=mask).logits
        alone = torch.cat([reward(torch.tensor([ids])).logits for ids in (short, long)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    adapted = get_peft_model(reward, LoraConfig(task_type=TaskType.SEQ_CLS))
    adapted(padded, attention_mask=mask, labels=torch.tensor([1.0, 0.0])).loss.backward()
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1), tmp_path
    ).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(padded, attention_mask=mask).logits, together)
