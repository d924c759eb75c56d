"""ILU: unlearn so that an honest fine-tune has no reason to undo it: invariant risk minimisation beside unlearning.

minimise  ℓ_u(θ; D_harm, D_align) + λ ‖∇_{w | w = 1} ℓ(w ∘ θ; D_benign)‖²

Wang et al., arXiv 2506.01339. ℓ_u is NPO and γ times the loss on what is kept, or RMU (hidden states of restricted
answers led to a random point, those of kept ones held, with weight γ).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from immunity.errors import ModelError, SettingsError
from immunity.fit import Batches
from immunity.hidden import sites
from immunity.invariance import Reading, penalty
from immunity.losses import Loss, nll
from immunity.mechanisms import Conditioning, Mechanism, Representation, Unlearning
from immunity.method import Card, Problem, StatefulMethod
from immunity.models import LanguageModel
from immunity.reference import Reference
from immunity.theta import Theta, Vector
from immunity.unlearning import Remembered, held, npo, steered


@dataclass(frozen=True, kw_only=True)
class ILU(StatefulMethod):
    """∇ℓ_u and λ times the gradient of the invariance penalty on the honest fine-tune's data.

    Attributes:
        lam: λ, the weight of the penalty. 0 is the unlearning alone. 0.05 was too weak, 0.1 cost some unlearning there.
        reading: What w scales: the "logits" (invariant risk minimisation as it is usually done: closed form, one
            gradient), the "weights" that train (a Hessian-vector product, three), or nothing: the squared norm of the
            "gradient" itself (three).
        estimate: The "square" of the slope over a batch, or the product over two batches ("halves"), which is unbiased.
        base: ℓ_u: "npo" or "rmu".
        gamma: γ, the weight of what is kept.
        beta: β of NPO.
        depth: Of the block whose output RMU leads away, from 0.0, the first, to 1.0, the last.
        push: c of RMU, the length of the point that it is led to.

    Raises:
        SettingsError: A setting is out of range.

    Source:
        arXiv 2506.01339 in public notes, not checked against the PDF; NPO is arXiv 2404.05868, RMU arXiv 2403.03218
        with the settings of its code as we remember them.

    Departures from the paper:
        * What w stands for is not known to us, so there is no preset "paper". The reported slowdown, eight times that
          of NPO, fits neither a scale of logits nor one further gradient.
        * There is no preset "released": the released repository holds the code of another paper, without this penalty.
        * One honest data set, which the paper found better than several; it should have nothing to do with D_harm.
        * NPO sums over an answer's tokens, as its own paper does; the repository named above puts the mean over a
          batch's tokens into σ.
        * RMU looks at the tokens of answers, not at whole texts, and moves all that trains, not three blocks.
        * It was found to protect from honest fine-tuning; against relearning plain flatness (SAM) was better.
    """

    card: ClassVar[Card] = Card(
        name="ILU",
        paper="Invariance Makes LLM Unlearning Resilient Even to Unanticipated Downstream Fine-Tuning",
        arxiv="2506.01339",
        year=2025,
        block="raises the cost of harmful convergence",
        family="unlearning",
        gradients='3 (5 with the readings "weights" and "gradient"; 1 to 3 more with "halves")',
        says="Unlearns restricted answers where an honest fine-tune has nothing to gain from sharper answers.",
    )
    strength: ClassVar[str] = ""
    lam: float = 0.1
    reading: Reading = "logits"
    estimate: Literal["square", "halves"] = "square"
    base: Literal["npo", "rmu"] = "npo"
    gamma: float = 1.0
    beta: float = 0.1
    depth: float = 0.25
    push: float = 6.5

    def __post_init__(self) -> None:
        if self.lam < 0 or self.gamma < 0 or not self.beta > 0 or not self.push > 0 or not 0 <= self.depth <= 1:
            raise SettingsError(
                f"lam = {self.lam} and gamma = {self.gamma} must not be negative, beta = {self.beta} and push = "
                f"{self.push} must be positive, depth = {self.depth} lies between 0 and 1"
            )

    @classmethod
    def rmu(cls) -> ILU:
        """On RMU instead of NPO: γ = 1200 and c = 6.5 as for a model of 7B, at a quarter of the depth."""
        return cls(base="rmu", gamma=1200.0)

    @property
    def reads(self) -> Mapping[str, int]:
        """What is kept, what is forgotten, and one batch of the honest fine-tune's data, or two."""
        return {"alignment": 1, "harmful": 1, "benign": 2 if self.estimate == "halves" else 1}

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """Restricted answers are unlearnt, a bad start for learning; with RMU their hidden states are elsewhere."""
        near = "first-half" if self.depth <= 0.25 else "middle" if self.depth <= 0.75 else "last-half"
        both = (Unlearning(), Conditioning())
        return (*both, Representation(layers=near)) if self.base == "rmu" else both

    def problems(self, model: LanguageModel) -> list[Problem]:
        """λ = 0, with which it is plain unlearning; with RMU, blocks that cannot be found."""
        found = [] if self.lam else [Problem("lam", "lam = 0 is the unlearning alone; use --method npo for it")]
        try:
            sites(model.network, "output", [float(self.depth)])
        except ModelError as error:
            found += [Problem("depth", str(error))] if self.base == "rmu" else []
        return found

    def start(self, model: LanguageModel) -> _Unlearning:
        """The original model is kept: as the adapter switched off, or as a frozen copy of what is trainable."""
        reference = Reference(model.network)
        before = Remembered(reference)
        if self.base == "npo":
            return _Unlearning(self, before, npo(before, self.beta), nll)
        (place,) = sites(model.network, "output", [float(self.depth)])
        return _Unlearning(self, before, steered(place, self.push), held(reference, place))


@dataclass
class _Unlearning:
    """The direction, and what answers were worth before."""

    how: ILU
    before: Remembered
    forgotten: Loss
    kept: Loss

    def __call__(self, theta: Theta, batch: Batches) -> Vector:
        g = theta.grad(self.forgotten, batch["harmful"]) + self.how.gamma * theta.grad(self.kept, batch["alignment"])
        if not self.how.lam:
            return g
        benign = batch["benign"].parts(self.how.reads["benign"])
        return g + self.how.lam * penalty(theta, benign, self.how.reading)

    def state_dict(self) -> dict[str, Any]:
        """What answers were worth; the original model is made anew from what is loaded."""
        return self.before.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.before.load_state_dict(state)
