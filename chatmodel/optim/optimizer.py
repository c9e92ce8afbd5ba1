"""One optimizer for all weights of a model: which state each has, and who updates it."""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim.adamw import adamw

from chatmodel.optim.matrices import update_matrices
from chatmodel.optim.ownership import Ownership

State = dict[str, torch.Tensor]


class MuonAdamW(torch.optim.Optimizer):
    """Muon for groups of kind "muon", AdamW for groups of kind "adamw".

    A group holds `kind`, `name`, `lr`, `weight_decay`; "adamw" also `betas` and `eps`; "muon" also `momentum`,
    `beta2`, `method` and `normalize` (see `update_matrices`). Matrices of one shape are updated as one stack.

    A weight in a lower precision than fp32 has its fp32 master copy in the state: the master moves, and the weight is
    its rounding. With `ownership`, gradients are those of this rank alone: `reduce_gradients` sums each at the rank
    that owns it, `step` updates it there and sends the new weight to the others, and `state_dict` gathers all state,
    so that a checkpoint serves any number of ranks. `skip`, a boolean on the CUDA device, makes `step` change nothing
    where it is true.

    Source: karpathy/nanochat@92d63d4 nanochat/optim.py for the recipe, c75fe54 nanochat/muon.py with
    method "newton_schulz" and normalize off.
    """

    def __init__(self, param_groups: Iterable[dict[str, Any]], *, ownership: Ownership | None = None) -> None:
        super().__init__(list(param_groups), defaults={})
        self.ownership = ownership
        self.skip: torch.Tensor | None = None
        for group in self.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group.setdefault("initial_weight_decay", group["weight_decay"])

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters, in the order of their groups."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def reduce_gradients(self) -> None:
        """Sum every gradient over the ranks, at its owner; elsewhere it is dropped."""
        if self.ownership is not None:
            self.ownership.reduce_gradients(self.parameters)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters and group["kind"] == "adamw":
                self._step_adamw(group, parameters)
            elif parameters:
                by_shape: dict[torch.Size, list[nn.Parameter]] = {}
                for parameter in parameters:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
                for stack in by_shape.values():
                    self._step_muon(group, stack)
        if self.ownership is not None:
            self.ownership.broadcast_weights(self.parameters)
        return loss

    def _master(self, parameter: nn.Parameter) -> torch.Tensor:
        """The fp32 weight that moves: the parameter itself, or its master copy."""
        if parameter.dtype == torch.float32:
            return parameter
        state = self.state[parameter]
        if "master" not in state:
            state["master"] = parameter.detach().float()
        return state["master"]

    def _step_adamw(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        device = parameters[0].device
        masters = [self._master(parameter) for parameter in parameters]
        for parameter, master in zip(parameters, masters, strict=True):
            state = self.state[parameter]
            if "step" not in state:
                # The fused kernel counts on the device.
                state["step"] = torch.zeros((), dtype=torch.float32, device=device if device.type == "cuda" else "cpu")
                state["exp_avg"] = torch.zeros_like(master)
                state["exp_avg_sq"] = torch.zeros_like(master)
        states = [self.state[p] for p in parameters]
        fused = device.type in ("cuda", "cpu") and not isinstance(parameters[0], DTensor)
        adamw(
            masters,
            [p.grad.to(m.dtype) for p, m in zip(parameters, masters, strict=True) if p.grad is not None],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=fused,
            foreach=not fused,
            found_inf=None if self.skip is None else self.skip.float(),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        self._round(parameters, masters)

    def _step_muon(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        rows, columns = parameters[0].shape
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = _whole(torch.zeros_like(parameter, dtype=torch.float32))
                if group["normalize"]:
                    size = (rows, 1) if rows >= columns else (1, columns)
                    state["second_moment"] = torch.zeros(size, device=parameter.device)
        states = [self.state[p] for p in parameters]
        masters = [_whole(self._master(parameter)) for parameter in parameters]
        weights = _stack(states, "master") if "master" in states[0] else torch.stack(masters)
        device = weights.device
        _updater(weights.is_cuda)(
            weights,
            torch.stack([_whole(p.grad) for p in parameters if p.grad is not None]),
            _stack(states, "momentum"),
            _stack(states, "second_moment") if group["normalize"] else None,
            # Filled on the device: a copy from the host would wait for all that the device still has to do.
            *(torch.full((), group[name], device=device) for name in ("lr", "momentum", "weight_decay")),
            beta2=group.get("beta2", 0.0),
            method=group["method"],
            # Weights that are trained in bf16 say that this device is fast in it.
            dtype=torch.bfloat16 if parameters[0].dtype == torch.bfloat16 else None,
            skip=self.skip,
        )
        self._round(parameters, list(weights.unbind()))

    @staticmethod
    def _round(parameters: list[nn.Parameter], masters: list[torch.Tensor]) -> None:
        """Give the parameters the values of their masters, in their own precision."""
        if parameters[0] is masters[0]:
            return
        if isinstance(parameters[0], DTensor):
            for parameter, master in zip(parameters, masters, strict=True):
                parameter.copy_(_divide_like(master, parameter))
        else:
            torch._foreach_copy_(list[torch.Tensor](parameters), masters)

    def state_dict(self, *, keep: bool = True) -> dict[str, Any]:
        """All state, under each parameter's number; with `ownership` every rank must call it.

        Args:
            keep: whether this rank wants what others own; without it the state is empty then.
        """
        parameters = self.parameters
        state = {number: dict(self.state[p]) for number, p in enumerate(parameters) if p in self.state}
        if self.ownership is not None:
            state = self.ownership.gather_state(parameters, state, keep=keep)
        groups, number = [], 0
        for group in self.param_groups:
            members = list(range(number, number + len(group["params"])))
            groups.append({key: value for key, value in group.items() if key != "params"} | {"params": members})
            number += len(members)
        return {"state": state, "param_groups": groups}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, each tensor in its own precision; of other ranks' weights nothing."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            if len(group["params"]) != len(saved["params"]) or group["name"] != saved["name"]:
                raise ValueError(f"the saved optimizer's group {saved['name']!r} is not this one's {group['name']!r}")
            group.update({key: value for key, value in saved.items() if key != "params"})
        self.state.clear()
        for number, parameter in enumerate(self.parameters):
            saved = dict(state_dict["state"].get(number, {}))
            if parameter.dtype == torch.float32 and "master" in saved:  # it was trained in bf16 so far
                parameter.copy_(saved.pop("master"))
            if self.ownership is None or self.ownership.is_mine(parameter):
                self.state[parameter] = {key: _place(key, value, parameter) for key, value in saved.items()}


def _place(key: str, value: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """A copy of a saved tensor where its parameter lies; AdamW's counter stays on the CPU unless it is fused."""
    if key == "step" and not parameter.is_cuda:
        return value.detach().clone().cpu()
    if isinstance(value, DTensor):
        return value.detach().clone()
    return value.detach().clone().to(parameter.device)


def _stack(states: list[State], key: str) -> torch.Tensor:
    """The states' tensors as one (n, ...), of which they are views from then on: no copy in later steps."""
    base = states[0][key]._base
    fits = base is not None and len(base) == len(states)
    if base is None or not fits or any(state[key]._base is not base for state in states):
        base = torch.stack([state[key] for state in states])
        for state, view in zip(states, base.unbind(), strict=True):
            state[key] = view
    return base


def _whole(tensor: torch.Tensor | None) -> torch.Tensor:
    """The tensor on one device, put together if it is divided among ranks (FSDP2): a matrix is updated as a whole."""
    assert tensor is not None
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _divide_like(whole: torch.Tensor, parameter: torch.Tensor) -> DTensor:
    """This rank's part of a tensor that every rank holds."""
    assert isinstance(parameter, DTensor)
    mesh = parameter.device_mesh
    return DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim).redistribute(placements=parameter.placements)


@cache
def _updater(compiled: bool) -> Callable[..., None]:
    """Muon's update, compiled on CUDA, where it would otherwise be a hundred small kernels."""
    return torch.compile(update_matrices, dynamic=False, fullgraph=True) if compiled else update_matrices
