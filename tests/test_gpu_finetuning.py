"""Fine-tuning on a CUDA device: compiled, in bf16, with the kernels that are chosen there."""

import pytest
import torch
from conftest import make_model
from tiny_finetuning import LENGTH, build_trainer

pytestmark = pytest.mark.gpu

SHAPE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": LENGTH}


@pytest.mark.parametrize("options", [{}, {"window_pattern": "SL", "sliding_window": 6}])
def test_compiled_training_is_near_plain_training_in_fp32(tmp_path, tokenizer, options):
    """Losses of ten steps within what bf16 rounds away; one graph, also for the last, smaller batch of an epoch."""
    losses = {}
    for kind, fast in (("fast", True), ("plain", False)):
        trainer = build_trainer(
            tmp_path,
            tokenizer,
            model=make_model(**SHAPE | options),
            compiled=fast,
            dtype=torch.bfloat16 if fast else torch.float32,
            max_steps=10,
            gradient_accumulation_steps=2,
            use_cpu=False,
            train_sampling_strategy="sequential",
        )
        trainer.train()
        assert (trainer.graphs is not None and sorted(trainer.graphs.graphs) == [False, True]) == fast
        trainer.finish()
        losses[kind] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    # On the CPU, four seeds, bf16 is at most 0.011 from fp32 in the first three losses and 0.068 in all ten.
    assert losses["fast"][:3] == pytest.approx(losses["plain"][:3], rel=0.015)
    assert losses["fast"] == pytest.approx(losses["plain"], rel=0.1)


def test_a_full_memory_is_one_sentence(tmp_path, tokenizer):
    from chatmodel.posttraining import explain_memory
    from chatmodel.runtime import UserError

    trainer = build_trainer(tmp_path, tokenizer, use_cpu=False, max_steps=1)
    with pytest.raises(UserError, match="per_device_train_batch_size=2"), explain_memory(trainer.args):
        torch.empty(2**50, dtype=torch.uint8, device="cuda")
