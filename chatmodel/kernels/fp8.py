"""Linear layers that multiply in 8-bit floats: which ones, and where can they run? (torchao does the work.)"""

import importlib.util
from collections.abc import Callable

import torch
from torch import nn

from chatmodel.runtime import UserError

MULTIPLE = 16  # what the 8-bit products of PyTorch ask of both sizes of a weight
CAPABILITY = (8, 9)  # Ada; Hopper is 9.0


def check_fp8(device: torch.device, *, compiled: bool, divided: bool) -> None:
    """Refuse fp8 where it cannot run, or would only be slower.

    Raises:
        UserError: no package, no such GPU, weights divided by FSDP, or no compiler, without which the scaling costs
            more than is gained.
    """
    if importlib.util.find_spec("torchao") is None:
        raise UserError('fp8 needs torchao: pip install "chatmodel[fp8]", or leave fp8 out')
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        raise UserError(
            f"fp8 needs an NVIDIA GPU of compute capability {'.'.join(map(str, CAPABILITY))} or more (Ada, Hopper, "
            f"Blackwell), and this run is on {device}; leave fp8 out"
        )
    if divided:
        raise UserError("fp8 does not go with FSDP here; leave fp8 out, or use recipes/configs/accelerate/ddp.yaml")
    if not compiled:
        raise UserError("fp8 without torch.compile is slower than bf16; leave out either fp8 or '--compile false'")


def build_fp8_converter(*, emulate: bool = False) -> Callable[[nn.Linear], nn.Linear]:
    """A function from a linear layer to one that shares its weight and multiplies in fp8.

    Weights, inputs and gradients are each scaled by one number, found anew every time ("tensorwise", arXiv
    2209.05433), and products add up in higher precision. A layer whose sizes do not allow it comes back as it is.

    Args:
        emulate: round as fp8 does, but multiply in the layer's own precision: for tests on any device.
    """
    # Optional, and not there on most machines.
    from torchao.float8 import Float8LinearConfig
    from torchao.float8.float8_linear import Float8Linear

    config = Float8LinearConfig(emulate=emulate)

    def convert(linear: nn.Linear) -> nn.Linear:
        if linear.in_features % MULTIPLE or linear.out_features % MULTIPLE:
            return linear
        return Float8Linear.from_float(linear, config)

    return convert
