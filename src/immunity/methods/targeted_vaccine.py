"""Targeted Vaccine: Vaccine on a few blocks, drawn by how much harmful data would move their hidden states.

s_l = ‖∂ℓ_harm / ∂e_l‖;   S ~ γ blocks without replacement, odds s_l / Σ s;   ε_l = ρ ∇_{e_l} ℓ / ‖∇_S ℓ‖ for l in S

Liu et al., arXiv 2410.09760: e_l is what attention adds to the residual stream in block l; blocks outside S are frozen.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Literal

from torch import nn

from immunity.errors import ModelError, SettingsError
from immunity.fit import Batches
from immunity.hidden import Site, module_at, n_layers, sites
from immunity.losses import nll
from immunity.mechanisms import Drift, Mechanism
from immunity.method import Card, Problem, StatefulMethod
from immunity.models import LanguageModel
from immunity.samplers import without_replacement
from immunity.theta import Theta, Vector
from immunity.transforms import Masks, check_places, drifted, site_norms

_LOG = logging.getLogger(__name__)

_DEEP: Final = 26
"""Above so many blocks the released code also leaves the block below each drawn one without checkpointing."""


@dataclass(frozen=True, kw_only=True)
class TargetedVaccine(StatefulMethod):
    """∇ℓ_align where the hidden states of the drawn blocks S have drifted, for the weights that S lets move.

    Attributes:
        rho: ρ, the length of the drift of a batch, over the drawn blocks, examples and positions.
        gamma: γ, blocks in S. A model that has no more draws them all, each time.
        redraw: J, steps that a drawn S is kept for.
        rescore: K, steps between two looks at the harmful data; S changes with them only when it is drawn next.
        freezes: Which weights take no step. "strict": all outside of the drawn blocks, MLPs, embeddings and head
            included. "compat": what the released code happens to freeze under LoRA: the attention of blocks that are
            not drawn, and everything below the lowest drawn block (below the one under it, in a model of more than 26
            blocks, where reentrant checkpointing ends higher up). MLPs above go on moving, drawn or not.
        masks: As for Vaccine: dropout of the second pass, the "same" or "fresh" (the released code).
        mean: "example" averages tokens within a row and then rows, "token" (the released code) over all tokens.

    Raises:
        SettingsError: A setting is out of range.

    Source:
        arXiv 2410.09760 and github.com/Lslland/T-Vaccine. ρ = 3, γ = 8 of 32 blocks (5 for Qwen2), K = 200.

    Departures from the paper:
        * A frozen weight keeps its value, its momentum and its place in AdamW's count of steps: no gradient, as in the
          released code, and not one of 0, with which momentum and decay would move it (``Vector.still``).
        * ρ = 0 is not SFT but SFT on drawn blocks, so the method has no strength.
        * s_l is over the rows of the harmful batch that the run gives (the root of the mean of its squares over
          examples); the released code's is of one row: ``batch_size={"harmful": 1}``.
        * With "compat" every weight outside of blocks is frozen too: under LoRA there is none.
        * The released code's memory comes from checkpointing blocks that are not drawn; here that is the model's own
          setting, and the graph ends below the lowest block that moves.
    """

    card: ClassVar[Card] = Card(
        name="Targeted Vaccine",
        paper="Targeted Vaccine: Safety Alignment for Large Language Models against Harmful Fine-Tuning via Layer-wise "
        "Perturbation",
        arxiv="2410.09760",
        year=2024,
        block="raises the cost of harmful convergence",
        family="perturbed hidden states",
        gradients="2 (one of them with respect to hidden states only), and another every K steps",
        says="Vaccine on the blocks that harmful data would move most; the others are frozen meanwhile.",
    )
    strength: ClassVar[str] = ""
    rho: float = 3.0
    gamma: int = 8
    redraw: int = 20
    rescore: int = 200
    freezes: Literal["strict", "compat"] = "strict"
    masks: Masks = "same"
    mean: Literal["example", "token"] = "example"

    def __post_init__(self) -> None:
        if not self.rho >= 0 or min(self.gamma, self.redraw, self.rescore) < 1:
            raise SettingsError(
                f"rho ({self.rho}) must not be negative; gamma ({self.gamma}), redraw ({self.redraw}) and rescore "
                f"({self.rescore}) are at least 1"
            )

    @classmethod
    def paper(cls) -> TargetedVaccine:
        """Blocks drawn at every step, the others frozen whole."""
        return cls(redraw=1)

    @classmethod
    def released(cls) -> TargetedVaccine:
        """What the authors' code does: blocks kept for 20 steps, MLPs not frozen, fresh dropout, token means."""
        return cls(freezes="compat", masks="fresh", mean="token")

    @property
    def reads(self) -> Mapping[str, int]:
        """One batch of alignment data; one of harmful data, looked at every ``rescore`` steps."""
        return {"alignment": 1, "harmful": 1}

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """Hidden states of a batch may drift by ρ, at blocks that nobody knows beforehand; nothing with ρ = 0."""
        return (Drift(radius=self.rho, per="batch", layers="all"),) if self.rho else ()

    def problems(self, model: LanguageModel) -> list[Problem]:
        """ρ = 0; attention that cannot be found; a block with nothing to train, which might be all that is drawn."""
        found = [Problem("rho", "rho = 0 drifts nothing; use --method sft for the baseline")] if self.rho == 0 else []
        try:
            check_places(model.network, sites(model.network, "attention"))
            bare = [layer for layer in range(n_layers(model.network)) if not _trains(model.network, layer)]
        except ModelError as error:
            return [*found, Problem("model", str(error))]
        if bare:
            found.append(Problem("model", f"nothing in block {bare[0]} is trainable: every block may be drawn alone"))
        return found

    def start(self, model: LanguageModel) -> _Drawing:
        """Nothing looked at, nothing drawn."""
        if (n := n_layers(model.network)) <= self.gamma:
            _LOG.warning("gamma = %d of %d blocks: all of them are drawn each time; lower gamma", self.gamma, n)
        return _Drawing(self)


