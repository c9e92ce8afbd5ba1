"""How do the gradients of a step's micro-batches add up: kernel by kernel, or replayed by CUDA graphs?"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from chatmodel.runtime import UserError, logger

Batch = dict[str, torch.Tensor]
AddGradients = Callable[[Batch], torch.Tensor]  # adds a micro-batch's gradients to those so far; returns its loss


@contextmanager
def adding_gradients(model: nn.Module) -> Iterator[None]:
    """Add what is found inside to the gradients so far, in fp32, without the copy in fp32 autograd would make.

    Each is added as soon as it is whole, and dropped: the head's, found first, is not held beside all activations.
    """
    totals = {parameter: parameter.grad for parameter in model.parameters()}

    def add(parameter: Any) -> None:
        total, found = totals[parameter], parameter.grad
        assert found is not None
        totals[parameter] = found.float() if total is None else total.add_(found)
        parameter.grad = None

    register = torch.Tensor.register_post_accumulate_grad_hook
    hooks = [register(p, add) for p in totals if p.requires_grad]  # type: ignore[no-untyped-call]
    for parameter in totals:
        parameter.grad = None
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, total in totals.items():
            parameter.grad = total


class GraphedGradients:
    """Calls `add_gradients` for micro-batches, and from the second step on replays what it does, as CUDA graphs.

    A GPU waits some microseconds between a kernel and the next; within a graph, which the host launches at once, less.
    The numbers are the same. There are two graphs: of a step's first micro-batch, whose gradients are new, and of the
    others, which add to them. They keep memory of their own, as much as a micro-batch needs for its backward pass,
    that nothing else can use until `release`.

    Args:
        add_gradients: must not ask the device for anything.
        model: whose gradients they are.
        wanted: None to go on without graphs, and to say so, where memory is short or the device cannot make them; True
            to raise a `UserError` where it cannot.
    """

    def __init__(self, add_gradients: AddGradients, model: nn.Module, *, wanted: bool | None) -> None:
        self.add_gradients, self.model, self.wanted = add_gradients, model, wanted
        self.is_told = False
        self.forget()

    def forget(self) -> None:
        """Begin anew, as after a change of kernels: the next step is launched kernel by kernel."""
        self.release()
        self.is_refused = False
        self.shapes: Any = None  # of the last micro-batch that was launched kernel by kernel

    def release(self) -> None:
        """Give the memory of the graphs back; the next step captures them again."""
        self.inputs: Batch = {}  # from where the graphs read
        self.graphs: dict[bool, tuple[Any, torch.Tensor]] = {}  # with its loss, by whether gradients are new
        self.gradients: dict[nn.Parameter, torch.Tensor | None] = {}

    def add(self, batch: Batch) -> torch.Tensor:
        """Add a micro-batch's gradients to those so far; returns its loss."""
        shapes = {name: (tensor.shape, tensor.stride(), tensor.dtype) for name, tensor in batch.items()}
        first = all(parameter.grad is None for parameter in self.model.parameters())
        if shapes != self.shapes:
            self.release()
            self.shapes = shapes
        elif first and not self.inputs:
            self._begin(batch)
        if not self.inputs:
            return self.add_gradients(batch)
        for name, place in self.inputs.items():
            place.copy_(batch[name])
        if first not in self.graphs and not self._capture(first):
            return self.add_gradients(batch)
        graph, loss = self.graphs[first]
        graph.replay()
        for parameter, gradient in self.gradients.items():
            parameter.grad = gradient
        return loss.clone()

    def _begin(self, batch: Batch) -> None:
        if not self.wanted and not self.is_refused and not self._has_room(next(iter(batch.values())).device):
            self._refuse("the update of the weights could lack the memory that they keep")
        if not self.is_refused:
            # In the strides of the batch, for which the code was compiled.
            self.inputs = {
                name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
                for name, t in batch.items()
            }

    @staticmethod
    def _has_room(device: torch.device) -> bool:
        """Whether what was needed at most so far, beside what is held now, is there twice."""
        held = torch.cuda.memory_allocated(device)
        unused = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - held
        return 2 * (torch.cuda.max_memory_allocated(device) - held) <= unused

    def _capture(self, first: bool) -> bool:
        try:
            self.graphs[first] = self._record(next((graph.pool() for graph, _ in self.graphs.values()), None))
        except Exception as error:  # whatever a kernel does that cannot be captured
            if first:
                self.model.zero_grad(set_to_none=True)  # they were never computed
            if self.wanted:
                raise UserError(f"{describe(error)}; leave cuda_graphs out") from error
            self._refuse(describe(error))
            return False
        if first:
            self.gradients = {parameter: parameter.grad for parameter in self.model.parameters()}
        if not self.is_told:
            logger.info("micro-batches are replayed as CUDA graphs")
            self.is_told = True
        return True

    def _record(self, pool: Any) -> tuple[Any, torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        # The outer context makes sure of the stream: where a capture fails, the inner one leaves its own behind.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
        ):
            loss = self.add_gradients(self.inputs)
        return graph, loss

    def _refuse(self, reason: str) -> None:
        self.release()
        self.is_refused = True
        logger.warning("micro-batches are not replayed as CUDA graphs (%s); small models are slower without", reason)


def check_graphs(wanted: bool | None, device: torch.device, *, compiled: bool, divided: bool) -> bool:
    """Whether micro-batches may be replayed: where FSDP gathers weights on the way, or on other devices, they cannot.

    Raises:
        UserError: they are wanted and cannot.
    """
    possible = compiled and device.type == "cuda" and not divided
    if wanted and not possible:
        raise UserError("cuda_graphs needs a CUDA device, compiled code and weights that FSDP does not divide")
    return possible and wanted is not False


def describe(error: Exception) -> str:
    """An exception in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
