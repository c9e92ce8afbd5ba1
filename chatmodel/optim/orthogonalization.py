"""How is a matrix turned into its nearest semi-orthogonal one, by matrix products alone?"""

import torch

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


def orthogonalize(matrices: torch.Tensor, method: str, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The nearest semi-orthogonal matrix of each (..., rows, columns), approximately, by five matrix polynomials.

    The norm that Polar Express divides by has its paper's margin and epsilon, 1.02 and 1e-7; karpathy/nanochat@92d63d4
    has 1.01 and 1e-6.

    Args:
        method: "polar_express" (arXiv 2505.16932) or "newton_schulz" (Keller Jordan's Muon).
        dtype: to compute in; the iteration forgives bf16. By default bf16 on CUDA and fp32 elsewhere, as CPUs without
            bf16 units would only be slowed down by it.
    """
    coefficients = POLAR_EXPRESS_COEFFICIENTS if method == "polar_express" else NEWTON_SCHULZ_COEFFICIENTS
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.to(dtype or (torch.bfloat16 if matrices.is_cuda else torch.float32))
    x = x.mT if tall else x
    margin = 1.02 if method == "polar_express" else 1.0
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * margin + 1e-7)
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)
