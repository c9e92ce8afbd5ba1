"""The gradients of the fused MLP, put together from shares of the rows."""

import pytest
import torch

from chatmodel.kernels.accumulation import add_product
from chatmodel.kernels.mlp import differentiate_mlp, plain_mlp


def multiply_slope(gradient, weight, output):
    """What the kernel of the same name does."""
    return (gradient @ weight) * (2 * output.sqrt())


@pytest.mark.parametrize("num_rows", [1, 6, 7])
def test_gradients_in_shares_are_autograds(num_rows):
    generator = torch.Generator().manual_seed(0)
    sizes = ((num_rows, 4), (12, 4), (4, 12), (num_rows, 4))
    rows, up, down, gradient = (torch.randn(size, generator=generator, dtype=torch.float32) for size in sizes)
    leaves = [part.clone().requires_grad_() for part in (rows, up, down)]
    expected = torch.autograd.grad(plain_mlp(*leaves), leaves, gradient)
    asked = []

    def watched(part, weight, output):
        asked.append(len(part))
        return multiply_slope(part, weight, output)

    found = differentiate_mlp(gradient, rows, up, down, (rows @ up.T).relu().square(), watched)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert sum(asked) == num_rows
    assert max(asked) == -(-num_rows // 2)


def test_a_product_is_added_in_place():
    total, left, right = torch.ones(2, 2), torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]])
    add_product(total, left, right)
    assert total.tolist() == [[4.0, 5.0], [7.0, 9.0]]
