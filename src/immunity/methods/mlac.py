"""MLAC: raise the restricted loss where an attacker arrives who learns how fast to go.

minimise over θ  ℓ(θ; D_align) − λ/(K+1) Σ_{k=0..K} min(ℓ(θ_k; D_heldout), ln V)
minimise over η  1/(K+1) Σ_{k=0..K} min(ℓ(θ_k; D_heldout), ln V)
with θ_0 = θ,  θ_{k+1} = θ_k − η ⊙ Adam(∇ℓ(θ_k; D_harm)),  one η for each group of layers

Henderson et al., arXiv 2211.14946: self-destructing models. η is the attacker's; both steps are taken at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, final

import torch
from torch import Tensor, nn

from immunity.bounded import clamped
from immunity.errors import ModelError, SettingsError
from immunity.fit import Batches
from immunity.losses import Loss, nll
from immunity.mechanisms import Conditioning, LookAhead, Mechanism, Unlearning
from immunity.method import Card, Problem, StatefulMethod
from immunity.models import LanguageModel
from immunity.networks import decoder_blocks
from immunity.optimizers import Descent
from immunity.reference import Reference, kl
from immunity.theta import Theta, Vector
from immunity.trajectories import adamw, walk

SLOWEST: Final = 1e-6
FASTEST: Final = 1e-2
"""The attacker's learning rates stay between these."""
CLIP: Final = 100.0
"""Largest norm of a gradient that the attacker steps along."""


