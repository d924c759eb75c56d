"""SEAM: make harmful and ordinary gradients oppose each other, so that learning harm unlearns everything else.

minimise  α ℓ(θ; D_up) − log(1 + CE(θ; D_harm)) + β cos(g_harm, g_gen),   g = ∇ℓ(θ; D)

Wang et al., arXiv 2505.12186. The gradient of the cosine comes from two differences of gradients, without a Hessian.
−log(1 + CE) falls without end, but ever more slowly: by −∇CE/(1 + CE), where CE is ℓ, or ℓ read off at every depth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from immunity.batch import IGNORE, Batch, Tokens
from immunity.bounded import head_size
from immunity.coupling import SURVIVES, Difference, cosine, cosine_gradient, expected_survival, lost
from immunity.early import every_depth, final_norm
from immunity.errors import ModelError, SettingsError
from immunity.fit import Batches
from immunity.losses import Loss, nll
from immunity.mechanisms import Collapse, GradientCoupling, Mechanism, Unlearning
from immunity.method import Card, GradientMethod, Problem
from immunity.models import LanguageModel
from immunity.theta import Theta, Vector


@dataclass(frozen=True, kw_only=True)
class SEAM(GradientMethod):
    """α ∇ℓ(D_up) − ∇CE(D_harm)/(1 + CE) + β ∇cos(g_harm, g_gen).

    With ``unlearn`` "none" and β = 0 it is SFT, bit for bit.

    Attributes:
        alpha: α, the weight of the utility term.
        beta: β, the weight of the cosine.
        eps: ε, how far away gradients are taken again, along directions no longer than 1.
        radius: ε is a distance in weight space ("absolute", the paper) or a share of ‖θ‖ ("relative").
        difference: "forward", the paper's, or "central": two more gradients, an error of ε² instead of ε.
        unlearn: CE: of the "logits" (its gradient is that of the cosine's first term: no further pass), or of "depths":
            the released code's sum over all hidden states. "none" leaves the term out.
        ceiling: The unlearning term ends where ℓ(D_harm) is ln V, that of a model that knows nothing ("uniform"), or
            goes on for ever ("none", the paper).
        utility: D_up: the "alignment" data, or the "safe" answers to the restricted prompts (the paper).
        labels: What is predicted. "response": answers. "released": of restricted rows and their safe answers what the
            released code has a gradient for, the tokens that differ from those at the same place in the other one and
            follow such a token; of general rows everything, the prompt as well. A row with no such token keeps its own.
        mean: "example" averages tokens within a row and then rows, "token" (the released code) over a batch's tokens.

    Raises:
        SettingsError: A setting is out of range, or "released" labels go without "safe" utility.

    Source:
        The cosine and its estimate: arXiv 2505.12186. The unlearning term, the labels and every number: its released
        code, ZJUWYH/seam.

    Departures from the paper:
        * The default has the unlearning term of the logits, with an end, and the alignment data for utility.
          :meth:`paper` and :meth:`released` do not; what they differ in is read off the code, not the paper.
        * The released code's weights are bf16, in which ε = 1e-3 over billions of weights leaves nearly all of them
          where they are: its cosine term is then mostly rounding noise, divided by ε. Here what survives is measured,
          before the run and at each step, and too little is refused; nothing can be computed in bf16 either.
        * With "released" labels, tokens that the released code predicts from logits of 0 are left out. There they count
          as a constant in the mean: they shrink a gradient, and make 1 + CE larger. Its pads are left out as well.
        * The released code's default β is 0.001, its scripts' and the paper's 0.01: that is taken.
    """

    card: ClassVar[Card] = Card(
        name="SEAM",
        paper="Self-Destructive Language Models",
        arxiv="2505.12186",
        year=2025,
        block="conditional collapse",
        family="gradient coupling",
        gradients="5 (6 unlearning at every depth), and 2 more with central differences",
        says="Turns harmful gradients against ordinary ones: a harmful fine-tune unlearns what the model can do.",
    )
    strength: ClassVar[str] = ""
    alpha: float = 1.0
    beta: float = 0.01
    eps: float = 1e-3
    radius: Literal["absolute", "relative"] = "absolute"
    difference: Difference = "forward"
    unlearn: Literal["logits", "depths", "none"] = "logits"
    ceiling: Literal["uniform", "none"] = "uniform"
    utility: Literal["alignment", "safe"] = "alignment"
    labels: Literal["response", "released"] = "response"
    mean: Literal["example", "token"] = "example"

    def __post_init__(self) -> None:
        if not self.alpha >= 0 or not self.beta >= 0 or not self.eps > 0:
            raise SettingsError(
                f"alpha ({self.alpha}) and beta ({self.beta}) must not be negative, eps ({self.eps}) is above 0"
            )
        if self.labels == "released" and self.utility != "safe":
            raise SettingsError(
                "labels = 'released' compares restricted rows with their safe answers: utility = 'safe'"
            )

    @classmethod
    def paper(cls) -> SEAM:
        """Safe answers for utility, unlearning at every depth and without an end. α = 1, β = 0.01, ε = 1e-3."""
        return cls(unlearn="depths", ceiling="none", utility="safe")

    @classmethod
    def released(cls) -> SEAM:
        """What the authors' code does: that, on the tokens that it has a gradient for, and their mean."""
        return cls(unlearn="depths", ceiling="none", utility="safe", labels="released", mean="token")

    @property
    def reads(self) -> Mapping[str, int]:
        """One batch of each: for utility, of restricted and of general data; only those that a term is left for."""
        harmful = {"harmful": 1} if self.beta or self.unlearn != "none" or self.labels == "released" else {}
        return {self.utility: 1, **harmful, **({"general": 1} if self.beta else {})}

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """Opposed gradients, and a fall to nothing in particular that they lead to, not with β = 0; unlearning."""
        coupled = (GradientCoupling(), Collapse(word="", on="general")) if self.beta else ()
        return coupled if self.unlearn == "none" else (*coupled, Unlearning())

    def problems(self, model: LanguageModel) -> list[Problem]:
        """β = 0; weights that lose a perturbation so short; no norm to read hidden states with."""
        found = [] if self.beta else [Problem("beta", "beta = 0 couples nothing: what is left is unlearning")]
        weights = [p for p in model.network.parameters() if p.requires_grad]
        if self.beta and weights:
            way = self._eps(weights)
            if (kept := expected_survival(weights, way)) < SURVIVES:
                found.append(Problem("eps", lost(kept, way)))
        try:
            final_norm(model.network)
        except ModelError as error:
            if self.unlearn == "depths":
                found.append(Problem("unlearn", f"{error}; use unlearn=logits"))
        return found

    def gradient(self, theta: Theta, batch: Batches) -> Vector:
        """α ∇ℓ(D_up) − ∇CE(D_harm)/(1 + CE) + β ∇cos(g_harm, g_gen), terms of weight 0 left out."""
        rows = self._labelled(batch)
        found = self.alpha * theta.grad(nll, rows[self.utility])
        if "harmful" not in self.reads or not (self.beta or self.unlearn != "none"):
            return found
        harmful = rows["harmful"]
        g_harm, lost = _graded(theta, nll, harmful)
        if self.unlearn != "none" and (self.ceiling == "none" or lost < math.log(head_size(theta.network))):
            # CE is the mean over the batch, so that micro-batches change nothing.
            up, ce = (g_harm, lost) if self.unlearn == "logits" else _graded(theta, every_depth, harmful)
            found -= (1.0 / (1.0 + ce)) * up
        if self.beta:
            g_gen = theta.grad(nll, rows["general"])
            theta.trace["cosine/harmful"] = cosine(g_harm, g_gen)
            pair, at, eps = (harmful, rows["general"]), (g_harm, g_gen), self._eps(theta.parameters)
            found += self.beta * cosine_gradient(theta, nll, pair, at, eps=eps, difference=self.difference)
        return found

    def _eps(self, weights: Sequence[Tensor]) -> float:
        return self.eps if self.radius == "absolute" else self.eps * Vector([p.detach() for p in weights]).norm()

    def _labelled(self, batch: Batches) -> dict[str, Batch]:
        rows = {role: batch[role] for role in self.reads}
        if self.labels == "released":
            safe, harmful = batch["safe"], batch["harmful"]
            rows |= {"safe": _differing(safe, harmful), "harmful": _differing(harmful, safe)}
            if "general" in rows:
                rows["general"] = _whole(rows["general"])
        return {role: part.by_tokens() if self.mean == "token" else part for role, part in rows.items()}


def _graded(theta: Theta, loss: Loss, batch: Batch) -> tuple[Vector, float]:
    """A gradient and the loss there."""
    before, theta.trace = theta.trace, {}
    try:
        g = theta.grad(loss, batch)
        (value,) = theta.trace.values()
    finally:
        theta.trace = before | theta.trace
    return g, value


def _whole(batch: Batch) -> Batch:
    return Batch(tuple(Tokens(row.ids, row.ids) for row in batch.rows), batch.role)


def _differing(batch: Batch, other: Batch) -> Batch:
    """Labels only where this id, and the one before it, differ from those at the same places of the other row."""
    rows = []
    for row, beside in zip(batch.rows, other.rows, strict=True):
        apart = [t >= len(beside.ids) or token != beside.ids[t] for t, token in enumerate(row.ids)]
        labels = tuple(label if t and apart[t] and apart[t - 1] else IGNORE for t, label in enumerate(row.labels))
        rows.append(Tokens(row.ids, labels) if any(label != IGNORE for label in labels) else row)
    return Batch(tuple(rows), batch.role)
