"""Vaccine: hidden states are drifted as far as hurts most while the model is aligned, so that it learns to bear drift.

minimise  max_{‖ε‖ ≤ ρ} ℓ(f̃_{ε_L} ∘ … ∘ f̃_{ε_1}(x), y)        with  ε_l = ρ ∇_{e_l} ℓ / ‖(∇_{e_1} ℓ, …, ∇_{e_L} ℓ)‖

Huang et al., arXiv 2402.01109: e_l is what attention adds to the residual stream in block l; ℓ is the alignment loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from immunity.errors import ModelError, SettingsError
from immunity.fit import Batches
from immunity.hidden import sites
from immunity.losses import nll
from immunity.mechanisms import Drift, Mechanism
from immunity.method import Card, GradientMethod, Problem
from immunity.models import LanguageModel
from immunity.theta import Theta, Vector
from immunity.transforms import Masks, NormScope, check_places, drifted


@dataclass(frozen=True, kw_only=True)
class Vaccine(GradientMethod):
    """∇ℓ_align(θ; e + ε*(θ)), with ε* a constant: two passes over one batch of alignment data, no harmful data.

    Attributes:
        rho: ρ, the length of the drift. 0 is SFT, bit for bit.
        norm_scope: What has the length ρ: "global", the drift of a batch over all blocks, examples and positions (the
            paper); "per_example", of each example; "per_layer", of each block. With "global" ρ is shared between the
            rows of a batch, so it does not carry over to another batch size, depth or length, and a batch cannot be
            split into micro-batches.
        masks: Whether LoRA's dropout drops the "same" units in both passes or draws "fresh" ones (the released code:
            its ε is for another network than the one it is added to). One and the same without dropout.
        mean: "example" averages tokens within a row and then rows, "token" (the released code) over all tokens.

    Raises:
        SettingsError: ``rho`` is negative.

    Source:
        arXiv 2402.01109, eq. 2 and Algorithm 1, and github.com/git-disl/Vaccine. ρ = 2 at a batch of 5 is its README's;
        later papers run it as a baseline with 3 and 5 at a batch of 10.

    Departures from the paper:
        * The gradient of the first pass is taken with respect to the hidden states alone; the released code takes, and
          throws away, that of the weights as well. The second pass's is the same.
        * The released code's random noise, an ablation of the paper's, is never reached in it, and is not here.
        * Trained on the role "alignment" as given; the released code's are answers to ordinary questions, not refusals.
    """

    card: ClassVar[Card] = Card(
        name="Vaccine",
        paper="Vaccine: Perturbation-aware Alignment for Large Language Models against Harmful Fine-tuning Attack",
        arxiv="2402.01109",
        year=2024,
        block="raises the cost of harmful convergence",
        family="perturbed hidden states",
        gradients="2 (one of them with respect to hidden states only)",
        says="Aligns under the worst drift of hidden states, so that fine-tuning's drift unlearns less.",
    )
    strength: ClassVar[str] = "rho"
    rho: float = 2.0
    norm_scope: NormScope = "global"
    masks: Masks = "same"
    mean: Literal["example", "token"] = "example"

    def __post_init__(self) -> None:
        if not self.rho >= 0:
            raise SettingsError(f"rho = {self.rho}: the length of a drift must not be negative")

    @classmethod
    def paper(cls) -> Vaccine:
        """The objective as printed, on one network: ρ = 2 over the batch."""
        return cls()

    @classmethod
    def released(cls) -> Vaccine:
        """What the authors' code does: token means, and dropout drawn anew for the second pass."""
        return cls(masks="fresh", mean="token")

    @property
    def reads(self) -> Mapping[str, int]:
        """One batch of alignment data."""
        return {"alignment": 1}

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """Hidden states may drift by ρ at all blocks; nothing with ρ = 0."""
        per: dict[str, Literal["batch", "example", "layer"]]
        per = {"global": "batch", "per_example": "example", "per_layer": "layer"}
        return (Drift(radius=self.rho, per=per[self.norm_scope], layers="all"),) if self.rho else ()

    def problems(self, model: LanguageModel) -> list[Problem]:
        """ρ = 0; a model whose attention cannot be found, or which does not checkpoint its blocks one by one."""
        found = [Problem("rho", "rho = 0 drifts nothing; use --method sft for the baseline")] if self.rho == 0 else []
        try:
            check_places(model.network, sites(model.network, "attention"))
        except ModelError as error:
            found.append(Problem("model", str(error)))
        return found

    def gradient(self, theta: Theta, batch: Batches) -> Vector:
        """∇ of the alignment loss where hidden states have drifted."""
        rows = batch["alignment"].by_tokens() if self.mean == "token" else batch["alignment"]
        places = sites(theta.network, "attention")
        return theta.grad(drifted(nll, self.rho, places, norm_scope=self.norm_scope, masks=self.masks), rows)
