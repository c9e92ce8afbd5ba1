"""How does a matrix product apply ReLU^2, or its slope, before its result leaves the chip? (Needs Triton.)"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


class Tiling(NamedTuple):
    """How a product is cut: rows, columns and depth of a tile, tiles in flight, warps, parts of the way out."""

    rows: int = 128
    columns: int = 256
    depth: int = 64
    stages: int = 3
    warps: int = 8
    halves: bool = True


UP_TILING = Tiling()
SLOPE_TILING = Tiling()
GROUP = 8  # tiles of rows that follow each other, so that their columns' weights stay in the L2 cache


@triton.jit
def _write_tile(accumulator, output, kept, row, column, SLOPE: tl.constexpr):
    """ReLU^2 of the tile; or the tile times the slope 2 relu(x) = 2 sqrt(relu(x)^2), from the `kept` output."""
    if SLOPE:
        squared = kept.load([row, column]).to(tl.float32)
        accumulator = accumulator * (2.0 * tl.sqrt(squared))
    else:
        accumulator = tl.maximum(accumulator, 0.0)
        accumulator = accumulator * accumulator
    output.store([row, column], accumulator.to(output.dtype))


@triton.jit
def _product(
    left,
    right,
    kept,
    output,
    num_rows,
    num_columns,
    shared,
    programs,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    HALVES: tl.constexpr,
    SLOPE: tl.constexpr,
):
    """`left @ right.T` for ReLU^2, `left @ right` for the slope; each program makes every `programs`-th tile."""
    row_tiles = tl.cdiv(num_rows, ROWS)
    column_tiles = tl.cdiv(num_columns, COLUMNS)
    tiles_in_group = GROUP * column_tiles
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, programs, flatten=True):
        first = tile // tiles_in_group * GROUP
        group = min(row_tiles - first, GROUP)
        row = (first + tile % tiles_in_group % group) * ROWS
        column = tile % tiles_in_group // group * COLUMNS
        accumulator = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for step in range(tl.cdiv(shared, DEPTH)):
            rows = left.load([row, step * DEPTH])
            if SLOPE:
                accumulator = tl.dot(rows, right.load([step * DEPTH, column]), accumulator)
            else:
                accumulator = tl.dot(rows, right.load([column, step * DEPTH]).T, accumulator)
        if HALVES:  # half as much shared memory on the way out leaves room for more tiles in flight
            halves = tl.permute(tl.reshape(accumulator, (ROWS, 2, COLUMNS // 2)), (0, 2, 1))
            lower, upper = tl.split(halves)
            _write_tile(lower, output, kept, row, column, SLOPE)
            _write_tile(upper, output, kept, row, column + COLUMNS // 2, SLOPE)
        else:
            _write_tile(accumulator, output, kept, row, column, SLOPE)


def _run_product(
    left: torch.Tensor, right: torch.Tensor, kept: torch.Tensor | None, columns: int, tiling: Tiling
) -> torch.Tensor:
    output = torch.empty(left.shape[0], columns, dtype=left.dtype, device=left.device)
    out_block = [tiling.rows, tiling.columns // 2 if tiling.halves else tiling.columns]
    right_block = [tiling.columns, tiling.depth] if kept is None else [tiling.depth, tiling.columns]
    tiles = triton.cdiv(left.shape[0], tiling.rows) * triton.cdiv(columns, tiling.columns)
    programs = tiles
    if left.is_cuda:
        programs = min(tiles, torch.cuda.get_device_properties(left.device).multi_processor_count)
    _product[(programs,)](
        TensorDescriptor.from_tensor(left, [tiling.rows, tiling.depth]),
        TensorDescriptor.from_tensor(right, right_block),
        TensorDescriptor.from_tensor(output if kept is None else kept, out_block),
        TensorDescriptor.from_tensor(output, out_block),
        left.shape[0],
        columns,
        left.shape[1],
        programs,
        ROWS=tiling.rows,
        COLUMNS=tiling.columns,
        DEPTH=tiling.depth,
        GROUP=GROUP,
        HALVES=tiling.halves,
        SLOPE=kept is not None,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    return output


@torch.library.custom_op("chatmodel::multiply_relu_squared", mutates_args=(), device_types="cuda")
def multiply_relu_squared(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`relu(states @ weight.T)^2` of contiguous states (N, D) and weight (M, D): (N, M)."""
    return _run_product(states, weight, None, weight.shape[0], UP_TILING)


@multiply_relu_squared.register_fake
def _(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return states.new_empty(states.shape[0], weight.shape[0])


@torch.library.custom_op("chatmodel::multiply_slope", mutates_args=(), device_types="cuda")
def multiply_slope(gradient: torch.Tensor, weight: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """What reaches the product before ReLU^2: `(gradient @ weight) * 2 sqrt(output)`.

    Args:
        gradient: (N, D), of what `output @ weight.T` became. weight: (D, M). output: (N, M), ReLU^2's.
    """
    return _run_product(gradient, weight, output, weight.shape[1], SLOPE_TILING)


@multiply_slope.register_fake
def _(gradient: torch.Tensor, weight: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(output)
