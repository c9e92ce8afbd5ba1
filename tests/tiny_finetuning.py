"""What the tests of fine-tuning share: a few random conversations and a Trainer of a tiny model."""

import torch
from conftest import make_model
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from chatmodel.finetuning.rows import ConversationRows
from chatmodel.finetuning.trainer import ConversationTraining
from chatmodel.posttraining import StageTraining
from chatmodel.runtime import write_json
from chatmodel.scaling import plan_run
from chatmodel.trainer_callbacks import stage_callbacks

LENGTH = 24


class TinyTrainer(ConversationTraining, StageTraining, SFTTrainer):
    """As in recipes/sft.py."""


def make_conversations(count=40, vocab_size=97, seed=3):
    """Of 3 to 14 random ids, about half of them trained, never the first."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels = [], []
    for length in torch.randint(3, 15, (count,), generator=generator).tolist():
        row = torch.randint(1, vocab_size, (length,), generator=generator).tolist()
        trained = (torch.rand(length, generator=generator) < 0.5).tolist()
        trained[0], trained[-1] = False, True
        ids.append(row)
        labels.append([token if learn else -100 for token, learn in zip(row, trained, strict=True)])
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "source": ["A", "B"] * (count // 2)})


def build_trainer(
    folder,
    tokenizer,
    *,
    model=None,
    conversations=None,
    packed=True,
    rows=None,
    dtype=torch.float32,
    compiled=False,
    loss_scale="tokens",
    cuda_graphs=None,
    lr_fraction=0.1,
    constant_fraction=None,
    callbacks=(),
    validation=None,
    tasks=None,
    optimizers=(None, None),
    trainer_class=TinyTrainer,
    **settings,
):
    """A Trainer on `conversations`; `settings` are TRL's."""
    write_json(folder / "plan.json", plan_run(2, vocab_size=97, sequence_length=LENGTH, head_dim=16).as_dict())
    defaults = {
        "output_dir": str(folder / "checkpoints"),
        "max_length": LENGTH,
        "per_device_train_batch_size": 2,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 0.0,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "dataloader_pin_memory": False,
    }
    args = SFTConfig(**(defaults | settings))
    rows = rows or ConversationRows(
        make_conversations() if conversations is None else conversations,
        length=LENGTH,
        batch_size=args.per_device_train_batch_size,
        pad_token_id=0,
        packed=packed,
        fixed=compiled,
    )
    return trainer_class(
        model=make_model(max_position_embeddings=LENGTH) if model is None else model,
        rows=rows,
        dtype=dtype,
        compiled=compiled,
        loss_scale=loss_scale,
        cuda_graphs=cuda_graphs,
        constant_fraction=constant_fraction,
        validation=validation,
        tasks=tasks,
        optimizers=optimizers,
        args=args,
        processing_class=tokenizer,
        callbacks=[*stage_callbacks(), *callbacks],
        plan_folder=folder,
        lr_fraction=lr_fraction,
    )
