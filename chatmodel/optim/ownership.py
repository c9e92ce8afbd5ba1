"""Which rank updates which weight, and how gradients get there and new weights back?"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class Ownership:
    """Every parameter belongs to one rank, which alone keeps its optimizer state (ZeRO stage 1, arXiv 1910.02054).

    Whole parameters, not slices: Muon needs whole matrices. The largest go first, each to the rank with the least.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        load = [0] * world_size
        self.owners: dict[nn.Parameter, int] = {}
        for parameter in sorted(parameters, key=lambda p: -p.numel()):  # stable: equal sizes stay in order
            owner = load.index(min(load))
            load[owner] += parameter.numel()
            self.owners[parameter] = owner

    def is_mine(self, parameter: nn.Parameter) -> bool:
        """Whether this rank updates the parameter."""
        return self.owners[parameter] == self.rank

    def reduce_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum each gradient over the ranks at its owner; the other ranks drop theirs."""
        work = [
            dist.reduce(parameter.grad, dst=self.owners[parameter], async_op=True)
            for parameter in parameters
            if parameter.grad is not None
        ]
        _wait(work)
        for parameter in parameters:
            if not self.is_mine(parameter):
                parameter.grad = None

    def broadcast_weights(self, parameters: Sequence[nn.Parameter]) -> None:
        """Send each parameter from its owner to the others."""
        _wait([dist.broadcast(parameter.data, src=self.owners[parameter], async_op=True) for parameter in parameters])

    def gather_state(
        self, parameters: Sequence[nn.Parameter], mine: dict[int, Any], *, keep: bool = True
    ) -> dict[int, Any]:
        """The state of all parameters, by number, on the CPU, from what each rank has of its own.

        Args:
            keep: whether this rank wants it; the others only take part, hold one tensor at a time, and get nothing.
        """
        layouts: list[Any] = [None] * self.world_size
        layout = {n: {key: (t.shape, t.dtype) for key, t in state.items()} for n, state in mine.items()}
        dist.all_gather_object(layouts, layout)
        gathered: dict[int, Any] = {}
        for number, parameter in enumerate(parameters):
            owner = self.owners[parameter]
            for key, (shape, dtype) in layouts[owner].get(number, {}).items():
                value = mine[number][key].to(parameter.device) if owner == self.rank else None
                if value is None:
                    value = torch.empty(shape, dtype=dtype, device=parameter.device)
                value = value.contiguous()
                dist.broadcast(value, src=owner)
                if keep:
                    gathered.setdefault(number, {})[key] = value.cpu()
        return gathered


def _wait(work: Iterable[Any]) -> None:
    for pending in work:
        if pending is not None:
            pending.wait()
