"""Which optimizer group does each weight belong to, and with which settings?"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from chatmodel.optim.optimizer import MuonAdamW
from chatmodel.optim.ownership import Ownership
from chatmodel.scaling import GroupPlan

ADAM_EPS = 1e-10


def classify_parameter(name: str, parameter: nn.Parameter) -> str:
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
        ("smear_", "backout"),  # of imported models; one group at karpathy/nanochat@92d63d4 too
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
    ownership: Ownership | None = None,
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
    return MuonAdamW(param_groups, ownership=ownership)
