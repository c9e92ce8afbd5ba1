"""How does Muon move a stack of matrices of one shape?"""

import torch

from chatmodel.optim.orthogonalization import orthogonalize


def update_matrices(
    weights: torch.Tensor,
    gradients: torch.Tensor,
    momenta: torch.Tensor,
    second_moments: torch.Tensor | None,
    lr: torch.Tensor,
    momentum: torch.Tensor,
    weight_decay: torch.Tensor,
    *,
    beta2: float,
    method: str,
    dtype: torch.dtype | None = None,
    skip: torch.Tensor | None = None,
) -> None:
    """One step of Muon on `weights` (n, rows, columns), in place, together with its state.

    Nesterov momentum, then orthogonalization; the update is scaled by sqrt(max(1, rows / columns)). Weights that the
    update does not grow are decayed (cautious decay, arXiv 2510.12402). Given `second_moments`, rows are brought to
    one size before orthogonalization (MuonEq), the result to the norm of a semi-orthogonal matrix (Muon+), and each
    row's (or column's) update is divided by its running size (NorMuon, arXiv 2510.05491).

    Source: karpathy/nanochat@92d63d4 nanochat/optim.py, with two deviations. Weights decay by the bare `lr`, there by
    the rate that is scaled for the shape: at 4:1 ours decay half as much. And Polar Express has its paper's numbers
    (`orthogonalize`).

    Args:
        second_moments: (n, rows, 1) for tall and square matrices, (n, 1, columns) for wide ones.
        method, dtype: of the orthogonalization.
        lr, momentum, weight_decay: scalars on the device, so that a compiled step is made once for all their values.
        skip: a boolean on the device; where it is true nothing changes, without anybody waiting to know.
    """
    rows, columns = weights.shape[-2:]
    gradients = gradients.to(momenta.dtype)
    _replace(momenta, momenta.lerp(gradients, 1 - momentum), skip)
    # Nesterov: look ahead along the momentum from the gradient.
    ahead = gradients.lerp(momenta, momentum)
    if second_moments is None:
        updates = orthogonalize(ahead, method, dtype=dtype)
    else:
        updates = restore_norm(orthogonalize(equilibrate_rows(ahead), method, dtype=dtype))
        updates = normalize_updates(updates, second_moments, beta2, skip=skip)
    updates = updates * (lr * max(1.0, rows / columns) ** 0.5)
    shrinks = (updates * weights) >= 0
    _replace(weights, weights - (updates + (lr * weight_decay) * weights * shrinks), skip)


def _replace(old: torch.Tensor, new: torch.Tensor, skip: torch.Tensor | None) -> None:
    old.copy_(new if skip is None else torch.where(skip, old, new))


def equilibrate_rows(matrices: torch.Tensor) -> torch.Tensor:
    """Bring the rows of each (..., rows, columns) to one size, the root mean square of their norms.

    The polynomials of the orthogonalization reach small singular values in more steps than there are; of evened out
    rows fewer are small. In early training, with high rates, this and `restore_norm` matter most.
    """
    row_norms = matrices.norm(dim=-1, keepdim=True)
    target = row_norms.square().mean(dim=-2, keepdim=True).sqrt()
    return matrices * (target / row_norms.clamp_min(1e-6))


def restore_norm(updates: torch.Tensor) -> torch.Tensor:
    """Give each (..., rows, columns) the Frobenius norm of a semi-orthogonal matrix, sqrt(min(rows, columns))."""
    norms = updates.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-6)
    return updates * (min(updates.shape[-2:]) ** 0.5 / norms)


def normalize_updates(
    updates: torch.Tensor, second_moments: torch.Tensor, beta2: float, *, skip: torch.Tensor | None = None
) -> torch.Tensor:
    """Even out the sizes of rows (tall) or columns (wide) of (n, rows, columns), keeping each matrix's norm."""
    tall = updates.size(-2) >= updates.size(-1)
    mean_squares = updates.float().square().mean(dim=-1 if tall else -2, keepdim=True)
    _replace(second_moments, second_moments.lerp(mean_squares, 1 - beta2), skip)
    scales = second_moments.clamp_min(1e-10).rsqrt()
    norm_before = mean_squares.sum(dim=(-2, -1), keepdim=True).sqrt()
    norm_after = (mean_squares * scales.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
    return updates * (scales * (norm_before / norm_after.clamp_min(1e-10))).to(updates.dtype)
