"""How a base model is pretrained: what is asked for, the state that is kept, and the loop."""

import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, default_collate

from chatmodel.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint, save_model_folder
from chatmodel.data.rows import PackedRows, validation_rows
from chatmodel.data.store import TokenStore, ensure_token_store
from chatmodel.evaluation.bits_per_byte import bits_per_byte
from chatmodel.evaluation.core import evaluate_core
from chatmodel.evaluation.samples import complete_sample_prompts
from chatmodel.model import GPTForCausalLM
from chatmodel.runs import Run, Stage
from chatmodel.runtime import UserError, logger, peak_memory_bytes, write_json
from chatmodel.scaling import RunPlan, plan_run
from chatmodel.tokenizer import calculator_table, load_tokenizer, token_byte_lengths
from chatmodel.train_step import TrainStep

# Dense bf16 FLOPs per second by datasheet; the first name found in the device's name counts.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}


@dataclass
class PretrainArguments:
    """What can be asked of pretraining; None means: as the plan derives it from `depth`."""

    run_dir: Path = field(default=Path("runs/base"), metadata={"help": "The run folder."})
    dataset: str = field(
        default="karpathy/climbmix-400b-shuffle",
        metadata={"help": "A Hub name, a folder of parquet/jsonl/txt files, or 'embedded'."},
    )
    text_column: str = field(default="text", metadata={"help": "The column or field that holds the text."})
    depth: int = field(default=12, metadata={"help": "The dial: number of layers; all else follows from it."})
    recipe: str = field(default="chatmodel", metadata={"help": "'chatmodel', or 'seed' for nanochat's of Oct 2025."})
    sequence_length: int = field(default=2048, metadata={"help": "Tokens a row, and the model's context."})
    head_dim: int = field(default=128, metadata={"help": "Channels of an attention head."})
    window_pattern: str | None = field(default=None, metadata={"help": "S (window) and L (full), tiled over layers."})
    tokens_per_parameter: float | None = field(default=None, metadata={"help": "Training tokens a parameter."})
    train_tokens: int | None = field(default=None, metadata={"help": "Overrides the planned number of tokens."})
    max_steps: int | None = field(default=None, metadata={"help": "Overrides the planned number of steps."})
    total_batch_tokens: int | None = field(default=None, metadata={"help": "Tokens a step, over all devices."})
    device_batch_size: int = field(default=32, metadata={"help": "Rows a device holds at once."})
    lr_fraction: float = field(default=1.0, metadata={"help": "Factor on every planned learning rate."})
    packing: str = field(default="best_fit", metadata={"help": "'best_fit' or 'contiguous' rows."})
    seed: int = field(default=42, metadata={"help": "Seed of the weights and of the order of documents."})
    mixed_precision: str | None = field(default=None, metadata={"help": "'bf16' or 'no'; by default what is faster."})
    compile: bool | None = field(default=None, metadata={"help": "torch.compile; by default on CUDA only."})
    eval_every: int = field(default=250, metadata={"help": "Steps between validation measurements."})
    eval_tokens: int = field(default=20 * 2**19, metadata={"help": "Validation tokens of each measurement."})
    eval_bundle: Path | None = field(default=None, metadata={"help": "CORE bundle (zip or folder) for estimates."})
    core_every: int = field(default=2000, metadata={"help": "Steps between CORE estimates, if there is a bundle."})
    core_max_per_task: int = field(default=500, metadata={"help": "Examples a task in those estimates."})
    sample_every: int = field(default=2000, metadata={"help": "Steps between sample completions."})
    save_every: int = field(default=500, metadata={"help": "Steps between checkpoints."})
    log_every: int = field(default=10, metadata={"help": "Steps between log lines."})
    tracker: str | None = field(default=None, metadata={"help": "'tensorboard', 'wandb' or 'trackio'."})
    dry_run: bool = field(default=False, metadata={"help": "Print the plan and stop."})

    def __post_init__(self) -> None:
        self.run_dir = Path(self.run_dir)
        self.eval_bundle = Path(self.eval_bundle) if self.eval_bundle else None
        for name in ("eval_every", "eval_tokens", "core_every", "sample_every", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.eval_bundle is not None and not self.eval_bundle.exists():
            raise UserError(f"eval_bundle {self.eval_bundle} does not exist; leave it out, or give the zip or folder")

    def plan(self, vocab_size: int) -> RunPlan:
        """The plan these arguments lead to."""
        return plan_run(
            self.depth,
            vocab_size=vocab_size,
            sequence_length=self.sequence_length,
            recipe=self.recipe,
            head_dim=self.head_dim,
            tokens_per_parameter=self.tokens_per_parameter,
            train_tokens=self.train_tokens,
            max_steps=self.max_steps,
            total_batch_tokens=self.total_batch_tokens,
            window_pattern=self.window_pattern,
        )


@dataclass
class TrainState:
    """What a resumed run must know beyond weights and optimizer; kept by Accelerate in every checkpoint."""

    step: int = 0
    train_seconds: float = 0.0
    smooth_loss: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """Plain values of all fields."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the values back."""
        vars(self).update(state)

    def debiased_loss(self) -> float:
        """The smoothed training loss, in nats a token, freed of its start at zero."""
        return self.smooth_loss / (1 - 0.9**self.step) if self.step else math.nan


def open_stores(args: PretrainArguments, plan: RunPlan, tokenizer: Any, run: Run) -> tuple[TokenStore, TokenStore]:
    """The token stores a run trains and validates on, built where they are not there yet."""
    return ensure_token_store(
        args.dataset,
        tokenizer,
        run.folder("data"),
        # Best-fit rows leave out the ends of long documents, so more text is read than is trained on.
        max_train_tokens=int(1.5 * plan.train_tokens),
        max_validation_tokens=args.eval_tokens,
        text_column=args.text_column,
        rebuild=latest_checkpoint(run.checkpoints("base")) is None,
    )


class Pretraining:
    """One pretraining run: its parts are built once and then driven by `train`."""

    def __init__(self, args: PretrainArguments, run: Run, accelerator: Accelerator) -> None:
        self.args, self.run, self.accelerator = args, run, accelerator
        self.tokenizer = load_tokenizer(run.folder("tokenizer"))
        self.plan = args.plan(len(self.tokenizer))
        self.checkpoints = run.checkpoints("base")
        with accelerator.main_process_first():
            stores = open_stores(args, self.plan, self.tokenizer, run)
        self.train_store, self.validation_store = stores
        self.token_bytes = token_byte_lengths(self.tokenizer).to(accelerator.device)

        torch.manual_seed(args.seed)
        config = self.plan.model_config(
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            calculator=calculator_table(self.tokenizer),
        )
        self.model = GPTForCausalLM(config)
        self.train_step = TrainStep(
            self.model,
            self.plan,
            accelerator,
            device_batch_size=args.device_batch_size,
            lr_fraction=args.lr_fraction,
            compile=args.compile,
        )
        self.rows = PackedRows(
            self.train_store,
            sequence_length=args.sequence_length,
            packing=args.packing,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            seed=args.seed,
        )
        self.state = TrainState()
        accelerator.register_for_checkpointing(self.state)
        self.stop_requested = False

    def train(self) -> None:
        """Run the remaining steps, with measurements and checkpoints on the way."""
        self._resume()
        signal.signal(signal.SIGTERM, self._request_stop)
        batches = self._batches()
        batch = next(batches)
        while self.state.step < self.plan.steps:
            if self.state.step % self.args.eval_every == 0:
                self._measure()
            began = time.perf_counter()
            for _ in range(self.train_step.accumulation):
                self.train_step.accumulate(batch)
                position = self.rows.state_dict()
                batch = next(batches)  # the device is still busy with the micro-batch just given to it
            self._finish_step(began)
            self._save_if_due(position)
        self._measure()

    def _finish_step(self, began: float) -> None:
        result = self.train_step.finish(self.state.step)
        if not result.updated:
            raise UserError(
                f"the loss became {result.loss} and the gradient's norm {result.gradient_norm} at step "
                f"{self.state.step}, before this step's update; the last checkpoint in {self.checkpoints} is good: "
                "lower lr_fraction or check the data"
            )
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        state = self.state
        state.step += 1
        state.train_seconds += seconds
        state.smooth_loss = 0.9 * state.smooth_loss + 0.1 * result.loss
        if state.step % self.args.log_every == 0 or state.step in (1, self.plan.steps):
            self._log_step(result.loss, result.lr_multiplier, seconds)

    def _log_step(self, loss: float, multiplier: float, seconds: float) -> None:
        state, plan = self.state, self.plan
        speed = plan.total_batch_tokens / seconds
        mfu = self.flops_share(speed)
        state.history.append(
            {
                "step": state.step,
                "loss": state.debiased_loss(),
                "lr_multiplier": multiplier,
                "tokens_per_second": speed,
            }
        )
        logger.info(
            "step %d/%d | loss %.4f | lr x%.2f | %s tok/s%s | %.1f min left",
            state.step,
            plan.steps,
            state.debiased_loss(),
            multiplier,
            f"{speed:,.0f}",
            "" if mfu is None else f" | MFU {100 * mfu:.1f} %",
            (plan.steps - state.step) * state.train_seconds / state.step / 60,
        )
        self.accelerator.log({"train/loss": loss, "train/tokens_per_second": speed}, step=state.step)

    def flops_share(self, tokens_per_second: float) -> float | None:
        """Model FLOPs utilisation: the share of the devices' datasheet bf16 rate; None where that is unknown."""
        device = self.accelerator.device
        if device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(device)
        peak = next((rate for key, rate in PEAK_FLOPS.items() if key in name), None)
        if peak is None:
            return None
        return tokens_per_second * self.plan.flops_per_token / (peak * self.accelerator.num_processes)

    def _measure(self) -> None:
        """Validation bits per byte, and now and then CORE and samples."""
        step, last = self.state.step, self.state.step == self.plan.steps
        if self.state.evaluations and self.state.evaluations[-1]["step"] == step:
            return  # a resumed run has this one
        self.model.eval()
        results: dict[str, float] = {"step": step, "val_bpb": self._validation_bpb()}
        if self.args.eval_bundle is not None and step and (last or step % self.args.core_every == 0):
            with self.accelerator.autocast():
                core = evaluate_core(
                    self.model, self.tokenizer, self.args.eval_bundle, max_per_task=self.args.core_max_per_task
                )
            results["core"] = core["core"]
        if step and not last and step % self.args.sample_every == 0:
            for sample in self.sample():
                logger.info("%s%s", sample["prompt"], sample["completion"])
        self.model.train()
        self.state.evaluations.append(results)
        logger.info("step %d | validation bpb %.4f", step, results["val_bpb"])
        named = {f"val/{key}": value for key, value in results.items() if key != "step"}
        self.accelerator.log(named, step=step)

    def _validation_bpb(self) -> float:
        rows = list(
            validation_rows(
                self.validation_store,
                sequence_length=self.args.sequence_length,
                max_tokens=self.args.eval_tokens,
            )
        )[self.accelerator.process_index :: self.accelerator.num_processes]
        size = self.args.device_batch_size
        batches = (default_collate(rows[begin : begin + size]) for begin in range(0, len(rows), size))
        with self.accelerator.autocast():
            return bits_per_byte(self.model, batches, self.token_bytes)

    def sample(self) -> list[dict[str, str]]:
        """Completions of the sample prompts."""
        with self.accelerator.autocast():
            return complete_sample_prompts(self.model, self.tokenizer)

    def _batches(self) -> Iterator[dict[str, torch.Tensor]]:
        device = self.accelerator.device
        pin = device.type == "cuda"
        for batch in DataLoader(self.rows, batch_size=self.args.device_batch_size, pin_memory=pin):
            yield {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}

    def _save_if_due(self, position: dict[str, Any]) -> None:
        """Save with the rows' `position` as it was before the next step's first batch was drawn."""
        finished = self.state.step == self.plan.steps
        if not (finished or self.stop_requested or self.state.step % self.args.save_every == 0):
            return
        save_checkpoint(self.accelerator, self.checkpoints, self.state.step, position)
        if self.stop_requested and not finished:
            raise UserError(
                f"stopped by a signal after step {self.state.step}, which is saved; start again to continue"
            )

    def _request_stop(self, *_: Any) -> None:
        self.stop_requested = True

    def _resume(self) -> None:
        folder = latest_checkpoint(self.checkpoints)
        if folder is not None:
            self.rows.load_state_dict(load_checkpoint(self.accelerator, folder))
            logger.info("continuing from %s", folder)

    def finish(self, stage: Stage) -> None:
        """Write the model folder and the results."""
        if not self.accelerator.is_main_process:
            return
        state, plan = self.state, self.plan
        self.model.eval()
        speed = state.step * plan.total_batch_tokens / state.train_seconds
        val_bpbs = [evaluation["val_bpb"] for evaluation in state.evaluations]
        metrics = {
            "plan": plan.as_dict(),
            "parameters": plan.parameters,
            "flops_per_token": plan.flops_per_token,
            "total_flops": plan.total_flops,
            "train_tokens": plan.train_tokens,
            "steps": plan.steps,
            "train_seconds": state.train_seconds,
            "tokens_per_second": speed,
            "mfu": self.flops_share(speed),
            "peak_memory_bytes": peak_memory_bytes(self.accelerator.device),
            "world_size": self.accelerator.num_processes,
            "device": str(self.accelerator.device),
            "device_batch_size": self.args.device_batch_size,
            "lr_fraction": self.args.lr_fraction,
            "packing": self.args.packing,
            "dataset": self.train_store.manifest,
            "val_bpb_min": min(val_bpbs),
            "val_bpb_final": val_bpbs[-1],
            "core_estimate": state.evaluations[-1].get("core"),
            "history": state.history,
            "evaluations": state.evaluations,
            "samples": self.sample(),
        }
        card = [
            f"A base model of {plan.parameters:,} parameters, pretrained on {plan.train_tokens:,} tokens of "
            f"`{self.args.dataset}`. Validation: {val_bpbs[-1]:.4f} bits per byte.",
        ]
        save_model_folder(self.model, self.tokenizer, stage.folder, card=card)
        write_json(stage.folder / "plan.json", plan.as_dict())
        stage.finish(metrics)
