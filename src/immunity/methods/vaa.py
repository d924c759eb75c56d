"""VAA: practise most what a fine-tune forgets first, and from the worst point near by.

minimise over θ, against an adversary's q:  Σ_i q_i [(1 − λ) ℓ_i(θ) + λ ℓ_i(θ + ρ ∇ℓ_i/‖∇ℓ_i‖)],  i = 1, 2

Chen et al., arXiv 2506.03850: ℓ_1 is the loss on alignment rows that a proxy fine-tune leaves alone, ℓ_2 on those that
it makes a model forget (``immunity group`` finds them). q is played by EXP3, the bracket by a coin that shows λ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import torch

from immunity.errors import SettingsError
from immunity.fit import Batches
from immunity.losses import nll
from immunity.mechanisms import LookAhead, Mechanism
from immunity.method import Card, Problem, StatefulMethod
from immunity.models import LanguageModel
from immunity.samplers import Exp3
from immunity.simulated import EPS
from immunity.theta import Theta, Vector

GROUPS: Final = ("alignment", "vulnerable")


@dataclass(frozen=True, kw_only=True)
class VAA(StatefulMethod):
    """The gradient of one group's loss, drawn by EXP3, at θ or at the worst point within ρ of it.

    Attributes:
        rho: ρ, how far away the perturbed point is: one norm over all trainable weights.
        eta: η, EXP3's rate. 0 draws both groups equally often.
        lam: λ at the end of the run: how often the perturbed gradient is taken. 0 is SFT on drawn groups.
        curriculum: "linear" lets λ rise from 0 in proportion to the share of the run that is done; "none" keeps it at
            ``lam``: with 1 that is SAM on drawn groups.
        floor: The least probability of a group. 0 is the paper's sampler, which is not clipped.
        mean: "example" averages tokens within a row and then rows, "token" (the released code) over a batch's tokens.

    Raises:
        SettingsError: A setting is out of range.

    Source:
        arXiv 2506.03850, and the trainer of the released code, ChanLiang/VAA; η and ρ are those for Llama-2-7B.

    Departures from the paper:
        * A step is handed a batch of both groups and uses the drawn one; in the released code the other one waits.
        * Trainable weights are fp32; the released run's are bf16, in which ρ = 0.4 leaves most of them unmoved.
        * The released trainer fails on import (a call above its definition); :meth:`released` is what the rest says.
    """

    card: ClassVar[Card] = Card(
        name="VAA",
        paper="Vulnerability-Aware Alignment: Mitigating Uneven Forgetting in Harmful Fine-Tuning",
        arxiv="2506.03850",
        year=2025,
        block="raises the cost of harmful convergence",
        family="group-robust alignment",
        gradients="1 to 2 (1.5 on average)",
        says="Practises what a fine-tune forgets first, more and more under small perturbations of the weights.",
    )
    strength: ClassVar[str] = ""
    rho: float = 0.4
    eta: float = 0.007
    lam: float = 1.0
    curriculum: Literal["linear", "none"] = "linear"
    floor: float = 0.1
    mean: Literal["example", "token"] = "example"

    def __post_init__(self) -> None:
        if self.rho < 0 or self.eta < 0:
            raise SettingsError(f"rho ({self.rho}) and eta ({self.eta}) must not be negative")
        if not 0 <= self.lam <= 1 or not 0 <= self.floor < 0.5:
            raise SettingsError(f"lam = {self.lam} lies between 0 and 1, floor = {self.floor} from 0 to below 0.5")

    @classmethod
    def paper(cls) -> VAA:
        """The paper's sampler, without clipping. ρ = 0.4, η = 0.007."""
        return cls(floor=0.0)

    @classmethod
    def released(cls) -> VAA:
        """What the authors' code says: probabilities clipped to [0.1, 0.9], token means. ρ = 0.4, η = 0.007."""
        return cls(mean="token")

    @property
    def reads(self) -> Mapping[str, int]:
        """One batch of each group."""
        return dict.fromkeys(GROUPS, 1)

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """It prepares for one adversarial step of length ρ; for none with ρ = 0 or λ = 0."""
        return (LookAhead(steps=1, radius=self.rho, rule="normalised"),) if self.rho and self.lam else ()

    def problems(self, model: LanguageModel) -> list[Problem]:  # noqa: ARG002 - any model will do
        """ρ = 0 or λ = 0: nothing is perturbed."""
        inert = [name for name, value in (("rho", self.rho), ("lam", self.lam)) if value == 0]
        return [Problem(name, f"{name} = 0 perturbs nothing: what is left is SFT on drawn groups") for name in inert]

    def start(self, model: LanguageModel) -> _Drawing:  # noqa: ARG002 - any model will do
        """Both groups equally likely."""
        return _Drawing(self, Exp3(eta=self.eta, floor=self.floor))


@dataclass
class _Drawing:
    """Draws a group and a point, takes the gradient there, and tells the sampler the loss."""

    how: VAA
    groups: Exp3

    def __call__(self, theta: Theta, batch: Batches) -> Vector:
        drawn, coin = self.groups.draw(), float(torch.rand(()))
        rows = batch[GROUPS[drawn]]
        rows = rows.by_tokens() if self.how.mean == "token" else rows
        lam = self.how.lam * (theta.progress if self.how.curriculum == "linear" else 1.0)
        g, place = theta.grad(nll, rows), f"{nll.name}/{rows.role}"
        if coin < lam:
            with theta.moved(self.how.rho * g.unit(EPS)):
                g, place = theta.grad(nll, rows), f"{place}@1"
        self.groups.learn(drawn, theta.trace[place])
        theta.trace["probability/vulnerable"] = self.groups.p
        return g

    def state_dict(self) -> dict[str, Any]:
        """The sampler's."""
        return self.groups.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.groups.load_state_dict(state)
