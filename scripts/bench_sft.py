"""Fine-tuning speed on this device, by the Trainer of recipes/sft.py: `python scripts/bench_sft.py --depth 8`.

A random model on random conversations, whose lengths are spread as chats are (log-normal, median `--median`). Prints
one JSON object: tokens a second, padding and the first steps left out, and peak memory. `--stock` measures TRL's own
loss, packing and attention instead, with the same optimizer.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

from chatmodel.devices import choose_precision, peak_memory_bytes
from chatmodel.finetuning.rows import ConversationRows
from chatmodel.finetuning.trainer import ConversationTraining
from chatmodel.model import GPTForCausalLM
from chatmodel.posttraining import StageTraining, fit_to_device, use_device
from chatmodel.runtime import write_json
from chatmodel.scaling import plan_run
from chatmodel.trainer_callbacks import StopOnBadGradient


class FastTrainer(ConversationTraining, StageTraining, SFTTrainer):
    """As in recipes/sft.py."""


class StockTrainer(StageTraining, SFTTrainer):
    """TRL's, with our optimizer."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--vocab_size", type=int, default=32_768)
    parser.add_argument("--length", type=int, default=2048, help="of a row")
    parser.add_argument("--rows", type=int, default=16, help="a micro-batch")
    parser.add_argument("--accumulation", type=int, default=4, help="micro-batches a step")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=5, help="steps that are not timed")
    parser.add_argument("--median", type=int, default=300, help="tokens of a conversation")
    parser.add_argument("--stock", action="store_true", help="TRL's own loss and attention")
    parser.add_argument("--no_compile", action="store_true")
    return parser.parse_args()


def make_conversations(args: argparse.Namespace) -> Dataset:
    """Enough random conversations for the steps, half of their tokens trained."""
    random = np.random.default_rng(0)
    wanted = int(1.1 * args.length * args.rows * args.accumulation * args.steps)
    lengths = random.lognormal(np.log(args.median), 1.0, size=1 + 2 * wanted // args.median).clip(8, args.length)
    lengths = lengths.astype(int)[: int(np.searchsorted(lengths.astype(int).cumsum(), wanted)) + 1]
    ids = [random.integers(1, args.vocab_size, size=length).tolist() for length in lengths]
    labels = [[-100] * (len(row) // 2) + row[len(row) // 2 :] for row in ids]
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "source": ["random"] * len(ids)})


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that nothing is asked of."""
    words = {"<|pad|>": 0, "<|end|>": 1}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<|pad|>")),
        pad_token="<|pad|>",
        eos_token="<|end|>",
    )


class StepClock(TrainerCallback):
    """When each step ended, the device being done with it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def build_trainer(args: argparse.Namespace, folder: Path, clock: StepClock) -> Any:
    plan = plan_run(args.depth, vocab_size=args.vocab_size, sequence_length=args.length)
    write_json(folder / "plan.json", plan.as_dict())
    training = SFTConfig(
        output_dir=str(folder / "checkpoints"),
        max_length=args.length,
        max_steps=args.steps,
        per_device_train_batch_size=args.rows,
        gradient_accumulation_steps=args.accumulation,
        packing=True,
        max_grad_norm=0.0,
        report_to="none",
        save_strategy="no",
        logging_steps=args.steps,
        disable_tqdm=True,
        bf16=False,
        activation_checkpointing=False,
    )
    torch.manual_seed(0)
    model, conversations = GPTForCausalLM(plan.model_config()), make_conversations(args)
    common = {
        "model": model,
        "args": training,
        "processing_class": make_tokenizer(),
        "callbacks": [StopOnBadGradient(), clock],
        "plan_folder": folder,
        "lr_fraction": 0.01,
    }
    if args.stock:
        fit_to_device(training, None)
        return StockTrainer(train_dataset=conversations.select_columns(["input_ids", "labels"]), **common)
    compiled = training.device.type == "cuda" and not args.no_compile
    precision = choose_precision(training.device)
    use_device(training)
    rows = ConversationRows(conversations, length=args.length, batch_size=args.rows, pad_token_id=0, fixed=compiled)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return FastTrainer(rows=rows, dtype=dtype, compiled=compiled, **common)


def main() -> None:
    args = parse()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("chatmodel").setLevel(logging.INFO)
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(args, Path(folder), clock)
        trainer.train()
    steps = args.steps - args.warmup
    seconds = clock.times[-1] - clock.times[args.warmup - 1]
    positions = args.rows * args.accumulation * args.length
    fill = 1.0
    if not args.stock:
        fill = sum(len(t) for t in (trainer.rows.tokens,)) / (len(trainer.rows.rows) * args.length)
    found = {
        **vars(args),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "tokens_per_second": positions * fill * steps / seconds,
        "seconds_per_step": seconds / steps,
        "row_fill": fill,
        "attention": None if args.stock else sorted(set(trainer.loss.attention.values())),
        "peak_memory_gib": peak_memory_bytes(trainer.args.device) / 2**30,
        "first_step_to_last_seconds": clock.times[-1] - clock.times[0],
        "loss": next(entry["loss"] for entry in reversed(trainer.state.log_history) if "loss" in entry),
    }
    sys.stdout.write(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