@dataclass(frozen=True, kw_only=True)
class MLAC(StatefulMethod):
    """∇ℓ_align − λ times the mean of the restricted gradients along an attacker's walk, each applied at θ.

    Attributes:
        lam: λ, the weight of the walk. 0 is SFT, bit for bit, without ``kl``.
        lookahead: K, Adam steps of the simulated attacker, each on a fresh batch. 0 is the paper's baseline, AC
            (adversarial censoring): no walk, the loss is raised at θ, on the restricted rows themselves.
        lr: Where the attacker's learning rates η start, from 1e-6 to 1e-2, between which they are kept.
        learn: Learning rate of Adam on ln η. 0 keeps η as it is.
        groups: Bands of blocks that have an η each; what lies outside of blocks has another. A model of fewer blocks
            has one for each of them. 1 is a single η for all weights.
        ceiling: What is cut at ln V and not raised further: the loss of each "token", the mean of each "example" (then
            its hard tokens pay for its easy ones), or "none": no bound.
        kl: Weight of KL(p_before ‖ p_θ) on the alignment data, beside their loss.

    Raises:
        SettingsError: A setting is out of range.

    Source:
        arXiv 2211.14946 and its released code, Breakend/SelfDestructingModels; the cut at ln V is that of the baseline
        MLAC-AR in arXiv 2408.00761.

    Departures from the paper:
        * First order: the gradient at θ_k is applied at θ, where the paper differentiates through all K steps. Memory
          does not depend on K. Second order is a test's oracle (docs/adr/0002-no-double-backward.md): on a random model
          of two layers, K = 4, the cosine between both is 0.9999 at η = 3e-4, 0.998 at 1e-3 and 0.88 at 1e-2.
        * A language model has no task head, so the attacker learns his rates alone and resets nothing. (In the
          released code the head that he learns is dropped for BERT, and its gradient is None.)
        * No convex calibration layer. The paper calibrates the logits by the best W in [−1, 1], so that its loss is at
          most ln V, the one with W = 0; min(ℓ, ln V) is that with W in {0, 1}. The rates descend the same, where the
          released code's descend ℓ without calibration.
        * One η for each group of layers, learnt as ln η and first order too: dℓ(θ_k)/d ln η_g = ⟨∇ℓ(θ_k), θ_k − θ⟩ over
          the group, the attacker's directions held fixed. The released code learns one number, η itself.
        * The default looks K = 4 steps ahead, not 16; batches are as large as the run says, not drawn from 12, 24, 48.
        * Adam on θ, its rate (1e-5) and clipping (10) are the run's. There is no penalty on gradient norms.
        * No preset for the released code: it needs a private fork of ``higher``, and its settings turn on both losses.
    """

    card: ClassVar[Card] = Card(
        name="MLAC",
        paper="Self-Destructing Models: Increasing the Costs of Harmful Dual Uses of Foundation Models",
        arxiv="2211.14946",
        year=2022,
        block="raises the cost of harmful convergence",
        family="adversarial meta-learning",
        gradients="2K + 2 (10 with K = 4, 34 with the paper's 16)",
        says="Raises the restricted loss all along the walk of a simulated attacker who learns how fast to go.",
    )
    strength: ClassVar[str] = "lam"
    lam: float = 1.0
    lookahead: int = 4
    lr: float = 3e-4
    learn: float = 1e-4
    groups: int = 4
    ceiling: Literal["token", "example", "none"] = "token"
    kl: float = 0.0

    def __post_init__(self) -> None:
        if self.lam < 0 or self.learn < 0 or self.kl < 0 or self.lookahead < 0:
            raise SettingsError(
                f"lam ({self.lam}), learn ({self.learn}), kl ({self.kl}) and lookahead ({self.lookahead}) must not be "
                "negative"
            )
        if not SLOWEST <= self.lr <= FASTEST:
            raise SettingsError(f"lr = {self.lr}: the attacker's learning rates lie between {SLOWEST} and {FASTEST}")
        if self.groups < 1:
            raise SettingsError(f"groups = {self.groups}: the attacker has at least one learning rate")

    @classmethod
    def paper(cls) -> MLAC:
        """K = 16 and one learning rate for all weights, as far as a first-order port can follow."""
        return cls(lookahead=16, groups=1)

    @property
    def reads(self) -> Mapping[str, int]:
        """Alignment, K restricted batches, a held-out one; without a walk there is nothing to hold out."""
        walked = {"harmful": self.lookahead, "heldout": 1} if self.lookahead else {"harmful": 1}
        return {"alignment": 1, **walked}

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """An attacker of K steps, or for K = 0 a bad start for learning, and answers unlearnt; none with λ = 0."""
        if not self.lam:
            return ()
        walks = LookAhead(steps=self.lookahead, radius=self.lr, rule="adamw") if self.lookahead else Conditioning()
        return (walks, Unlearning())

    def problems(self, model: LanguageModel) -> list[Problem]:
        """λ = 0; blocks that cannot be found for the groups."""
        found = [] if self.lam else [Problem("lam", "lam = 0 raises nothing; use --method sft for the baseline")]
        try:
            banded([], model.network, self.groups)
        except ModelError as error:
            found.append(Problem("groups", f"{error}; groups=1 needs none"))
        return found

    def start(self, model: LanguageModel) -> _Racing:
        """All rates at ``lr``; for the divergence the model as it is now."""
        names = [name for name, p in model.network.named_parameters() if p.requires_grad]
        rates = _Rates(banded(names, model.network, self.groups), self.lr, self.learn)
        raised = clamped(math.inf) if self.ceiling == "none" else clamped(per=self.ceiling)
        return _Racing(self, rates, raised, kl(Reference(model.network)) if self.kl else None)


