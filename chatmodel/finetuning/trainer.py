"""What does fine-tuning change in TRL's SFTTrainer: loss, gradients, weights, measurements, the clock?"""

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR

from chatmodel.finetuning.evaluation import TaskCheck, ValidationLoss, answer_samples, ask_tasks
from chatmodel.finetuning.loss import INPUTS, Batch, PackedLoss
from chatmodel.finetuning.rows import ConversationRows, StreamRows
from chatmodel.finetuning.schedule import rate_multiplier
from chatmodel.gradients import GraphedGradients, adding_gradients, check_graphs
from chatmodel.optim.optimizer import MuonAdamW
from chatmodel.runtime import UserError, logger
from chatmodel.train_step import keep_masters_in_optimizer
from chatmodel.training.state import TrainingClock

LOSS_SCALES = ("tokens", "nanochat")


class ConversationTraining:
    """Makes TRL's SFTTrainer, which it is mixed into, train as fast as pretraining does.

    The loss is `PackedLoss`'s. In bf16 the weights are rounded once a step from fp32 masters that `MuonAdamW` keeps,
    and gradients add up in fp32. Ranks sum their gradients once a step. Weights divided by FSDP are not for it.

    Args:
        rows: what is trained on; they take the place of the Trainer's own data set, packing and collator.
        dtype: of the weights while they are trained.
        compiled: `torch.compile`; not for adapters or activation checkpointing.
        loss_scale: "tokens", the default, divides a step's summed loss by its trained tokens, as Transformers does,
            so that each counts the same however micro-batches and ranks share them. "nanochat" takes the mean of the
            micro-batches' means, as karpathy/nanochat@c75fe54 scripts/chat_sft.py does: a token counts more where it
            has few beside it, and the result depends on the size of a micro-batch.
        cuda_graphs: micro-batches are replayed as CUDA graphs (`GraphedGradients`), by default where they can be; not
            with "nanochat", whose steps may differ in what a micro-batch's loss is divided by.
        constant_fraction: share of the steps before rates fall, linearly to 0; None for the Trainer's own schedule.
        validation, tasks: what an evaluation measures, beside the samples it writes.
        Everything else goes to the Trainer.
    """

    accelerator: Any
    args: Any
    model: Any
    state: Any
    control: Any
    callback_handler: Any
    processing_class: Any

    def __init__(
        self,
        *,
        rows: ConversationRows | StreamRows,
        dtype: torch.dtype,
        compiled: bool,
        args: Any,
        loss_scale: str = "tokens",
        cuda_graphs: bool | None = None,
        constant_fraction: float | None = None,
        validation: ValidationLoss | None = None,
        tasks: TaskCheck | None = None,
        **kwargs: Any,
    ) -> None:
        if loss_scale not in LOSS_SCALES:
            raise UserError(f"loss_scale={loss_scale!r} must be one of {', '.join(LOSS_SCALES)}")
        self.rows, self.dtype, self.compiled, self.loss_scale = rows, dtype, compiled, loss_scale
        self.constant_fraction = constant_fraction
        self.validation, self.tasks = validation, tasks or TaskCheck()
        self.loss: PackedLoss | None = None
        self.cuda_graphs = cuda_graphs
        self.graphs: GraphedGradients | None = None
        self.clock = TrainingClock(args.device)
        self.window_tokens, self.window_seconds, self.is_warm = 0, 0.0, False
        self.train_tokens, self.train_seconds = 0, 0.0  # without the first step, which compiles
        args.packing = args.padding_free = False  # the rows are packed
        args.dataset_kwargs, args.remove_unused_columns = {"skip_prepare_dataset": True}, False
        # Neither waits for the device at every micro-batch.
        args.logging_nan_inf_filter, args.accelerator_config.non_blocking = False, args.device.type == "cuda"
        super().__init__(
            args=args,
            data_collator=rows.collate,
            train_dataset=rows.dataset,
            eval_dataset=None if validation is None else validation.rows.dataset,
            **kwargs,
        )  # type: ignore[call-arg]
        self.loss_is_scaled_for_ga = True

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """What the Trainer calls once, before training: the weights get their precision, and the loss is prepared."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)  # type: ignore[misc]
        if self.loss is None:
            if isinstance(optimizer, MuonAdamW) and self.dtype != torch.float32:
                for parameter in optimizer.parameters:
                    optimizer.state[parameter]["master"] = parameter.detach().clone()
            keep_masters_in_optimizer(self.model, self.dtype)
            plain = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
            size, length = self.rows.batch_size, self.rows.length
            self.loss = PackedLoss(plain, batch_size=size, length=length, compiled=self.compiled)
            wanted = self.cuda_graphs if self.loss_scale == "tokens" else False
            if check_graphs(wanted, self.args.device, compiled=self.compiled, divided=False):
                self.graphs = GraphedGradients(self._add_gradients, self.model, wanted=wanted)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """What the Trainer calls once, behind `create_optimizer`."""
        if self.constant_fraction is None:
            return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]
        multiply = partial(rate_multiplier, steps=num_training_steps, constant_fraction=self.constant_fraction)
        self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, multiply)  # type: ignore[attr-defined]
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor]:
        """The micro-batches of a step, and how many trained tokens they hold, on all ranks."""
        batches = list(islice(epoch_iterator, num_batches))
        self.window_tokens += sum(batch["num_tokens"] for batch in batches)
        # Filled on the device: a copy from the host would wait for all that the device still has to do.
        trained = torch.full((), float(sum(batch["num_trained"] for batch in batches)), device=device)
        return batches, self.accelerator.reduce(trained, "sum").clamp(min=1)

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """This micro-batch's share of the step's loss; see `loss_scale`."""
        assert self.loss is not None
        assert not return_outputs
        if self.loss_scale == "tokens":
            return self.loss(inputs, divisor=num_items_in_batch)
        shares = self.current_gradient_accumulation_steps * self.accelerator.num_processes  # type: ignore[attr-defined]
        return self.loss(inputs, divisor=None) / shares

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: torch.Tensor | None = None) -> torch.Tensor:
        """Add a micro-batch's gradient to those so far, and with the last one all ranks' together."""
        batch = {name: inputs[name] for name in (*INPUTS, "shift_labels")} | {"divisor": num_items_in_batch}
        loss = self._add_gradients(batch) if self.graphs is None else self.graphs.add(batch)
        if self.accelerator.sync_gradients and self.accelerator.num_processes > 1:
            sum_gradients(self.model)
        return loss * self.accelerator.num_processes  # the Trainer logs the mean over the ranks

    def _add_gradients(self, batch: Batch) -> torch.Tensor:
        inputs = {name: tensor for name, tensor in batch.items() if name != "divisor"}
        with adding_gradients(self.model):
            loss: torch.Tensor = super().training_step(self.model, inputs, batch["divisor"])  # type: ignore[misc]
        return loss

    def floating_point_ops(self, inputs: Batch) -> int:
        """Not counted: it takes longer than to launch a micro-batch."""
        return 0

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Add speed, of steps alone, to what the Trainer logs of training."""
        if "loss" in logs:
            self._count_time()
            tokens = torch.tensor(self.window_tokens, dtype=torch.float64, device=self.args.device)
            tokens = self.accelerator.reduce(tokens, "sum").item()
            logs |= {"tokens_per_second": tokens / max(self.window_seconds, 1e-9)}
            if self.is_warm:
                self.train_tokens, self.train_seconds = (
                    self.train_tokens + int(tokens),
                    self.train_seconds + self.window_seconds,
                )
            self.window_tokens, self.window_seconds, self.is_warm = 0, 0.0, True
        super().log(logs, start_time)  # type: ignore[misc]

    def _count_time(self) -> None:
        self.window_seconds += self.clock.lap()

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure what `validation` and `tasks` say, and write samples, into the log; it is no training time."""
        assert self.loss is not None
        if self.graphs is not None:
            self.graphs.release()
        self._count_time()
        step = self.state.global_step
        metrics: dict[str, float] = {}
        if self.validation is not None:
            found = self.validation.measure(self.loss)
            metrics = {"eval_loss": found["loss"], "eval_bits_per_byte": found["bits_per_byte"]}
            metrics |= {f"eval_{name}_loss": value for name, value in found["sources"].items()}
            logger.info("step %d | validation loss %.4f, %.4f bits per byte", step, *list(metrics.values())[:2])
        if self.tasks.is_due(step, is_last=step == self.state.max_steps):
            accuracies = ask_tasks(self.loss, self.processing_class, self.tasks)
            metrics |= {f"eval_{name}_accuracy": value for name, value in accuracies.items()}
        record = {"step": step, "samples": answer_samples(self.loss, self.processing_class)}
        self.state.log_history.append(record)  # text is not for the trackers that `log` hands on to
        super().log(dict(metrics))  # type: ignore[misc]
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.clock.restart()
        return metrics

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._count_time()
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        self.clock.restart()

    @property
    def tokens_per_second(self) -> float | None:
        """The mean since the first log line, before which kernels are chosen and compiled; None if nothing came after.

        Evaluations and checkpoints do not count.
        """
        return self.train_tokens / self.train_seconds if self.train_seconds else None

    def finish(self) -> None:
        """Measure the end, unless that is done, and give the model its own parts and its fp32 weights back.

        What is handed on then loses nothing to rounding.
        """
        assert self.loss is not None
        measured = [entry["step"] for entry in self.state.log_history if "samples" in entry]
        if self.validation is not None and self.state.global_step not in measured:
            self.evaluate()
        if self.graphs is not None:
            self.graphs.forget()
        self.loss.remove()
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)  # type: ignore[attr-defined]
        for parameter in self.model.parameters():
            master = optimizer.state.get(parameter, {}).get("master")
            parameter.grad = None
            parameter.data = parameter.data.float() if master is None else master.clone()


@torch.no_grad()
def sum_gradients(model: torch.nn.Module) -> None:
    """Give every rank the sum of all ranks' gradients."""
    work = [dist.all_reduce(p.grad, async_op=True) for p in model.parameters() if p.grad is not None]
    for pending in work:
        pending.wait()
