"""In which order does a pretraining run train, save, measure and stop?"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator, DistributedType

from chatmodel.checkpoint import CheckpointWriter, latest_checkpoint, read_checkpoint
from chatmodel.data.rows import PackedRows
from chatmodel.model import GPTForCausalLM
from chatmodel.runs import Run, Stage
from chatmodel.runtime import UserError, logger, write_json
from chatmodel.tokenizer import calculator_table, load_tokenizer
from chatmodel.train_step import StepResult, StepUnderway, TrainStep
from chatmodel.training.arguments import PretrainArguments, open_stores
from chatmodel.training.bad_batch import as_records, describe_bad_rows, find_bad_rows
from chatmodel.training.batch_size import choose_device_batch_size, fit_device_batch_size
from chatmodel.training.evaluation import Measurements
from chatmodel.training.interruptions import StopRequested, StopSignals, collector_paused, freeze_garbage
from chatmodel.training.loading import Loader
from chatmodel.training.ranks import Ranks, check_launch
from chatmodel.training.results import flops_share, write_results
from chatmodel.training.sharding import divide_state, evaluating_whole
from chatmodel.training.state import (
    TrainingClock,
    TrainState,
    capture_randomness,
    copy_to_host,
    restore_randomness,
)

BAD_BATCH_FILE = "bad_batch.json"


class Pretraining:
    """One pretraining run: its parts are built once and then driven by `train`."""

    def __init__(self, args: PretrainArguments, run: Run, accelerator: Accelerator) -> None:
        self.args, self.run, self.accelerator = args, run, accelerator
        self.device = accelerator.device
        args.check_device(self.device, divided=accelerator.distributed_type == DistributedType.FSDP)
        self.ranks = Ranks(accelerator, timeout=args.rank_timeout)
        check_launch(accelerator)
        self.tokenizer = load_tokenizer(run.folder("tokenizer"))
        self.plan = args.plan(len(self.tokenizer))
        asked = 1 if args.auto_batch else args.device_batch_size
        self.device_batch_size = fit_device_batch_size(self.plan, asked, self.ranks.count)
        self.checkpoints = run.checkpoints("base")
        with self.ranks.explain_lost_rank(self.checkpoints), self.ranks.main_first():
            self.train_store, self.validation_store = open_stores(
                args, self.plan, self.tokenizer, run, is_main=self.ranks.is_main
            )
        torch.manual_seed(args.seed)
        self.model = GPTForCausalLM(
            self.plan.model_config(
                bos_token_id=self.tokenizer.bos_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
                calculator=calculator_table(self.tokenizer),
            )
        )
        self.train_step = TrainStep(
            self.model,
            self.plan,
            accelerator,
            device_batch_size=self.device_batch_size,
            lr_fraction=args.lr_fraction,
            compile=args.compile,
            fp8=args.fp8,
            cuda_graphs=args.cuda_graphs,
            documents_apart=args.documents_apart,
        )
        self.rows = self._build_rows()
        self.measurements = Measurements(
            args, self.train_step, store=self.validation_store, tokenizer=self.tokenizer, accelerator=accelerator
        )
        self.state = TrainState()
        self.clock = TrainingClock(self.device)
        self.writer = CheckpointWriter(self.checkpoints)
        self.signals = StopSignals()
        self.saved_step: int | None = None
        self.saved_at = time.monotonic()
        self.window_steps, self.window_seconds = 0, 0.0  # since the last log line
        self.is_warm = False  # the first step of a process compiles
        # The step whose result is not known yet, and where its rows began; `state` does not count it.
        self.underway: tuple[StepUnderway, dict[str, Any]] | None = None

    def _build_rows(self) -> PackedRows:
        return PackedRows(
            self.train_store,
            sequence_length=self.args.sequence_length,
            packing=self.args.packing,
            documents_apart=self.args.documents_apart,
            rank=self.ranks.rank,
            world_size=self.ranks.count,
            seed=self.args.seed,
        )

    def train(self) -> None:
        """Run the remaining steps, with measurements and checkpoints on the way.

        Raises:
            UserError: the run had to stop; what it says also says where it can continue.
        """
        with self.ranks.explain_lost_rank(self.checkpoints), self._explain_memory(), collector_paused(), self.signals:
            self._resume()
            try:
                with self._open_loader() as self.loader:
                    self._run_steps()
            except StopRequested:
                self._end_stopped()
            finally:
                self.writer.wait()  # also on the way out: what was begun to be saved is worth having

    def _run_steps(self) -> None:
        """Each measurement comes after a checkpoint: should it fail or be stopped, no step is lost."""
        self.earlier_seconds = self.state.train_seconds
        self.clock.restart()
        while True:
            is_last = self.state.step == self.plan.steps
            if self.underway is None and self._measures_after(self.state.step):
                self._save()
                self._measure(is_last=is_last)
            if is_last:
                return
            self._take_step()
            self._save_if_due()

    def _take_step(self) -> None:
        begin = self.loader.position
        for _ in range(self.train_step.accumulation):
            self.train_step.accumulate(self.loader.take())
        # Only now is the step before looked at, so that the device does not wait for this process in between.
        self._settle()
        self.underway = self.train_step.begin_update(self.state.step), begin
        step = self.state.step + 1
        if self.underway[0].is_known or not self.is_warm or self._measures_after(step) or self._saves_after(step):
            self._settle()
        if not self.is_warm:
            with self._time_out():
                self.state.count_first_step(since=self.earlier_seconds)
                freeze_garbage()
            self.is_warm = True

    def _measures_after(self, step: int) -> bool:
        return step == self.plan.steps or step % self.args.eval_every == 0

    def _saves_after(self, step: int) -> bool:
        return step % self.args.save_every == 0

    def _settle(self) -> None:
        """Wait for the step that is underway, if one is, and count it; stop if it was not finite."""
        if self.underway is None:
            return
        (underway, begin), self.underway = self.underway, None
        result = underway.wait()
        if not result.updated:
            self.train_step.drop()
            self._end_not_finite(result, begin)
        state = self.state
        state.add_loss(result.loss)
        self.window_steps += 1
        if state.step % self.args.log_every == 0 or state.step in (1, self.plan.steps):
            self._log_step(result)

    def _log_step(self, result: StepResult) -> None:
        self._count_time(drain=False)  # it would be idle afterwards
        state, plan = self.state, self.plan
        seconds_per_step = self.window_seconds / self.window_steps
        speed = plan.total_batch_tokens / seconds_per_step
        mfu = flops_share(plan, speed, self.accelerator)
        minutes_left = (plan.steps - state.step) * seconds_per_step / 60
        record = {
            "step": state.step,
            "loss": state.debiased_loss(),
            "gradient_norm": result.gradient_norm,
            "lr_multiplier": result.lr_multiplier,
            "tokens_per_second": speed,
        }
        state.add_record(record, every=self.args.log_every, is_last=state.step == plan.steps)
        logger.info(
            "step %d/%d | loss %.4f | gradient %.3g | lr x%.2f | %s tok/s%s%s",
            state.step,
            plan.steps,
            state.debiased_loss(),
            result.gradient_norm,
            result.lr_multiplier,
            f"{speed:,.0f}",
            "" if mfu is None else f" | MFU {100 * mfu:.1f} %",
            f" | {minutes_left:.1f} min left" if self.is_warm else "",  # the first step says nothing about the others
        )
        logged = {"train/loss": result.loss, "train/gradient_norm": result.gradient_norm}
        self.accelerator.log(logged | {"train/tokens_per_second": speed}, step=state.step)
        self.window_steps, self.window_seconds = 0, 0.0

    def _count_time(self, *, drain: bool = True) -> None:
        seconds = self.clock.lap(drain=drain)
        self.state.train_seconds += seconds
        self.window_seconds += seconds

    @contextmanager
    def _time_out(self) -> Iterator[None]:
        """What happens in here is no training time."""
        self._count_time()
        yield
        self.clock.restart()

    def _measure(self, *, is_last: bool) -> None:
        evaluations = self.state.evaluations
        if evaluations and evaluations[-1]["step"] == self.state.step:
            return  # a resumed run has this one
        with self._time_out():
            with self.signals.at_once():
                evaluations.append(self.measurements.measure(self.state.step, is_last=is_last))
            if self.is_warm:
                freeze_garbage()

    def _save_if_due(self) -> None:
        """Save on schedule, by the clock or because of a signal, and stop if there was one or saving has failed."""
        is_late = time.monotonic() - self.saved_at >= 60 * self.args.save_every_minutes
        stop, late, failed = self.ranks.any(
            self.signals.received is not None, self.ranks.is_main and is_late, self.writer.has_failed()
        )
        if failed:
            self.writer.wait()  # raises, on the rank that writes
            self.ranks.end_together("")
        if stop or late:
            self._settle()
        if stop or late or (self.underway is None and self._saves_after(self.state.step)):
            self._save()
        if stop:
            raise StopRequested

    def _save(self) -> None:
        """Copy what a run continues from, and begin to write it; nothing where this step is saved already."""
        step = self.state.step
        if step in (0, self.saved_step):
            return
        with self._time_out():
            run_state = {
                "state": self.state.state_dict(),
                "settings": self.args.settings(),
                "rows": self.loader.position,
                "randomness": self.ranks.gather(capture_randomness(self.device)),
            }
            keep = self.ranks.is_main
            parts = copy_to_host({**self.train_step.state_dict(keep=keep), "run": run_state}, self.device, keep=keep)
            if parts is not None:
                self.writer.write(step, parts)
            self.saved_step, self.saved_at = step, time.monotonic()

    def _resume(self) -> None:
        """Continue from the last whole checkpoint, if there is one; it may be another number of ranks'.

        Kernels are chosen for the batch size before the checkpoint's, which a continued run keeps, are taken over.
        """
        found = str(latest_checkpoint(self.checkpoints) or "") if self.ranks.is_main else ""
        folder = self.ranks.take_from_main(found)
        if not folder:
            self._settle_batch_size()
            return
        parts = read_checkpoint(Path(folder))
        run_state = parts.pop("run")
        self.state.load_state_dict(run_state["state"])
        changed = self.state.note_changes(run_state.get("settings", {}), self.args.settings())
        logger.info("continuing from %s%s", folder, f", changed: {changed}" if changed else "")
        if self.state.world_size != self.ranks.count:
            logger.info("it was saved by %d ranks, now there are %d", self.state.world_size, self.ranks.count)
        self._settle_batch_size()
        try:
            self.train_step.load_state_dict(divide_state(parts, self.train_step), new_plan=bool(changed))
        except (KeyError, ValueError, RuntimeError) as error:
            why = f"set back what was changed ({changed})" if changed else "it is probably another version's"
            raise UserError(
                f"checkpoint {folder} does not fit this model ({str(error).splitlines()[0]}); {why}, or delete "
                f"{self.checkpoints} to begin anew"
            ) from None
        if self.state.step > self.plan.steps:
            raise UserError(f"checkpoint {folder} is behind the last of {self.plan.steps} steps; ask for more of them")
        self.rows.load_state_dict(run_state["rows"])
        ranks_before = run_state["randomness"]
        restore_randomness(ranks_before[self.ranks.rank % len(ranks_before)], self.device)
        self.saved_step = self.state.step

    def _settle_batch_size(self) -> None:
        """Find the device batch size, or take over what was found when the run was begun on as many ranks."""
        size = self.device_batch_size
        if self.args.auto_batch:
            known = self.state.device_batch_size if self.state.world_size == self.ranks.count else 0
            size = known or choose_device_batch_size(
                self.train_step,
                self.ranks,
                compiled=self.args.compiles_on(self.device.type),
                document_capacity=self.rows.document_capacity if self.args.documents_apart else None,
            )
            self.train_step.choose_kernels(size)
        self.state.device_batch_size, self.state.world_size = size, self.ranks.count

    def _open_loader(self) -> Loader:
        return Loader(
            self.rows,
            batch_size=self.state.device_batch_size,
            device=self.device,
            timeout=self.args.data_timeout,
        )

    @contextmanager
    def _explain_memory(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the memory of {self.device} is full at step {self.state.step} with device_batch_size="
                f"{self.state.device_batch_size} ({str(error).split('. ')[0]}); set a smaller one or auto_batch, and "
                "start again, which continues from the last checkpoint"
            ) from None

    def _end_stopped(self) -> NoReturn:
        self.writer.wait()
        self.ranks.end_together(
            f"stopped by {self.signals.received or 'a signal to another rank'} after step {self.state.step}, "
            f"{'which is saved; start again to continue' if self.state.step else 'before the first step'}"
        )

    def _end_not_finite(self, result: StepResult, begin: dict[str, Any]) -> NoReturn:
        """Find out which rows did it, keep their address and the state before this step, and stop."""
        size, world_size = self.state.device_batch_size, self.ranks.count
        # The loader's thread may still be at the rows it reads.
        mine = find_bad_rows(self.train_step, self._build_rows(), begin, batch_size=size)
        bad = [row for rows in self.ranks.gather(mine) for row in rows]
        verdict = describe_bad_rows(bad, rows_of_step=size * self.train_step.accumulation * world_size)
        address = self.run.run_dir / BAD_BATCH_FILE
        if self.ranks.is_main:
            record = {
                "step": self.state.step,
                "loss": str(result.loss),
                "gradient_norm": str(result.gradient_norm),
                "verdict": verdict,
                "store": str(self.train_store.folder),
                "rows": as_records(bad),
            }
            write_json(address, record)
        weights_are_good = all(bool(parameter.isfinite().all()) for parameter in self.model.parameters())
        if weights_are_good:
            self.loader.position = begin
            self._save()
        self.writer.wait()
        place = f"; go on from the last good state, in {self.checkpoints}, with --accept_changes"
        self.ranks.end_together(
            f"the loss became {result.loss} and the gradient's norm {result.gradient_norm} at step {self.state.step}, "
            f"before its update: {verdict}; the address is in {address}: check the data, lower lr_fraction or set "
            f"mixed_precision to 'no'{', then start again' if self.saved_step is None else place}"
        )

    def finish(self, stage: Stage, *, prediction: dict[str, Any] | None) -> None:
        """Write the model folder and the results, beside what was predicted, if anything; every rank calls it."""
        samples = self.measurements.sample()
        with evaluating_whole(self.train_step) as model:
            if not self.ranks.is_main:
                return
            write_results(
                stage,
                args=self.args,
                plan=self.plan,
                state=self.state,
                accelerator=self.accelerator,
                model=model,
                tokenizer=self.tokenizer,
                store=self.train_store,
                samples=samples,
                prediction=prediction,
            )