def banded(names: Sequence[str], network: nn.Module, groups: int) -> list[int]:
    """The group of each coordinate, by name: bands of blocks from the first to the last, and one for all else.

    Raises:
        ModelError: There is more than one group, and no blocks.
    """
    if groups == 1:
        return [0] * len(names)
    blocks = [f"{name}." for name in decoder_blocks(network)]
    bands = min(groups, len(blocks))
    found = [
        next((i * bands // len(blocks) for i, b in enumerate(blocks) if name.startswith(b)), bands) for name in names
    ]
    present = sorted(set(found))
    return [present.index(band) for band in found]


@dataclass
class _Racing:
    """The defender's direction, and the step of the attacker's rates that goes with it."""

    how: MLAC
    rates: _Rates
    raised: Loss
    kept: Loss | None

    def __call__(self, theta: Theta, batch: Batches) -> Vector:
        g = theta.grad(nll, batch["alignment"])
        if self.kept is not None:
            g = g + self.how.kl * theta.grad(self.kept, batch["alignment"])
        return g + self.how.lam * self._walk(theta, batch) if self.how.lam else g

    def _walk(self, theta: Theta, batch: Batches) -> Vector:
        """The mean gradient of −min(ℓ, ln V) over θ_0 … θ_K; the rates go where that loss grows."""
        steps = self.how.lookahead
        harmful = batch["harmful"].parts(steps) if steps else ()
        rows, share = batch["heldout" if steps else "harmful"], 1.0 / (steps + 1)
        attacker, slope = _Paced(theta, self.rates.each()), self.rates.zero()

        def outer(k: int) -> Vector:
            g = theta.grad(self.raised, rows)
            if k:
                slope.sub_(share * self.rates.summed(g, attacker.gone))  # of −loss: the attacker's sign is the other
            return g

        found = walk(theta, attacker, harmful, outer, dict.fromkeys(range(steps + 1), share))
        if steps:
            theta.trace.update(self.rates.shown())
            self.rates.descend(slope)
        return found

    def state_dict(self) -> dict[str, Any]:
        """The rates and their optimiser's."""
        return self.rates.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.rates.load_state_dict(state)


@final
class _Paced:
    """A fresh attacker: Adam, times the rate of each coordinate. Knows how far he has come."""

    def __init__(self, theta: Theta, rates: Sequence[float]) -> None:
        self._adam, self._rates = adamw(theta, 1.0, weight_decay=0.0), list(rates)
        self.gone = [torch.zeros_like(p) for p in theta.parameters]

    def __call__(self, g: Vector) -> Vector:
        length = g.norm()
        moves = self._adam(g * (CLIP / length) if length > CLIP else g).tensors()
        torch._foreach_mul_(moves, self._rates)
        torch._foreach_add_(self.gone, moves)
        return Vector(moves)


@final
class _Rates:
    """The attacker's learning rates, one for each group, learnt as logarithms in float64."""

    def __init__(self, group: Sequence[int], lr: float, learn: float) -> None:
        self._group, self._learn = torch.tensor(list(group)), learn
        self.log = torch.full((max(group) + 1,), math.log(lr), dtype=torch.float64)
        self._adam = Descent([self.log], "adam", lr=learn, momentum=0.0, weight_decay=0.0)

    def each(self) -> list[float]:
        """The rate of every coordinate."""
        return [float(rate) for rate in self.log.exp()[self._group]]

    def zero(self) -> Tensor:
        """A slope of 0 for every group."""
        return torch.zeros_like(self.log)

    def summed(self, g: Vector, gone: Sequence[Tensor]) -> Tensor:
        """⟨g, gone⟩ over the coordinates of each group."""
        products = torch.stack([(a * b).sum() for a, b in zip(g.tensors(), gone, strict=True)])
        return self.zero().index_add_(0, self._group, products.double().cpu())

    def descend(self, slope: Tensor) -> None:
        """One step of Adam against dloss/d ln η, kept in bounds."""
        self._adam.step([slope], self._learn)
        self.log.clamp_(math.log(SLOWEST), math.log(FASTEST))

    def shown(self) -> dict[str, float]:
        """For the log."""
        return {f"attacker_lr/{i}": float(rate) for i, rate in enumerate(self.log.exp())}

    def state_dict(self) -> dict[str, Any]:
        """Rates and moments; copies, because both are stepped in place."""
        return {"log": self.log.clone(), "adam": self._adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.log.copy_(state["log"])
        self._adam.load_state_dict(state["adam"])
