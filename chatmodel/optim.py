"""How the weights move: Muon for the matrices, AdamW for the rest, in one optimizer, and their schedules."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw

from chatmodel.scaling import GroupPlan, SchedulePlan

# arXiv 2505.16932, five steps, safety factor 2e-2, cushion 2
POLAR_EXPRESS_COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
# https://kellerjordan.github.io/posts/muon/
NEWTON_SCHULZ_COEFFICIENTS = ((3.4445, -4.7750, 2.0315),) * 5

ADAM_EPS = 1e-10


def orthogonalize(matrices: torch.Tensor, method: str) -> torch.Tensor:
    """The nearest semi-orthogonal matrix of each (..., rows, columns), approximately, by five matrix polynomials.

    Args:
        method: "polar_express" (arXiv 2505.16932) or "newton_schulz" (Keller Jordan's Muon).
    """
    coefficients = POLAR_EXPRESS_COEFFICIENTS if method == "polar_express" else NEWTON_SCHULZ_COEFFICIENTS
    tall = matrices.size(-2) > matrices.size(-1)
    # The iteration forgives bf16; CPUs without bf16 units would only be slowed down by it.
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    x = x.mT if tall else x
    margin = 1.02 if method == "polar_express" else 1.0
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * margin + 1e-7)
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class MuonAdamW(torch.optim.Optimizer):
    """Muon for groups of kind "muon", AdamW for groups of kind "adamw".

    A group holds `kind`, `name`, `lr`, `weight_decay`; "adamw" also `betas` and `eps`; "muon" also `momentum`,
    `method` and `normalize`: divide each row's (or column's) update by its running size (NorMuon, arXiv 2510.05491)
    and decay only weights that the update does not grow (cautious decay, arXiv 2510.12402). Matrices of one shape are
    updated as one stack. The update is scaled by sqrt(max(1, rows / columns)).

    Source: karpathy/nanochat@92d63d4 nanochat/optim.py for the recipe, c75fe54 nanochat/muon.py with
    method "newton_schulz" and normalize off.
    """

    def __init__(self, param_groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(list(param_groups), defaults={})
        for group in self.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group.setdefault("initial_weight_decay", group["weight_decay"])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            if group["kind"] == "adamw":
                self._step_adamw(group, parameters)
                continue
            by_shape: dict[torch.Size, list[torch.Tensor]] = {}
            for parameter in parameters:
                by_shape.setdefault(parameter.shape, []).append(parameter)
            for stack in by_shape.values():
                self._step_muon(group, stack)
        return loss

    def _step_adamw(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [self.state[p] for p in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            foreach=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _step_muon(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        rows, columns = parameters[0].shape
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
                if group["normalize"]:
                    size = (rows, 1) if rows >= columns else (1, columns)
                    state["second_moment"] = parameter.new_zeros(size)
        states = [self.state[p] for p in parameters]
        gradients = [p.grad for p in parameters if p.grad is not None]
        momenta = [s["momentum"] for s in states]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        # Nesterov: look ahead along the momentum from the gradient.
        updates = torch.stack(torch._foreach_lerp(gradients, momenta, group["momentum"]))
        updates = orthogonalize(updates, group["method"])
        if group["normalize"]:
            updates = self._normalize(updates, [s["second_moment"] for s in states], group["beta2"])
        updates = updates * (group["lr"] * max(1.0, rows / columns) ** 0.5)
        for parameter, update in zip(parameters, updates.to(parameters[0].dtype), strict=True):
            if group["weight_decay"]:
                grows = (update * parameter) >= 0
                update = update + group["lr"] * group["weight_decay"] * parameter * grows
            parameter.sub_(update)

    @staticmethod
    def _normalize(updates: torch.Tensor, moments: list[torch.Tensor], beta2: float) -> torch.Tensor:
        """Even out the sizes of rows (tall) or columns (wide) of (n, rows, columns), keeping each matrix's norm."""
        tall = updates.size(-2) >= updates.size(-1)
        axis = -1 if tall else -2
        mean_squares = updates.float().square().mean(dim=axis, keepdim=True)
        torch._foreach_lerp_(moments, list(mean_squares.to(moments[0].dtype)), 1 - beta2)
        scales = torch.stack(moments).float().clamp_min(1e-10).rsqrt()
        norm_before = mean_squares.sum(dim=(-2, -1), keepdim=True).sqrt()
        norm_after = (mean_squares * scales.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
        return updates * (scales * (norm_before / norm_after.clamp_min(1e-10))).to(updates.dtype)


def classify_parameter(name: str, parameter: torch.Tensor) -> str:
    """The optimizer group a parameter of `GPTForCausalLM` belongs to; adapters (LoRA) are a group of their own."""
    if "lora_" in name:
        return "adapter"
    for part, group in (
        ("value_embed.", "value_embedding"),
        ("embed_tokens.", "embedding"),
        ("lm_head.", "head"),
        ("residual_scale", "residual_scale"),
        ("embedding_scale", "embedding_scale"),
        ("backout_scale", "backout"),
    ):
        if part in name:
            return group
    assert parameter.ndim == 2, f"no optimizer group for {name} of shape {tuple(parameter.shape)}"
    return "matrix"


def build_optimizer(
    model: nn.Module,
    groups: Mapping[str, GroupPlan],
    *,
    lr_fraction: float = 1.0,
    orthogonalization: str = "polar_express",
    normalize_updates: bool = True,
) -> MuonAdamW:
    """One optimizer over all trainable parameters, with rates from a plan's `groups` times `lr_fraction`."""
    members: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members.setdefault(classify_parameter(name, parameter), []).append(parameter)
    param_groups: list[dict[str, Any]] = []
    for name in sorted(members, key=lambda name: (name != "matrix", name)):  # Trainers log the first group's rate
        plan = groups[name]
        group: dict[str, Any] = {
            "params": members[name],
            "name": name,
            "lr": plan.lr * lr_fraction,
            "weight_decay": plan.weight_decay,
        }
        if name == "matrix":
            muon = {"momentum": 0.95, "beta2": 0.9, "method": orthogonalization, "normalize": normalize_updates}
            param_groups.append(group | {"kind": "muon"} | muon)
        else:
            param_groups.append(group | {"kind": "adamw", "betas": plan.betas, "eps": ADAM_EPS})
    return MuonAdamW(param_groups)


def learning_rate_multiplier(step: int, schedule: SchedulePlan) -> float:
    """Factor on every learning rate at `step` (from 0): linear up, constant, linear down."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    left = schedule.steps - step
    if schedule.warmdown_steps == 0 or left >= schedule.warmdown_steps:
        return 1.0
    progress = left / schedule.warmdown_steps
    return progress + (1 - progress) * schedule.final_lr_fraction


def muon_momentum(step: int, schedule: SchedulePlan) -> float:
    """Momentum of the matrices at `step`: up in the beginning, down again during the warm-down."""
    into_warmdown = step - (schedule.steps - schedule.warmdown_steps)
    if step < schedule.momentum_warmup_steps:
        share = step / schedule.momentum_warmup_steps
        return (1 - share) * schedule.momentum_start + share * schedule.momentum_peak
    if into_warmdown >= 0 and schedule.warmdown_steps:
        share = into_warmdown / schedule.warmdown_steps
        return (1 - share) * schedule.momentum_peak + share * schedule.momentum_final
    return schedule.momentum_peak


def apply_schedule(optimizer: torch.optim.Optimizer, step: int, schedule: SchedulePlan) -> float:
    """Set rates, momentum and decay for `step`; returns the learning-rate multiplier."""
    multiplier = learning_rate_multiplier(step, schedule)
    decay = 0.5 * (1 + math.cos(math.pi * step / schedule.steps)) if schedule.cosine_decay else 1.0
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier
        if group["kind"] == "muon":
            group["momentum"] = muon_momentum(step, schedule)
            group["weight_decay"] = group["initial_weight_decay"] * decay
    return multiplier
