"""What happens in one step of pretraining, from micro-batches to moved weights."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from chatmodel.attention import TRAINING_ATTENTION, AttentionShape, choose_attention, use_attention, works_here
from chatmodel.gradients import GraphedGradients, adding_gradients, check_graphs
from chatmodel.kernels.fp8 import build_fp8_converter, check_fp8
from chatmodel.kernels.mlp import fused_mlp_pays
from chatmodel.losses import LanguageModelLoss
from chatmodel.model import GPTConfig, GPTForCausalLM
from chatmodel.optim.groups import build_optimizer
from chatmodel.optim.ownership import Ownership
from chatmodel.optim.schedule import apply_schedule
from chatmodel.runtime import logger
from chatmodel.scaling import RunPlan
from chatmodel.training_layers import TrainingLayers

EVALUATION_ATTENTION = "sdpa"  # respects padding, which the training kernels do not look at


@dataclass(frozen=True)
class StepResult:
    """What a step found, the same on every rank: mean loss in nats a token, norm of the gradient, rate multiplier.

    `updated` is False when the loss or the gradient of some rank was not finite: the weights are then untouched.
    """

    loss: float
    gradient_norm: float
    lr_multiplier: float
    updated: bool


@dataclass(frozen=True)
class StepUnderway:
    """A step that was begun; where a device does the work, its loss and gradient norm are known only later."""

    numbers: torch.Tensor
    lr_multiplier: float
    known: torch.cuda.Event | None = None

    @property
    def is_known(self) -> bool:
        """Whether `wait` returns at once, whatever the device does."""
        return self.known is None

    def wait(self) -> StepResult:
        """What the step found."""
        if self.known is not None:
            self.known.synchronize()
        loss, norm = self.numbers.tolist()
        return StepResult(loss, norm, self.lr_multiplier, math.isfinite(loss) and math.isfinite(norm))


class TrainStep:
    """The model and the optimizer of a run, and how they take one step together.

    A step is `accumulate` for each of `accumulation` micro-batches, then `finish`. In bf16 the weights are rounded
    once a step from fp32 masters kept by the optimizer, and gradients add up in fp32. Ranks exchange gradients once a
    step, and each updates the weights it owns. Under FSDP, Accelerate divides the weights and sets the precision.
    `accelerator.save_state` and `load_state` cover both model and optimizer.

    Args:
        cuda_graphs: micro-batches are replayed as CUDA graphs, by default where they can (`GraphedGradients`).
        documents_apart: micro-batches bring `document_starts`, and no position sees an earlier document of its row.
    """

    def __init__(
        self,
        model: GPTForCausalLM,
        plan: RunPlan,
        accelerator: Accelerator,
        *,
        device_batch_size: int,
        lr_fraction: float = 1.0,
        compile: bool | None = None,
        fp8: bool = False,
        cuda_graphs: bool | None = None,
        documents_apart: bool = False,
    ) -> None:
        self.model, self.plan, self.accelerator = model, plan, accelerator
        self.divided = accelerator.distributed_type == DistributedType.FSDP
        device = accelerator.device
        dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
        if not self.divided:
            keep_masters_in_optimizer(model.to(device), dtype)
        ownership = None
        if not self.divided and accelerator.num_processes > 1:
            ownership = Ownership(
                model.parameters(), rank=accelerator.process_index, world_size=accelerator.num_processes
            )
        optimizer = build_optimizer(
            model,
            plan.groups,
            lr_fraction=lr_fraction,
            orthogonalization=plan.orthogonalization,
            normalize_updates=plan.normalize_updates,
            ownership=ownership,
        )
        compiled = device.type == "cuda" if compile is None else compile
        if fp8:
            check_fp8(device, compiled=compiled, divided=self.divided)
        self._place, self._documents_apart = (device, dtype), documents_apart
        self._compiled, self._fp8 = compiled, fp8
        self._graphs = None
        if check_graphs(cuda_graphs, device, compiled=compiled, divided=self.divided):
            self._graphs = GraphedGradients(self._add_gradients, model, wanted=cuda_graphs)
        self.layers: TrainingLayers | None = None
        self.loss_module = LanguageModelLoss(model)
        self.choose_kernels(device_batch_size)
        if self.divided:
            self.loss_module, self.optimizer = accelerator.prepare(self.loss_module, optimizer)
        else:
            self.optimizer = optimizer
            accelerator.register_for_checkpointing(self)
        self._losses: list[torch.Tensor] = []

    def choose_kernels(self, device_batch_size: int) -> None:
        """Take so many rows at once from now on, by the kernels that are fastest for them here."""
        self.accumulation = self.plan.accumulation_steps(device_batch_size, self.accelerator.num_processes)
        self._shapes = attention_shapes(self.model.config, device_batch_size, self._documents_apart)
        self._use_attention(choose_attention(self._shapes, *self._place, compiled=self._compiled))
        # In plain PyTorch the model's own parts are the faster ones.
        if self._compiled:
            if self.layers is not None:
                self.layers.remove()
                torch.compiler.reset()  # code compiled for the kernels before must not be taken for theirs
            self.layers = self._choose_layers(device_batch_size)
            self.loss_module.compute_states = torch.compile(self.model.model.forward, dynamic=False, fullgraph=True)
        self._prepare_training()

    def accumulate(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Add the gradient of one micro-batch to those so far; returns its loss.

        Args:
            batch: `input_ids` and `shift_labels` (B, T), and `document_starts` where documents are kept apart.
        """
        if self._graphs is None:
            self._losses.append(self._add_gradients(batch))
        else:
            self._losses.append(self._graphs.add(batch))
        return self._losses[-1]

    def _add_gradients(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss: Any = self.loss_module(**batch)
        shares = self.accumulation * (1 if self.divided else self.accelerator.num_processes)
        # A gradient that nothing is added to, and that is not cut, stays in the precision it was found in.
        is_alone = shares == 1 and self.plan.grad_clip is None
        with nullcontext() if self.divided or is_alone else adding_gradients(self.model):
            (loss / shares).backward()
        detached: torch.Tensor = loss.detach()
        return detached

    def finish(self, step: int) -> StepResult:
        """Update the weights with what was accumulated, unless it is not finite; `step` counts from 0."""
        return self.begin_update(step).wait()

    def begin_update(self, step: int) -> StepUnderway:
        """As `finish`, but waits for nothing: the next micro-batches can be under way before the result is looked at.

        After a step that was not finite the weights are the old ones, whatever is accumulated meanwhile.
        """
        assert len(self._losses) == self.accumulation, (len(self._losses), self.accumulation)
        loss = self.accelerator.reduce(torch.stack(self._losses).mean(), "mean")
        self._losses.clear()
        if not self.divided:
            self.optimizer.reduce_gradients()
        norm = self._clip_gradients()
        multiplier = apply_schedule(self.optimizer, step, self.plan.schedule)
        numbers = torch.stack((loss.float(), norm))
        known = None
        if numbers.is_cuda and not self.divided:
            # The update is on its way before these numbers are known here, so the device is never idle.
            numbers, known = self._fetch(numbers)
            self.optimizer.step()
        elif numbers.isfinite().all():
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepUnderway(numbers, multiplier, known)

    def _fetch(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
        """Begin to copy `numbers` to the host, and tell the optimizer to skip its step if they are not finite."""
        self.optimizer.skip = ~numbers.isfinite().all()
        on_host = torch.empty(numbers.shape, pin_memory=True).copy_(numbers, non_blocking=True)
        known = torch.cuda.Event()  # type: ignore[no-untyped-call]
        known.record()
        return on_host, known

    def _clip_gradients(self) -> torch.Tensor:
        """The norm of the whole gradient, which is cut to the plan's limit if there is one."""
        limit = math.inf if self.plan.grad_clip is None else self.plan.grad_clip
        if self.divided:
            norm = self.accelerator.clip_grad_norm_(self.loss_module.parameters(), limit)
            assert norm is not None
            return norm.full_tensor().float() if hasattr(norm, "full_tensor") else norm.float()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        square = torch.stack(measure_norms(gradients)).square().sum()
        norm = self.accelerator.reduce(square, "sum").sqrt()
        if limit < math.inf:
            torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def drop(self) -> None:
        """Forget what was accumulated since the last step."""
        self._losses.clear()
        self.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def evaluating(self) -> Iterator[GPTForCausalLM]:
        """The model as evaluation wants it: no dropout, padding masks respected, the run's precision.

        Not for weights divided by FSDP, which must be put together first (`chatmodel.training.sharding`).
        """
        assert not self.divided
        if self._graphs is not None:
            self._graphs.release()
        if self.layers is not None:
            self.layers.remove()
        self.model.set_attn_implementation(EVALUATION_ATTENTION)
        self.model.eval()
        try:
            yield self.model
        finally:
            self._prepare_training()

    def _prepare_training(self) -> None:
        if self.layers is not None:
            self.layers.install()
        self.model.set_attn_implementation(TRAINING_ATTENTION)
        self.model.train()

    def _choose_layers(self, device_batch_size: int) -> TrainingLayers:
        config, (device, dtype) = self.model.config, self._place
        if self._fp8:
            return TrainingLayers(self.model, convert=build_fp8_converter())
        if self.divided:
            return TrainingLayers(self.model)
        tokens = device_batch_size * config.max_position_embeddings
        return choose_training_layers(self.model, tokens=tokens, device=device, dtype=dtype)

    def _use_attention(self, chosen: dict[int | None, str]) -> None:
        if self._graphs is not None:
            self._graphs.forget()
        self.attention = chosen
        use_attention(chosen, length=self.model.config.max_position_embeddings, device=self.accelerator.device)

    def state_dict(self, *, keep: bool = True) -> dict[str, Any]:
        """Weights, optimizer state and chosen kernels; the state is gathered, so every rank must call this.

        Args:
            keep: whether this rank wants it; where it is gathered, it costs the others no memory.
        """
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict() if self.divided else self.optimizer.state_dict(keep=keep),
            "attention": self.attention,
        }

    def load_state_dict(self, state: dict[str, Any], *, new_plan: bool = False) -> None:
        """Take over what `state_dict` gave, on any number of ranks; with a `new_plan` not the rates of the old one."""
        self.model.load_state_dict(state["model"])
        groups = self.optimizer.param_groups
        planned = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        self.optimizer.load_state_dict(state["optimizer"])
        if new_plan:
            for group, rates in zip(self.optimizer.param_groups, planned, strict=True):
                group.update(rates)
        saved = state.get("attention", self.attention)
        if saved != self.attention and all(works_here(saved[s.window], s, *self._place) for s in self._shapes):
            logger.info("attention as before the interruption: %s", ", ".join(dict.fromkeys(saved.values())))
            self._use_attention(saved)


def measure_norms(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The norm of each, in fp32; those of one dtype in a few kernels, in the order of the dtypes."""
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    return [norm for same in by_dtype.values() for norm in torch._foreach_norm(same, dtype=torch.float32)]


def choose_training_layers(
    model: GPTForCausalLM, *, tokens: int, device: torch.device, dtype: torch.dtype
) -> TrainingLayers:
    """The parts that compiled training of so many tokens at once exchanges, the fused MLP among them where it pays."""
    config = model.config
    if config.hidden_act != "relu2" or config.gated_mlp:
        return TrainingLayers(model)
    assert config.intermediate_size is not None
    pays = fused_mlp_pays(
        rows=tokens, width=config.hidden_size, inner=config.intermediate_size, device=device, dtype=dtype
    )
    return TrainingLayers(model, fuse_mlp=pays)


def keep_masters_in_optimizer(model: GPTForCausalLM, dtype: torch.dtype) -> None:
    """Round the weights to `dtype`, and let their gradients have another one. Buffers (rotary tables) stay fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
        parameter.grad_dtype = None


def attention_shapes(
    config: GPTConfig, device_batch_size: int, documents_apart: bool = False, *, length: int | None = None
) -> list[AttentionShape]:
    """The shapes of a model's attention, one for each kind of layer, the most frequent first.

    Args:
        length: of the rows, by default the model's context.
    """
    assert config.layer_types is not None
    assert config.head_dim is not None
    windows = [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]
    return [
        AttentionShape(
            batch=device_batch_size,
            heads=config.num_attention_heads,
            sequence_length=length or config.max_position_embeddings,
            head_dim=config.head_dim,
            window=window,
            documents_apart=documents_apart,
        )
        for window in sorted(set(windows), key=lambda window: -windows.count(window))
    ]
