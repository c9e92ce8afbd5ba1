"""How do ranks that each hold a part of every weight (FSDP) come to whole checkpoints and whole models, and back?"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from chatmodel.model import GPTForCausalLM
from chatmodel.train_step import EVALUATION_ATTENTION, TrainStep

AVERAGES = ("exp_avg", "exp_avg_sq", "master")  # AdamW's, divided as the weight is; Muon's momentum stays whole


@contextmanager
def evaluating_whole(step: TrainStep) -> Iterator[GPTForCausalLM]:
    """The model as evaluation wants it, in one piece on every rank; all of them must call this."""
    if step.divided:
        with step.accelerator.autocast():
            yield gather_model(step).to(step.accelerator.device)
    else:
        with step.evaluating() as model:
            yield model


def gather_model(step: TrainStep) -> GPTForCausalLM:
    """A copy of a divided model in one piece, on every rank."""
    model = GPTForCausalLM(copy.deepcopy(step.model.config)).eval()
    model.set_attn_implementation(EVALUATION_ATTENTION)
    model.load_state_dict({name: gather_tensor(value) for name, value in step.model.state_dict().items()})
    return model


def gather_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor, if it is divided; every rank must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def divide_state(state: dict[str, Any], step: TrainStep) -> dict[str, Any]:
    """A `TrainStep.state_dict` of whole tensors as `step` takes it: divided as its weights are."""
    if not step.divided:
        return state
    weights = step.model.state_dict()
    parameters = [parameter for group in step.optimizer.param_groups for parameter in group["params"]]
    optimizer = {
        number: {
            key: divide_like(value, parameters[number]) if key in AVERAGES else value for key, value in kept.items()
        }
        for number, kept in state["optimizer"]["state"].items()
    }
    return {
        **state,
        "model": {name: divide_like(value, weights[name]) for name, value in state["model"].items()},
        "optimizer": {**state["optimizer"], "state": optimizer},
    }


def divide_like(whole: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that every rank has, if `pattern` is divided."""
    if not isinstance(pattern, DTensor):
        return whole
    whole = whole.to(pattern.device)
    return distribute_tensor(whole, pattern.device_mesh, pattern.placements, src_data_rank=None)
