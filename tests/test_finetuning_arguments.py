"""What cannot be asked of mid-training and SFT is refused in one sentence that names the setting."""

import pytest
from trl import SFTConfig

from chatmodel.finetuning.arguments import ConversationArguments
from chatmodel.runtime import UserError


def check(arguments=None, context=None, **settings):
    training = SFTConfig(
        output_dir="unused",
        use_cpu=True,
        activation_checkpointing=False,
        **({"eval_strategy": "no", "bf16": False} | settings),
    )
    ConversationArguments(**(arguments or {})).check(training, context=context)


def test_what_can_be():
    check()
    check(context=2048, max_length=2048)
    check(max_steps=1, num_train_epochs=0, save_strategy="no", save_steps=0)
    check({"validation_mixture": ["A"], "chatcore_every": 20}, eval_strategy="steps", eval_steps=10)


@pytest.mark.parametrize(
    ("arguments", "settings", "named"),
    [
        ({"stage": "best"}, {}, "stage='best'"),
        ({"lr_fraction": 0}, {}, "lr_fraction=0"),
        ({"lr_fraction": -1.0}, {}, "lr_fraction=-1.0"),
        ({"lr_fraction": float("nan")}, {}, "lr_fraction=nan"),
        ({"loss_scale": "mean"}, {}, "loss_scale='mean'"),
        ({"loss_scale": "nanochat", "cuda_graphs": True}, {}, "cuda_graphs does not go with loss_scale='nanochat'"),
        ({"constant_fraction": 1.0}, {}, "constant_fraction=1.0"),
        ({"momentum_warmup_steps": 0}, {}, "momentum_warmup_steps=0"),
        ({"lora_rank": 0}, {}, "lora_rank=0"),
        ({}, {"max_length": None}, "max_length=None"),
        ({}, {"max_length": 0}, "max_length=0"),
        ({}, {"max_length": 4096, "context": 2048}, "the model's context of 2048"),
        ({}, {"per_device_train_batch_size": 0}, "per_device_train_batch_size=0"),
        ({}, {"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0"),
        ({}, {"max_steps": 0}, "max_steps=0 would train nothing"),
        ({}, {"num_train_epochs": 0}, "num_train_epochs=0"),
        ({}, {"save_steps": 0}, "save_steps=0"),
        ({}, {"seed": -1}, "seed=-1"),
        ({}, {"bf16": True}, "set mixed_precision"),
        ({}, {"learning_rate": 0.1}, "learning_rate is not read: rates are pretraining's times lr_fraction"),
        ({}, {"weight_decay": 0.1}, "weight_decay is not read"),
        ({}, {"optim": "sgd"}, "optim is not read"),
        ({}, {"eval_strategy": "steps", "eval_steps": 10}, "validation_mixture is empty"),
        ({"chatcore_every": 10}, {}, "chatcore_every=10"),
        (
            {"validation_mixture": ["A"], "chatcore_every": 15},
            {"eval_strategy": "steps", "eval_steps": 10},
            "multiple of eval_steps=10",
        ),
        ({}, {"packing_strategy": "bfd_split"}, "packing_strategy='bfd_split'"),
        ({}, {"loss_type": "dft"}, "loss_type='dft'"),
        ({}, {"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
        ({}, {"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0"),
        ({}, {"assistant_only_loss": True}, "assistant_only_loss=True"),
        ({"preview_masks": -1}, {}, "preview_masks=-1"),
    ],
)
def test_what_cannot_be(arguments, settings, named):
    with pytest.raises(UserError, match=named):
        check(arguments, **settings)
