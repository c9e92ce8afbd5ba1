"""How good is the model that is being trained, without disturbing its training?"""

from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator

from chatmodel.data.rows import validation_rows
from chatmodel.data.store import TokenStore
from chatmodel.estimate.memory import validation_batch_rows
from chatmodel.evaluation.bits_per_byte import bits_per_byte
from chatmodel.evaluation.bundle import find_bundle
from chatmodel.evaluation.core import evaluate_core
from chatmodel.evaluation.samples import complete_sample_prompts
from chatmodel.runtime import logger
from chatmodel.tokenizer import token_byte_lengths
from chatmodel.train_step import TrainStep
from chatmodel.training.arguments import PretrainArguments
from chatmodel.training.loading import collate_batches
from chatmodel.training.sharding import evaluating_whole


class Measurements:
    """Validation bits per byte, and now and then CORE and samples; every rank takes part."""

    def __init__(
        self,
        args: PretrainArguments,
        step: TrainStep,
        *,
        store: TokenStore,
        tokenizer: Any,
        accelerator: Accelerator,
    ) -> None:
        self.args, self.train_step, self.accelerator = args, step, accelerator
        self.store, self.tokenizer = store, tokenizer
        # Fetched, or refused, before hours are spent.
        self.eval_bundle = None if args.eval_bundle is None else find_bundle(args.eval_bundle)
        self.batch_size = validation_batch_rows(args.sequence_length)
        self.token_bytes = token_byte_lengths(tokenizer).to(accelerator.device)

    def measure(self, step: int, *, is_last: bool) -> dict[str, float]:
        """`step`, `val_bpb`, and `core` where it is due; samples are logged."""
        results: dict[str, float] = {"step": step, "val_bpb": self.validation_bpb()}
        if self.eval_bundle is not None and step and (is_last or step % self.args.core_every == 0):
            with evaluating_whole(self.train_step) as model:
                core = evaluate_core(model, self.tokenizer, self.eval_bundle, max_per_task=self.args.core_max_per_task)
            results["core"] = core["core"]
        if step and not is_last and step % self.args.sample_every == 0:
            for sample in self.sample():
                logger.info("%s%s", sample["prompt"], sample["completion"])
        logger.info("step %d | validation bpb %.4f", step, results["val_bpb"])
        named = {f"val/{key}": value for key, value in results.items() if key != "step"}
        self.accelerator.log(named, step=step)
        return results

    def validation_bpb(self) -> float:
        """Bits per byte of the beginning of the validation text, rows shared among the ranks.

        A model is measured as it is trained: within documents if it has never seen across their borders.
        """
        rows = validation_rows(
            self.store,
            sequence_length=self.args.sequence_length,
            max_tokens=self.args.eval_tokens,
            documents_apart=self.args.documents_apart,
        )
        mine = islice(rows, self.accelerator.process_index, None, self.accelerator.num_processes)
        with evaluating_whole(self.train_step) as model, torch.no_grad():
            return bits_per_byte(model, collate_batches(mine, self.batch_size), self.token_bytes)

    def sample(self) -> list[dict[str, str]]:
        """Completions of the sample prompts."""
        with evaluating_whole(self.train_step) as model:
            return complete_sample_prompts(model, self.tokenizer)
