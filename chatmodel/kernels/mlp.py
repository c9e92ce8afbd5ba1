"""The MLP of training with ReLU^2 inside its matrix products: what it computes, and whether it pays on this device."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from chatmodel.devices import time_repeated
from chatmodel.kernels.accumulation import add_product
from chatmodel.runtime import logger

TOLERANCE = 0.02  # relative error in bf16 that rounding explains
# Slopes are as large as what is kept of a layer's MLP, and the last layer's are needed when all layers' is still held.
SHARES_OF_SLOPES = 2

MultiplySlope = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class FusedMLP(torch.autograd.Function):
    """`relu(states @ up.T)^2 @ down.T`, with ReLU^2 and its slope in the products' own kernels.

    It keeps what the products keep anyway: the states and the output of ReLU^2, whose root is half the slope.
    """

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        """States (B, T, D), up (M, D), down (D, M), contiguous and of one dtype."""
        rows = states.flatten(0, 1)
        squared = torch.ops.chatmodel.multiply_relu_squared(rows, up)
        ctx.save_for_backward(rows, up, down, squared)
        return (squared @ down.T).view(states.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The gradients for states, up and down."""
        rows, up, down, squared = ctx.saved_tensors
        for_rows, for_up, for_down = fused_mlp_backward(gradient.reshape(rows.shape), rows, up, down, squared)
        return for_rows.view(gradient.shape), for_up, for_down


@torch.library.custom_op("chatmodel::fused_mlp_backward", mutates_args=(), device_types="cuda")
def fused_mlp_backward(
    gradient: torch.Tensor, rows: torch.Tensor, up: torch.Tensor, down: torch.Tensor, squared: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients for rows, up and down; one operation, as a compiler would put the shares together by copies.

    Args:
        gradient: (N, D), of the output. rows: (N, D). up: (M, D). down: (D, M). squared: (N, M), ReLU^2's output.
    """
    return differentiate_mlp(gradient, rows, up, down, squared, torch.ops.chatmodel.multiply_slope)


@fused_mlp_backward.register_fake
def _(
    gradient: torch.Tensor, rows: torch.Tensor, up: torch.Tensor, down: torch.Tensor, squared: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(rows), torch.empty_like(up), torch.empty_like(down)


def differentiate_mlp(
    gradient: torch.Tensor,
    rows: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    squared: torch.Tensor,
    multiply_slope: MultiplySlope,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `fused_mlp_backward`, on any device; the slopes are held for one share of the rows at a time."""
    for_rows, for_up = torch.empty_like(rows), torch.zeros_like(up, dtype=torch.float32)
    size = -(-len(rows) // SHARES_OF_SLOPES)
    for share in (slice(begin, begin + size) for begin in range(0, len(rows), size)):
        inner = multiply_slope(gradient[share], down, squared[share])
        torch.mm(inner, up, out=for_rows[share])
        add_product(for_up, inner.T, rows[share])
        del inner  # before the next one is made
    return for_rows, for_up.to(up.dtype), gradient.T @ squared


# Left to autograd by the compiler, as everything in `chatmodel.training_layers` is, and for the same reason.
@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def fused_mlp(states: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """`FusedMLP`."""
    return FusedMLP.apply(states, up, down)  # type: ignore[no-untyped-call]


def plain_mlp(states: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The same in plain PyTorch."""
    return (states @ up.T).relu().square() @ down.T


def fused_mlp_pays(*, rows: int, width: int, inner: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `fused_mlp` is right and faster than the compiled `plain_mlp` here, by trying both once.

    Args:
        rows: tokens of a micro-batch. width, inner: hidden and intermediate size.
    """
    if find_obstacle(device, dtype) is not None:
        return False
    pays, reason = compare_mlps(rows=rows, width=width, inner=inner, device=device)
    logger.info("MLP: %s", reason)
    return pays


def find_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `fused_mlp` cannot be tried, or None."""
    if device.type != "cuda":
        return f"needs an NVIDIA GPU, and this is {device}"
    if dtype != torch.bfloat16:
        return "needs bf16, which is not what trains here"
    return "needs Triton, which is not installed" if importlib.util.find_spec("triton") is None else None


def compare_mlps(*, rows: int, width: int, inner: int, device: torch.device) -> tuple[bool, str]:
    """Whether `fused_mlp` pays on this GPU, and what trying it showed."""
    try:
        # Registers the operations; Triton comes with PyTorch's CUDA builds only.
        import chatmodel.kernels.relu_squared  # noqa: F401

        error = _measure_error(width, inner, device)
        if not error <= TOLERANCE:
            return False, f"plain matrix products, as the fused ones are wrong here: relative error {error:.3g}"
        fused = _measure_milliseconds(fused_mlp, rows, width, inner, device)
    except Exception as failure:  # a kernel may fail in any way on a device its authors never saw
        reason = (str(failure).strip() or type(failure).__name__).splitlines()[0][:200]
        return False, f"plain matrix products, as the fused ones fail here: {reason}"
    plain = _measure_milliseconds(_plain_as_trained(), rows, width, inner, device)
    return fused < plain, f"{'fused' if fused < plain else 'plain'} (fused {fused:.2f} ms, plain {plain:.2f} ms)"


def _plain_as_trained() -> Callable[..., torch.Tensor]:
    return torch.compile(plain_mlp, dynamic=False)


def _random_parts(rows: int, width: int, inner: int, device: torch.device) -> list[torch.Tensor]:
    """States, up, down and a gradient, of the sizes of training."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((1, rows, width), (inner, width), (width, inner), (1, rows, width))
    parts = [torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) for shape in shapes]
    return [parts[0], parts[1] * width**-0.5, parts[2] * inner**-0.5, parts[3]]


def _measure_error(width: int, inner: int, device: torch.device) -> float:
    """Greatest relative error of the output and of each gradient against fp32, on a few tiles of rows."""
    *parts, gradient = _random_parts(1000, width, inner, device)
    results = []
    for function, dtype in ((fused_mlp, torch.bfloat16), (plain_mlp, torch.float32)):
        leaves = [part.to(dtype).detach().requires_grad_() for part in parts]
        output = function(*leaves)
        results.append([output.detach(), *torch.autograd.grad(output, leaves, gradient.to(dtype))])
    pairs = zip(*results, strict=True)
    return max(float((got.float() - true).norm() / true.norm()) for got, true in pairs)


def _measure_milliseconds(
    function: Callable[..., torch.Tensor], rows: int, width: int, inner: int, device: torch.device
) -> float:
    """Of forward and backward."""
    *parts, gradient = _random_parts(rows, width, inner, device)
    leaves = [part.requires_grad_() for part in parts]

    def work() -> None:
        torch.autograd.grad(function(*leaves), leaves, gradient)

    return 1000 * time_repeated(work, device, repeats=2)