@dataclass
class _Drawing:
    """One step after another: look, draw, drift.

    Attributes:
        how: Settings.
        done: Steps done.
        odds: Of each block, for the first of the draws; they sum to 1.
        drawn: S, in increasing order.
    """

    how: TargetedVaccine
    done: int = 0
    odds: list[float] = field(default_factory=list)
    drawn: list[int] = field(default_factory=list)

    def __call__(self, theta: Theta, batch: Batches) -> Vector:
        how = self.how
        aligned, harmful = (
            rows.by_tokens() if how.mean == "token" else rows for rows in (batch["alignment"], batch["harmful"])
        )
        if self.done % how.rescore == 0:
            norms = site_norms(theta, nll, harmful, sites(theta.network, "attention")).values()
            self.odds = [norm / (sum(norms) or 1.0) for norm in norms]  # all 0: nothing can be drawn
        if self.done % how.redraw == 0:
            self.drawn = list(without_replacement(self.odds, min(how.gamma, len(self.odds))))
        places = [Site(layer, "attention") for layer in self.drawn]
        with theta.resting(_resting(theta, how.freezes, self.drawn)):
            found = theta.grad(drifted(nll, how.rho, places, masks=how.masks), aligned)
        self.done += 1
        return found

    def state_dict(self) -> dict[str, Any]:
        """Steps done, odds and the drawn blocks."""
        return {"done": self.done, "odds": self.odds, "drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.done, self.odds, self.drawn = state["done"], list(state["odds"]), list(state["drawn"])


def _resting(theta: Theta, freezes: Literal["strict", "compat"], drawn: list[int]) -> set[str]:
    """The names of the coordinates that take no step."""
    network, n = theta.network, n_layers(theta.network)
    lowest = max(0, min(drawn) - (n > _DEEP))
    moving: set[int] = set()
    for layer in range(n):
        whole, attention = (_ids(network, Site(layer, where)) for where in ("output", "attention"))
        if layer in drawn:
            moving |= whole
        elif freezes == "compat" and layer >= lowest:
            moving |= whole - attention
    return {name for name, p in zip(theta.names, theta.parameters, strict=True) if id(p) not in moving}


def _ids(network: nn.Module, site: Site) -> set[int]:
    return {id(p) for p in module_at(network, site).parameters()}


def _trains(network: nn.Module, layer: int) -> bool:
    return any(p.requires_grad for p in module_at(network, Site(layer, "output")).parameters())
