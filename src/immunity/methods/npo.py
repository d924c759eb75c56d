"""NPO: make restricted answers less likely than they were, by a loss that ends where ascent would not.

minimise  ℓ(θ; D_align) + λ [L_NPO(θ; D_harm) + κ KL(p_before ‖ p_θ; D_align)]
with      L_NPO = −(2/β) E log σ(β [NLL_θ(y|x) − NLL_before(y|x)]),  NLL summed over the tokens of an answer

Zhang et al., arXiv 2404.05868. A baseline from unlearning: D_harm is what is to be forgotten, D_align what is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from immunity.errors import SettingsError
from immunity.fit import Batches
from immunity.losses import nll
from immunity.mechanisms import Conditioning, Mechanism, Unlearning
from immunity.method import Card, Problem, StatefulMethod
from immunity.models import LanguageModel
from immunity.preference import Per
from immunity.reference import Reference
from immunity.reference import kl as divergence
from immunity.theta import Theta, Vector
from immunity.unlearning import Remembered, npo


@dataclass(frozen=True, kw_only=True)
class NPO(StatefulMethod):
    """∇ of the loss on what is kept, and of negative preference for restricted answers: gradient ascent that ends.

    Attributes:
        lam: λ, the weight of what is forgotten. 0 is SFT, bit for bit.
        beta: β: the gradient is that of ascent at first and fades once an answer has lost several times 1/β nats.
        per: NLL summed over the "response" (the paper), or its mean per "token", with which β = 0.1 never bites.
        kl: κ, the weight of staying near the model as it was on the data to keep; 0 is NPO-RT, above 0 NPO-KL as well.
        mean: Of the loss on alignment data: "example" averages tokens within a row and then rows, "token" (the released
            code) over a batch's tokens.

    Raises:
        SettingsError: A setting is out of range.

    Source:
        arXiv 2404.05868; settings and means of its released code, licong-lin/negative-preference-optimization.

    Departures from the paper:
        * The use is ours: restricted prompts with compliant answers are forgotten, refusals and conversations kept, and
          the reference is the model that the run starts from. The paper forgets facts of a model fine-tuned on them.
        * What an answer was worth before is computed when it is first met and kept with the run, one number a row, as
          the code's frozen copy would say in every step; that copy is the adapter switched off where LoRA is trained.
        * β depends on length: summed over 128 tokens, β = 0.1 ends after about 0.4 nats a token. That is the paper's.
        * A released code that puts the mean of a batch's tokens into σ (ILU's) is not this one: it seldom saturates,
          and is ascent. "token" is the mean of each answer.
    """

    card: ClassVar[Card] = Card(
        name="NPO",
        paper="Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning",
        arxiv="2404.05868",
        year=2024,
        block="raises the cost of harmful convergence",
        family="unlearning",
        gradients="2 (3 with κ) and, for rows not met before, a forward pass of the original",
        says="Unlearns restricted answers until they are unlikely enough, keeping the rest: a baseline.",
    )
    strength: ClassVar[str] = "lam"
    lam: float = 1.0
    beta: float = 0.1
    per: Per = "response"
    kl: float = 0.0
    mean: Literal["example", "token"] = "example"

    def __post_init__(self) -> None:
        if self.lam < 0 or self.kl < 0 or not self.beta > 0:
            raise SettingsError(
                f"lam = {self.lam} and kl = {self.kl} must not be negative, beta = {self.beta} must be positive"
            )

    @classmethod
    def released(cls) -> NPO:
        """What the authors' code does by default (npo_grad_diff): NPO-RT, the loss on kept data over all its tokens."""
        return cls(mean="token")

    @property
    def reads(self) -> Mapping[str, int]:
        """One batch of what is kept, one of what is forgotten."""
        return {"alignment": 1, "harmful": 1}

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """Restricted answers are unlearnt, which is a bad start for learning them; none with λ = 0."""
        return (Unlearning(), Conditioning()) if self.lam else ()

    def problems(self, model: LanguageModel) -> list[Problem]:  # noqa: ARG002 - any model will do
        """λ = 0, with which nothing is forgotten."""
        return [] if self.lam else [Problem("lam", "lam = 0 forgets nothing; use --method sft for the baseline")]

    def start(self, model: LanguageModel) -> _Forgetting:
        """The original model is kept: as the adapter switched off, or as a frozen copy of what is trainable."""
        return _Forgetting(self, Reference(model.network))


class _Forgetting:
    """The direction, and what answers were worth before."""

    def __init__(self, how: NPO, reference: Reference) -> None:
        self.how = how
        self.before = Remembered(reference, how.per)
        self._loss, self._apart = npo(self.before, how.beta), divergence(reference)

    def __call__(self, theta: Theta, batch: Batches) -> Vector:
        kept = batch["alignment"]
        g = theta.grad(nll, kept.by_tokens() if self.how.mean == "token" else kept)
        if not self.how.lam:
            return g
        g = g + self.how.lam * theta.grad(self._loss, batch["harmful"])
        return g + (self.how.lam * self.how.kl) * theta.grad(self._apart, kept) if self.how.kl else g

    def state_dict(self) -> dict[str, Any]:
        """What answers were worth; the original model is made anew from what is loaded."""
        return self.before.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.before.load_state_dict(state)
