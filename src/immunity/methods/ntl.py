"""NTL: make a model bad at one domain, and keep the domain's hidden states apart from the others'. A baseline.

minimise  L_S − clamp(α L_A, ≤ β) · clamp(α′ MMD(Φ_S, Φ_A), ≤ β′)        released: each factor has a cap
minimise  L_S − min(β, α L_A · min(β′, α′ MMD(Φ_S, Φ_A)))                paper: so has the product

Wang et al., arXiv 2106.06916. L_S: cross-entropy on answers to keep (alignment); L_A: on restricted ones (harmful); Φ:
a row's mean hidden state in a middle block; MMD (squared, five kernels): ``immunity.mmd``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Final, Literal

import torch
from torch import Tensor, nn

from immunity.batch import Batch
from immunity.errors import ModelError, SettingsError
from immunity.fit import Batches
from immunity.hidden import Site, reading, sites
from immunity.losses import Loss, nll
from immunity.mechanisms import Conditioning, Mechanism, Representation, Unlearning
from immunity.method import Card, GradientMethod, Problem
from immunity.mmd import FLOOR, Kernel, Over, mmd2, pooled
from immunity.models import LanguageModel
from immunity.theta import Theta, Vector

FEWEST: Final = 16
"""Rows of either role below which MMD² says more about their number than about the model."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class NTL(GradientMethod):
    """∇ of L_S − α L_A · α′ MMD, capped. A baseline: it blocks transfer of the model as it is, not fine-tuning.

    A fine-tune gets back what was taken: SOPHON's table (arXiv 2404.12699) has 84.4 % on CIFAR-10 for a fine-tuned NTL
    model, 84.8 % for an unprotected one.

    Attributes:
        alpha: α, the weight of L_A. 0 is SFT, bit for bit.
        alpha_mmd: α′, the weight of MMD. 0 is SFT, too.
        beta: β, the cap of α L_A (released) or of the product (paper).
        beta_mmd: β′, the cap of α′ MMD. MMD is at most 7.7, so that with α′ = 0.1 a cap of 1 never binds.
        cap: Where β binds: on each of the "factors" (released) or on the "product" (paper).
        kernel: Of MMD: "five" bandwidths relative to the data, or "one", exp(−‖·‖²), for which the theory is written.
        depth: Of the block whose output is Φ, from 0.0, the first, to 1.0, the last; none averages the MMD of all.
        over: Φ is the mean over the tokens of the "response", or the state of the last token of the "prompt".

    Raises:
        SettingsError: A weight is negative, a cap is not positive, or ``depth`` lies outside [0, 1].

    Departures from the paper:
        * The port to language models is ours: L is the mean cross-entropy of an answer's tokens instead of an image's
          label, Φ the output of a block instead of an early feature map.
        * The attacker's ceiling is β/α = 10 nats with caps on factors: about ln |V|, a guess among all tokens, beyond
          which L_A is not pushed. The paper's cap leaves it β/(α · α′ MMD), which is 13 nats or more, and
          hundreds while MMD is near its floor.
        * The released code divides its L_A by the number of classes: its cap binds at 10 nats times that number.
        * Source-only NTL, which makes its restricted data by a GAN, and authorisation by a patch are left out.
        * Both roles go through the model in one batch, which cannot be split. Below 16 rows of each, MMD is mostly the
          floor of its biased estimate, about 3.1 (1/n + 1/m): a run says so and goes on.
    """

    card: ClassVar[Card] = Card(
        name="NTL",
        paper="Non-Transferable Learning: A New Approach for Model Ownership Verification and Applicability "
        "Authorization",
        arxiv="2106.06916",
        year=2021,
        block="raises the cost of harmful convergence",
        family="adversarial meta-learning",
        gradients="1, over two batches at once",
        says="Unlearns restricted answers and keeps their hidden states apart: a baseline, blocks no fine-tuning.",
    )
    strength: ClassVar[str] = "alpha"
    alpha: float = 0.1
    alpha_mmd: float = 0.1
    beta: float = 1.0
    beta_mmd: float = 1.0
    cap: Literal["factors", "product"] = "factors"
    kernel: Kernel = "five"
    depth: float | None = 0.5
    over: Over = "response"

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.alpha_mmd < 0:
            raise SettingsError(f"alpha ({self.alpha}) and alpha_mmd ({self.alpha_mmd}) must not be negative")
        if self.beta <= 0 or self.beta_mmd <= 0:
            raise SettingsError(f"beta ({self.beta}) and beta_mmd ({self.beta_mmd}) must be positive: 0 caps all away")
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise SettingsError(f"depth = {self.depth}: say 0.0 for the first block, 1.0 for the last, none for all")

    @classmethod
    def paper(cls) -> NTL:
        """As printed: β caps the product. α = α′ = 0.1, β = β′ = 1."""
        return cls(cap="product")

    @classmethod
    def released(cls) -> NTL:
        """As coded: each factor has its cap, so that MMD still trains when L_A has reached its own."""
        return cls(cap="factors")

    @property
    def reads(self) -> Mapping[str, int]:
        """One batch of answers to keep, one of restricted ones."""
        return {"alignment": 1, "harmful": 1}

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """Restricted states led elsewhere around ``depth``, answers unlearnt, badly started; none with a weight 0."""
        if not self.alpha * self.alpha_mmd:
            return ()
        depth = self.depth
        near = "all" if depth is None else "first-half" if depth < 0.25 else "middle" if depth <= 0.75 else "last-half"
        return (Representation(layers=near), Unlearning(), Conditioning())

    def problems(self, model: LanguageModel) -> list[Problem]:
        """Blocks that cannot be found; α = 0 or α′ = 0, with which nothing is kept apart."""
        inert = [name for name, value in (("alpha", self.alpha), ("alpha_mmd", self.alpha_mmd)) if value == 0]
        found = [Problem(name, f"{name} = 0 is plain SFT; use --method sft for the baseline") for name in inert]
        try:
            self._places(model.network)
        except ModelError as error:
            found.append(Problem("depth", str(error)))
        return found

    def gradient(self, theta: Theta, batch: Batches) -> Vector:
        """∇ of the whole objective, in one pass over both roles' rows, side by side."""
        kept, restricted = batch["alignment"], batch["harmful"]
        if not self.alpha * self.alpha_mmd:
            return theta.grad(nll, kept)
        _warn(min(len(kept), len(restricted)))
        met: dict[str, float] = {}
        found = theta.grad(self._loss(len(kept), met), (kept + restricted).as_role("both"))
        theta.trace.update(met)
        return found

    def _loss(self, n: int, met: dict[str, float]) -> Loss:
        """The objective of a batch whose first ``n`` rows are to be kept; its parts are written into ``met``."""

        def of(network: nn.Module, batch: Batch) -> Tensor:
            with reading(network, self._places(network)) as seen:
                each = nll(network, batch)  # [B]
            kept, restricted = each[:n].mean(), each[n:].mean()
            labels = batch.padded(each.device).labels
            states = [pooled(h, labels, self.over) for h in seen.values()]
            apart = torch.stack([mmd2(phi[:n], phi[n:], self.kernel) for phi in states]).mean()
            parts = {"nll/alignment": kept, "nll/harmful": restricted, "mmd/harmful": apart}
            met.update({name: float(value.detach()) for name, value in parts.items()})
            return (kept - self._taken(restricted, apart)).expand(len(batch))

        return Loss("ntl", of, coupled=True)

    def _taken(self, restricted: Tensor, apart: Tensor) -> Tensor:
        """What is subtracted from L_S: the product of α L_A and α′ MMD, capped."""
        distance = (self.alpha_mmd * apart).clamp_max(self.beta_mmd)
        if self.cap == "factors":
            return (self.alpha * restricted).clamp_max(self.beta) * distance
        return (self.alpha * restricted * distance).clamp_max(self.beta)

    def _places(self, network: nn.Module) -> tuple[Site, ...]:
        return sites(network, "output", "all" if self.depth is None else [float(self.depth)])


@cache
def _warn(rows: int) -> None:
    """Say once that there are too few rows."""
    if rows < FEWEST:
        _LOG.warning(
            "NTL sees %d rows of a role in a step: below %d, MMD is mostly its floor (%.1f here, of at most 7.7)",
            rows,
            FEWEST,
            2 * FLOOR / rows,
        )
