"""Conditioning: how well or badly gradient descent can learn from some features, and how to change that.

A linear probe on features x θ has the Hessian H = θᵀ K θ, K = Xᵀ X; gradient descent on it converges as its condition
number κ allows. For a symmetric S ≥ 0 with eigenvalues s_1 ≥ … ≥ s_d, of which the first k are not 0,

    R_well(S) = s_1²/2 − ‖S‖²/(2d)              ≥ 0, and 0 where all eigenvalues are equal
    R_ill(S)  = 1 / (‖S‖²/(2k) − s_k²/2)        > 0, and small where κ is large

Zheng et al., arXiv 2505.23760. Descending on either with K⁻¹ ∇_θ instead of ∇_θ moves κ the wanted way in every small
step; with ∇_θ, or K⁻¹ on the wrong side, it need not. Weights are [out, in], as ``nn.Linear`` holds them: θᵀ, so that
K⁻¹ multiplies gradients from the *right*.

An attacker who inserts the whitening M = H^{-1/2} after the features has κ = 1 again, whatever θ is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from immunity.errors import SettingsError


class Task(NamedTuple):
    """Inputs [n, in] and, for the task that stays, what a linear probe should say of them: [n, c]."""

    x: Tensor
    y: Tensor


def hessian(weight: Tensor, gram: Tensor) -> Tensor:
    """θᵀ K θ [out, out] of features x θ, from θᵀ [out, in] and K [in, in]."""
    return weight @ gram @ weight.T


def condition(s: Tensor, rank: int | None = None) -> float:
    """κ = s_1/s_k of a symmetric matrix; k is its size unless given."""
    found = torch.linalg.eigvalsh(s)
    return float(found[-1] / found[-(rank or len(found))])


def well(s: Tensor) -> Tensor:
    """R_well of a symmetric [d, d]: a scalar with its graph."""
    found: Tensor = torch.linalg.eigvalsh(s)
    return found[-1] ** 2 / 2 - found.square().sum() / (2 * len(found))


def ill(s: Tensor, rank: int | None = None) -> Tensor:
    """R_ill of a symmetric [d, d], k being d unless given: a scalar with its graph; infinite where S is isotropic."""
    found: Tensor = torch.linalg.eigvalsh(s)
    k = rank or len(found)
    return 1.0 / (found.square().sum() / (2 * k) - found[-k] ** 2 / 2)


def well_gradient(weight: Tensor, gram: Tensor) -> Tensor:
    """∇R_well(θᵀ K θ) in closed form: (2 K θ (s_1 v_1 v_1ᵀ − H/d))ᵀ, [out, in]."""
    h = hessian(weight, gram)
    s, v = _eigh(h)
    return 2.0 * (s[-1] * torch.outer(v[:, -1], v[:, -1]) - h / len(s)) @ weight @ gram


def ill_gradient(weight: Tensor, gram: Tensor, rank: int | None = None) -> Tensor:
    """∇R_ill(θᵀ K θ) in closed form: (2 K θ (s_k v_k v_kᵀ − H/k))ᵀ / (‖H‖²/(2k) − s_k²/2)², [out, in]."""
    h = hessian(weight, gram)
    s, v = _eigh(h)
    k = rank or len(s)
    below = s.square().sum() / (2 * k) - s[-k] ** 2 / 2
    return 2.0 * (s[-k] * torch.outer(v[:, -k], v[:, -k]) - h / k) @ weight @ gram / below**2


def _eigh(h: Tensor) -> tuple[Tensor, Tensor]:
    s, v = torch.linalg.eigh(h)
    return s, v


class _Precondition(torch.autograd.Function):
    """The identity; its backward pass multiplies by K⁻¹ from the right."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, gram: Tensor) -> Tensor:  # noqa: ANN401 - torch's context
        ctx.save_for_backward(gram)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Any) -> tuple[Tensor, None]:  # noqa: ANN401
        (gram,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return torch.linalg.solve(gram, grads[0].T).T, None


def preconditioned(weight: Tensor, gram: Tensor) -> Tensor:
    """``weight`` [out, in] itself, whose gradient G comes out as G K⁻¹, K [in, in]: the paper's dummy layer."""
    found: Tensor = _Precondition.apply(weight, gram)  # type: ignore[no-untyped-call]
    return found


def objective(weight: Tensor, probe: Tensor, kept: Task, harmful: Tensor, *, lam_well: float, lam_ill: float) -> Tensor:
    """½ mean ‖x θ w − y‖² + λ_P R_well(H_P) + λ_H R_ill(H_H), each regulariser preconditioned by its own K.

    Its ``backward`` gives the paper's update of θ (algorithm 1), and the plain gradient of the probe w.

    Args:
        weight: θᵀ [out, in].
        probe: w [out, c].
        kept: The task that is to stay easy, D_P.
        harmful: Inputs [m, in] of the task that is to get hard, D_H.
        lam_well: λ_P.
        lam_ill: λ_H.

    Raises:
        SettingsError: There are fewer inputs than dimensions, so that a K has no inverse.
    """
    grams = [x.T @ x for x in (kept.x, harmful)]
    for name, x in (("kept", kept.x), ("harmful", harmful)):
        if len(x) < x.shape[1]:
            raise SettingsError(
                f"{len(x)} {name} inputs of {x.shape[1]} dimensions: their Gram matrix has no inverse; give more inputs"
            )
    p, h = (hessian(preconditioned(weight, gram), gram) for gram in grams)
    error = 0.5 * (kept.x @ weight.T @ probe - kept.y).square().sum(1).mean()
    return error + lam_well * well(p) + lam_ill * ill(h)


def immunity_ratio(harmful: float, harmful_before: float, kept: float, kept_before: float) -> float:
    """RIR = (κ_H / κ_H before) / (κ_P / κ_P before): above 1 where harm got harder to learn than what is kept.

    "Before" must be another model, or the identity: the released code of deep networks compares one with itself.
    """
    return (harmful / harmful_before) / (kept / kept_before)


def axes(a: Tensor, b: Tensor, p: int) -> Tensor:
    """The p leading directions of two clouds together [d, p], orthonormal, no gradient; each cloud counts the same."""
    with torch.no_grad():
        both = torch.cat([x / torch.linalg.vector_norm(x).clamp_min(1e-30) for x in (a, b)])
        found: Tensor = torch.linalg.svd(both, full_matrices=False).Vh[:p].T
        return found


def spectrum(a: Tensor, directions: Tensor, ridge: float) -> Tensor:
    """E[a aᵀ] of states [n, d] along p directions, scaled to a mean eigenvalue of 1 and a ridge added: [p, p]."""
    seen = a @ directions
    s = seen.T @ seen
    p = len(s)
    eye = torch.eye(p, dtype=s.dtype, device=s.device)
    return s * (p / s.diagonal().sum().clamp_min(1e-30)) + ridge * eye
