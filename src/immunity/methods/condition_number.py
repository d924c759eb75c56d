"""Condition Number, carried over to language models: an experiment of ours, not a published method for them.

minimise  ℓ(θ; D_align) + λ [R_ill(S_harm) + ω R_well(S_align)]         S = E[a aᵀ] over the tokens of answers

a are hidden states on the way to linear layers; R_ill is small where S is badly conditioned, R_well where it is well
conditioned (``immunity.conditioning``, which has the paper's own method for linear probes, exact).

Zheng et al., arXiv 2505.23760.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from immunity.batch import Batch
from immunity.conditioning import axes, condition, ill, spectrum, well
from immunity.errors import ModelError, SettingsError
from immunity.fit import Batches
from immunity.hidden import Site, reading, sites
from immunity.losses import Loss, chunked, nll, response_states, row_means
from immunity.mechanisms import Conditioning, Mechanism
from immunity.method import Card, GradientMethod, Problem
from immunity.models import LanguageModel
from immunity.theta import Theta, Vector

_LOG = logging.getLogger(__name__)
_EACH = partial(functional.cross_entropy, reduction="none")


@dataclass(frozen=True, kw_only=True)
class ConditionNumber(GradientMethod):
    """∇ of the loss on what is kept, and of two penalties on the spectra of hidden states. Experimental.

    The paper's attacker trains a linear probe by gradient descent. Ours trains the network, and has answers to this:
    a whitening layer, put after the states and folded into the next matrix, undoes all of it; an optimiser that scales
    each weight by its history (Adam, Adagrad) undoes what lies along the axes. :attr:`mechanisms` says so.

    Attributes:
        lam: λ, the weight of both penalties. 0 is SFT, bit for bit.
        well: ω, the weight of the penalty on states that are kept, beside that on restricted ones.
        layers: Depths of the blocks whose output is looked at, from 0.0, the first, to 1.0, the last.
        head: Whether what the head reads is looked at, too: the features of the model's own linear probe.
        axes: p: spectra are those along the p leading directions of both clouds together, fewer where a batch has not
            four times as many tokens.
        ridge: Added to every eigenvalue, whose mean is 1.

    Raises:
        SettingsError: A setting is out of range, or nothing is looked at.

    Departures from the paper:
        * All of the port is ours: the paper hardens linear and vision models. S stands for the Hessian of a linear
          layer that reads a (the input factor of K-FAC); block outputs are read through a norm.
        * S is scaled to a mean eigenvalue of 1, so that its size counts for nothing and λ is of the order 1; the
          paper's is up to 3e8.
        * Penalties are descended on by their plain gradients, as the authors do for deep networks; what is proven, a
          step that moves κ the right way, is so for the preconditioned step of the linear case alone.
        * The released code multiplies K⁻¹ from the wrong side for the linear case, normalises by the width of the
          input, and compares a deep network with itself: no preset is made of it.
        * Both roles go through the model in one batch, which cannot be split.
    """

    card: ClassVar[Card] = Card(
        name="Condition Number",
        paper="Model Immunization from a Condition Number Perspective",
        arxiv="2505.23760",
        year=2025,
        block="raises the cost of harmful convergence",
        family="geometric",
        gradients="1, over two batches at once, and decompositions of small matrices",
        says="Experimental: makes hidden states of restricted answers badly conditioned; a whitening layer undoes it.",
    )
    strength: ClassVar[str] = "lam"
    lam: float = 1.0
    well: float = 0.01
    layers: tuple[float, ...] = (0.5,)
    head: bool = True
    axes: int = 64
    ridge: float = 1e-4

    def __post_init__(self) -> None:
        if self.lam < 0 or self.well < 0 or not self.ridge > 0 or self.axes < 2:
            raise SettingsError(
                f"lam = {self.lam} and well = {self.well} must not be negative, ridge = {self.ridge} must be positive, "
                f"axes = {self.axes} at least 2"
            )
        if not all(0 <= layer <= 1 for layer in self.layers) or not (self.layers or self.head):
            raise SettingsError(
                f"layers = {self.layers}, head = {self.head}: give depths from 0.0, the first block, to 1.0, the last, "
                "as in 0.25,0.5; or none and head=true"
            )

    @property
    def reads(self) -> Mapping[str, int]:
        """One batch of what is kept, one of restricted answers."""
        return {"alignment": 1, "harmful": 1}

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """Bad conditioning, which whitening and adaptive optimisers undo; none with λ = 0."""
        return (Conditioning(),) if self.lam else ()

    def problems(self, model: LanguageModel) -> list[Problem]:
        """λ = 0; blocks that cannot be found."""
        found = [] if self.lam else [Problem("lam", "lam = 0 is plain SFT; use --method sft for the baseline")]
        try:
            self._places(model.network)
        except ModelError as error:
            found.append(Problem("layers", str(error)))
        return found

    def gradient(self, theta: Theta, batch: Batches) -> Vector:
        """∇ of the whole objective, in one pass over both roles' rows, side by side."""
        kept, harmful = batch["alignment"], batch["harmful"]
        if not self.lam:
            return theta.grad(nll, kept)
        met: dict[str, float] = {}
        found = theta.grad(self._loss(len(kept), met), (kept + harmful).as_role("both"))
        theta.trace.update(met)
        return found

    def _loss(self, n: int, met: dict[str, float]) -> Loss:
        """The objective of a batch whose first ``n`` rows are kept; its parts are written into ``met``."""

        def of(network: nn.Module, batch: Batch) -> Tensor:
            places = self._places(network)
            with reading(network, places) as seen:
                states, targets, keep = response_states(network, batch)
            m = int(keep[:n].sum())  # tokens of kept rows come first
            kept = row_means(chunked(network, states[:m], targets[:m], _EACH), keep[:n]).mean()
            clouds = [seen[place][:, :-1][keep] for place in places] + ([states] if self.head else [])
            if not all(bool(cloud.isfinite().all()) for cloud in clouds):
                return (kept * torch.nan).expand(
                    len(batch)
                )  # a decomposition would fail where Theta says what happened
            with torch.autocast(states.device.type, enabled=False):
                pairs = [self._spectra(cloud[:m], cloud[m:]) for cloud in clouds]
                good = torch.stack([well(kept_s) for kept_s, _ in pairs]).mean()
                bad = torch.stack([ill(harmful_s) for _, harmful_s in pairs]).mean()
            met.update({"nll/alignment": float(kept.detach()), "well/alignment": float(good.detach())})
            met["ill/harmful"] = float(bad.detach())
            for i, role in enumerate(("alignment", "harmful")):
                logs = [math.log10(condition(pair[i].detach())) for pair in pairs]
                met[f"log10-condition/{role}"] = sum(logs) / len(logs)
            return (kept + self.lam * (bad + self.well * good)).expand(len(batch))

        return Loss("conditioned", of, coupled=True)

    def _spectra(self, kept: Tensor, harmful: Tensor) -> tuple[Tensor, Tensor]:
        """S of two clouds [n, d] along their leading directions."""
        wide = torch.promote_types(kept.dtype, torch.float32)
        a, b = kept.to(wide), harmful.to(wide)
        p = min(self.axes, a.shape[1], max(2, min(len(a), len(b)) // 4))
        if p < min(self.axes, a.shape[1]):
            _warn(self.axes)
        along = axes(a.detach(), b.detach(), p)
        return spectrum(a, along, self.ridge), spectrum(b, along, self.ridge)

    def _places(self, network: nn.Module) -> tuple[Site, ...]:
        return sites(network, "output", [float(layer) for layer in self.layers])


@cache
def _warn(asked: int) -> None:
    """Say once that there are too few tokens."""
    _LOG.warning("spectra are taken along fewer than %d directions: a batch has too few tokens of answers", asked)
