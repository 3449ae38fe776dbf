"""How far a kernel may be from the truth: one rule and one table for every test of the kernel library.

The truth is the same formula in fp64 on the same (already rounded) inputs. PyTorch computes it in the dtype under test,
too, and the kernel may err at most twice as much as PyTorch does, in the largest element, plus a floor relative to the
largest true value:

    error ≤ 2·(PyTorch's error) + FLOOR[dtype]·max|truth| + conditioning·2⁻²²·max|truth|

The floor covers cases in which PyTorch happens to be exact. `conditioning` says how much larger than the result the
numbers are that it is the difference of, because their rounding to fp32 stays in it whoever computes it: |mean| over
deviation of what is normalised; Σ|terms| over |Σ terms| of a sum, which is about √n for n terms of either sign.
"""

import torch

FLOOR = {
    torch.float64: 64 * torch.finfo(torch.float64).eps,
    torch.float32: 4 * torch.finfo(torch.float32).eps,
    torch.float16: 0.5 * torch.finfo(torch.float16).eps,
    torch.bfloat16: 0.5 * torch.finfo(torch.bfloat16).eps,
}


def assert_as_exact_as_torch(
    actual: torch.Tensor,
    peer: torch.Tensor,
    truth: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    conditioning: float = 0.0,
    what: str = "result",
) -> None:
    """`actual` errs at most as the rule above allows; `peer` is PyTorch's result, `dtype` by default `actual`'s."""
    assert actual.shape == truth.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    truth = truth.detach().cpu().double()
    error, peer_error = ((t.detach().cpu().double() - truth).abs().max().item() for t in (actual, peer))
    relative_floor = FLOOR[dtype or actual.dtype] + conditioning * 2.0**-22
    allowed = 2 * peer_error + relative_floor * truth.abs().max().item()
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}, PyTorch's own {peer_error:.3e}"
