"""Booster: flatten the way down, so that a harmful step gains little.

minimise  f(θ) + λ [h(θ) − h(θ′)]        with  θ′ = θ − α ∇h(θ)/‖∇h(θ)‖

Huang et al., arXiv 2409.01586: f is the loss on safe answers, h on harmful ones. To leading order the bracket is
α ‖∇h‖: a penalty on the length of the harmful gradient, of weight λα. It does not raise the harmful loss itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from immunity.batch import Batch
from immunity.errors import SettingsError
from immunity.fit import Batches
from immunity.losses import nll
from immunity.mechanisms import LookAhead, Mechanism
from immunity.method import Card, GradientMethod, Problem
from immunity.models import LanguageModel
from immunity.simulated import Curvature, pulled_back, walker
from immunity.theta import Theta, Vector


@dataclass(frozen=True, kw_only=True)
class Booster(GradientMethod):
    """∇f(θ) + λ (∇h(θ) − ∇h(θ′)), θ′ one simulated harmful step of length α away.

    Attributes:
        alpha: α, the length of the simulated step: one norm over all trainable weights. 0 makes the bracket 0.
        lam: λ, the weight of the bracket. 0 is SFT, bit for bit.
        curvature: How ∂θ′/∂θ enters the gradient: "none" drops it (the released code), "forward" and "central" count
            it by differences of gradients, at one and two further gradients.
        mean: "example" averages tokens within a row and then rows, "token" (the released code) over a batch's tokens.

    Raises:
        SettingsError: ``alpha`` or ``lam`` is negative.

    Source:
        The objective of arXiv 2409.01586; settings and first-order update of its released code, git-disl/Booster.

    Departures from the paper:
        * The default drops the curvature, λ (α/‖g‖) H (I − ĝĝᵀ) ∇h(θ′), as the released code does. What is dropped is
          small beside the bracket for small α only: at α = 0.1 it can be as large. :meth:`paper` counts it.
        * With micro-batches the harmful direction is that of the whole batch; the released code's is of each
          micro-batch, and loses all but the last of them.
        * Weights come back bit for bit after the simulated step; the released code subtracts and adds again.
    """

    card: ClassVar[Card] = Card(
        name="Booster",
        paper="Booster: Tackling Harmful Fine-tuning for Large Language Models via Attenuating Harmful Perturbation",
        arxiv="2409.01586",
        year=2024,
        block="raises the cost of harmful convergence",
        family="look-ahead",
        gradients="3 (4–5 with curvature)",
        says="Makes a harmful step gain little: the harmful gradient is kept short while the model is aligned.",
    )
    strength: ClassVar[str] = "lam"
    alpha: float = 0.1
    lam: float = 5.0
    curvature: Curvature = "none"
    mean: Literal["example", "token"] = "example"

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.lam < 0:
            raise SettingsError(f"alpha ({self.alpha}) and lam ({self.lam}) must not be negative")

    @classmethod
    def paper(cls) -> Booster:
        """The objective as printed, differentiated through the simulated step. α = 0.1, λ = 5."""
        return cls(curvature="central")

    @classmethod
    def released(cls) -> Booster:
        """What the authors' code does: first order, token means. α = 0.1, λ = 5."""
        return cls(mean="token")

    @property
    def reads(self) -> Mapping[str, int]:
        """One batch of alignment data and one of harmful data, which serves at both points."""
        return {"alignment": 1, "harmful": 1}

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """A simulated attacker of one step; none with λ = 0 or α = 0."""
        return (LookAhead(steps=1, radius=self.alpha, rule="normalised"),) if self.lam and self.alpha else ()

    def problems(self, model: LanguageModel) -> list[Problem]:  # noqa: ARG002 - any model will do
        """α = 0 or λ = 0, with which nothing is flattened."""
        inert = [name for name, value in (("alpha", self.alpha), ("lam", self.lam)) if value == 0]
        return [Problem(name, f"{name} = 0 flattens nothing; use --method sft for the baseline") for name in inert]

    def gradient(self, theta: Theta, batch: Batches) -> Vector:
        """∇f + λ ∇[h(θ) − h(θ′)]."""
        flattened = self._flattened(theta, self._averaged(batch["harmful"]))
        return theta.grad(nll, self._averaged(batch["alignment"])) + self.lam * flattened

    def _flattened(self, theta: Theta, harmful: Batch) -> Vector:
        """∇h(θ) − (∂θ′/∂θ)ᵀ ∇h(θ′), the Jacobian I unless ``curvature`` counts it; only the difference is kept."""
        g = theta.grad(nll, harmful)
        with theta.moved(walker("normalised", self.alpha)(g)):
            u = theta.grad(nll, harmful)
        return g - pulled_back(theta, nll, harmful, g, u, rule="normalised", alpha=self.alpha, curvature=self.curvature)

    def _averaged(self, batch: Batch) -> Batch:
        return batch.by_tokens() if self.mean == "token" else batch
