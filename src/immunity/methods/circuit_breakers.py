"""Circuit Breakers: hidden states of restricted text are led away from where they were, all others stay.

minimise  c_s(t) · mean_{l ∈ S} ReLU(cos(h_l, h⁰_l)) on restricted text  +  c_r(t) · mean_k ‖h_k − h⁰_k‖₂ on other text

with  c_s = α (1 − p),  c_r = α p,  p = t / 2T        (both end at α / 2 after T steps)

Zou et al., arXiv 2406.04313 (representation rerouting). h⁰: states of the model before the first step; S: two depths.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from immunity.batch import IGNORE, Batch, Padded, Tokens
from immunity.blocks import blocks
from immunity.bounded import wide
from immunity.data.corpus import Corpora
from immunity.early import final_norm
from immunity.errors import ModelError, SettingsError
from immunity.fit import Batches, fit
from immunity.hidden import Site, n_layers
from immunity.lens import passed, stream
from immunity.losses import Loss
from immunity.mechanisms import Mechanism, Representation
from immunity.method import Card, Method, Problem, Run, identity, problems, refuse, streams
from immunity.models import LanguageModel
from immunity.reference import Reference
from immunity.theta import Theta, Vector

_LOG: Final = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CircuitBreakers(Method):
    """c_s ∇L_s + c_r ∇L_r, for the blocks up to the deepest of S; the others stay as they are.

    Attributes:
        alpha: α, the scale of both losses: 10 for Llama-3-8B, 5 for Mistral-7B. 0 trains nothing.
        depths: S, as shares of the model's depth: of its L blocks so many lie below. The authors' 10 and 20 of 32.
        horizon: 2T of the schedule: p reaches 1 there and stays. None: twice the length of the run. The released code
            has 300 whatever the run's length, which was 150.
        over: What counts of restricted text: "all" of it, prompts too (the authors), or the "response".
        blank: How often a restricted row is shown without its prompt (the released code: 0.5 for Llama-3).
        everywhere: L_r over all positions of rows padded to the model's length, so that short rows count little, and
            L_s averaged over all tokens of a batch (the released code); else over each row's tokens, and then rows.
        noise: Before anything has moved both losses are stationary: cos is at its greatest and ‖0‖ at its least. So
            every B of a fresh adapter starts as noise of this standard deviation instead of 0, and other trained
            weights change by as much relative to their size. 0 is the authors' start: rounding errors have to grow.

    Raises:
        SettingsError: A setting is out of range.

    Source:
        arXiv 2406.04313; its released code as three derived repositories keep it, the original was not readable.
        Theirs: LoRA of rank 16 on the blocks up to the deepest of S, AdamW at 1e-4, batches of 16, 150 steps.

    Departures from the paper:
        * ``noise``: the presets have it, too. Without it a run is decided by the rounding of its first steps, and with
          weights in bf16 it may never begin.
        * L_r is taken on the role "alignment". The authors' is UltraChat, and refusals for Llama-3.
        * Every weight can be trained instead of an adapter; h⁰ is then that of a frozen copy.
        * Rows are as they are asked, template included; the released code joins a conversation's messages by spaces.
        * It was made against prompts. Nobody claims that it withstands fine-tuning: a baseline for that.
    """

    card: ClassVar[Card] = Card(
        name="Circuit Breakers",
        paper="Improving Alignment and Robustness with Circuit Breakers",
        arxiv="2406.04313",
        year=2024,
        block="raises the cost of harmful convergence",
        family="representation",
        gradients="2 and two forward passes of the original, through the lower blocks only",
        says="Leads hidden states of restricted text away from where they were and holds all others in place.",
    )
    strength: ClassVar[str] = ""
    alpha: float = 10.0
    depths: tuple[float, ...] = (10 / 32, 20 / 32)
    horizon: int | None = None
    over: Literal["all", "response"] = "all"
    blank: float = 0.0
    everywhere: bool = False
    noise: float = 1e-3

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.noise < 0 or not 0 <= self.blank <= 1:
            raise SettingsError(
                f"alpha ({self.alpha}) and noise ({self.noise}) must not be negative, blank = {self.blank} lies "
                "between 0 and 1"
            )
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise SettingsError(f"depths = {self.depths}: give shares of the depth, between 0 and 1, as in 0.3,0.6")
        if self.horizon is not None and self.horizon < 1:
            raise SettingsError(f"horizon = {self.horizon}: at least 1 step, or none for twice the run's length")

    @classmethod
    def paper(cls) -> CircuitBreakers:
        """The objective as printed, α of Llama-3-8B."""
        return cls()

    @classmethod
    def released(cls) -> CircuitBreakers:
        """What the authors' code does for Llama-3-8B: the fixed horizon, pads in L_r, half the prompts blanked."""
        return cls(horizon=300, blank=0.5, everywhere=True)

    @property
    def reads(self) -> Mapping[str, int]:
        """One batch of restricted rows, one of rows on which nothing should change."""
        return {"alignment": 1, "harmful": 1}

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """States led elsewhere around the depths S; nothing with α = 0."""
        low, high = min(self.depths), max(self.depths)
        near = "first-half" if high <= 0.5 else "last-half" if low >= 0.5 else "middle"
        return (Representation(layers=near),) if self.alpha else ()

    def problems(self, model: LanguageModel) -> list[Problem]:
        """α = 0; a network that is too shallow or whose parts cannot be found; nothing trainable below the depths S."""
        found = [Problem("alpha", "alpha = 0 trains nothing")] if self.alpha == 0 else []
        try:
            final_norm(model.network)
            if n_layers(model.network) < 2:
                found.append(Problem("model", "a network of one block has no state between blocks to reroute"))
            elif not any(p.requires_grad for p in self.lower(model.network)):
                found.append(Problem("model", f"nothing is trainable in the blocks up to the depths {self.depths}"))
        except ModelError as error:
            found.append(Problem("model", str(error)))
        return found

    def immunise(self, model: LanguageModel, data: Corpora, run: Run) -> None:
        """Step off the stationary point, and descend.

        Raises:
            SettingsError: :func:`problems` found something.
        """
        refuse(problems(self, model, data))
        along = self.start(model)
        if self.noise == 0:
            _LOG.warning("noise = 0: both losses are stationary at the start, and rounding decides when it is left")
        self.step_off(model.network, run.fit.seed)
        fit(
            model.network,
            along,
            streams(self, model, data, run),
            run.fit,
            folder=run.folder,
            observe=run.observe,
            token=model.word_id,
            identity=identity(self, model, {role: data[role] for role in self.reads}, run),
        )

    def start(self, model: LanguageModel) -> Rerouting:
        """A fresh direction away from the model as it is: the adapter switched off, or a copy of what is trainable."""
        return Rerouting(self, Reference(model.network), model.max_length if self.everywhere else None)

    def step_off(self, network: nn.Module, seed: int) -> None:
        """Noise on what trains in the lower blocks: on every B of a fresh adapter, and relative to size elsewhere."""
        drawn = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.lower(network):
                if self.noise and p.requires_grad:
                    size = float(p.square().mean().sqrt()) or 1.0
                    p.add_((self.noise * size * torch.randn(p.shape, generator=drawn)).to(p))

    def targets(self, network: nn.Module) -> tuple[int, ...]:
        """S: numbers of the blocks that a state to reroute enters, each with at least one block below it."""
        n = n_layers(network)
        return tuple(sorted({min(max(round(depth * n), 1), n - 1) for depth in self.depths}))

    def coefficients(self, done: int, progress: float) -> tuple[float, float]:
        """c_s and c_r of the step after ``done`` others, at ``progress`` from 0 to 1 of the run."""
        p = progress / 2 if self.horizon is None else min(1.0, (done + 1) / self.horizon)
        return self.alpha * (1.0 - p), self.alpha * p

    def lower(self, network: nn.Module) -> list[nn.Parameter]:
        """The weights of the blocks up to the one that the deepest state enters, that one included."""
        return [p for block in blocks(network)[: max(self.targets(network)) + 1] for p in block.parameters()]


@dataclass
class Rerouting:
    """c_s ∇L_s + c_r ∇L_r, with the original at hand; counts its steps for the schedule.

    Attributes:
        how: Settings.
        before: The original.
        width: Tokens that rows are padded to for L_r; None averages over those that are no pads.
        done: Steps done.
    """

    how: CircuitBreakers
    before: Reference
    width: int | None
    done: int = 0

    def __call__(self, theta: Theta, batch: Batches) -> Vector:
        """The direction to descend along at ``theta``, which is left where it is."""
        away, held = self.how.coefficients(self.done, theta.progress)
        self.done += 1
        with theta.resting(self._upper(theta)):
            rerouted = theta.grad(Loss("rerouting", self._rerouting), self._shown(batch["harmful"]))
            retained = theta.grad(Loss("retained", self._retained), batch["alignment"])
        return away * rerouted + held * retained

    def _rerouting(self, network: nn.Module, batch: Batch) -> Tensor:
        """Mean over S and the tokens that count of ReLU(cos(h, h⁰)): [B]."""
        padded = batch.padded(next(network.parameters()).device)
        counted = padded.attention_mask.bool() if self.how.over == "all" else padded.labels != IGNORE
        at = [stream(network)[j] for j in self.how.targets(network)]
        then, now = self._both(network, padded, at)
        near = [functional.cosine_similarity(_full(a), _full(b), dim=-1).relu() for a, b in zip(now, then, strict=True)]
        total = torch.stack(near).sum(0).masked_fill(~counted, 0.0).sum(1)
        return total / (len(at) * counted.sum(1))

    def _retained(self, network: nn.Module, batch: Batch) -> Tensor:
        """Mean over the depths that are computed, and tokens, of ‖h − h⁰‖₂; the last depth through the final norm."""
        padded = wide(batch, self.width, next(network.parameters()).device)
        counted = padded.attention_mask.bool()
        then, now = self._both(network, padded, stream(network, max(self.how.targets(network)) + 1), normed=True)
        pairs = zip(now, then, strict=True)
        apart = torch.stack([torch.linalg.vector_norm(_full(a) - _full(b), dim=-1) for a, b in pairs]).mean(0)  # [B, T]
        rows = apart.masked_fill(~counted, 0.0).sum(1)
        return rows / (counted.sum(1) if self.width is None else self.width)

    def _both(
        self, network: nn.Module, padded: Padded, places: Sequence[Site], *, normed: bool = False
    ) -> tuple[list[Tensor], list[Tensor]]:
        """States of the original, without a gradient, and of the network; the last ones through the final norm."""

        def states(of: nn.Module) -> list[Tensor]:
            seen = passed(of, padded, places)
            found = [seen[place] for place in places]
            return [*found[:-1], final_norm(of)(found[-1])] if normed else found

        with self.before.standing() as original:
            then = states(original)
        return then, states(network)

    def _shown(self, batch: Batch) -> Batch:
        """Some rows without their prompts; weighted by the tokens that count where a batch is averaged over them."""
        coins = (torch.rand(len(batch)) < self.how.blank).tolist() if self.how.blank else [False] * len(batch)
        rows = tuple(_blanked(row) if coin else row for row, coin in zip(batch.rows, coins, strict=True))
        batch = Batch(rows, batch.role, batch.weights)
        if not self.how.everywhere:
            return batch
        if self.how.over == "response":
            return batch.by_tokens()
        return Batch(rows, batch.role, tuple(float(len(row.ids)) for row in rows))

    def _upper(self, theta: Theta) -> list[str]:
        lower = {id(p) for p in self.how.lower(theta.network)}
        return [name for name, p in zip(theta.names, theta.parameters, strict=True) if id(p) not in lower]

    def state_dict(self) -> dict[str, Any]:
        """How many steps are done; the original is made anew from what is loaded."""
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.done = int(state["done"])


def _blanked(row: Tokens) -> Tokens:
    """A row without its prompt; as it is where that leaves a single token."""
    first = next(t for t, label in enumerate(row.labels) if label != IGNORE)
    return Tokens(row.ids[first:], row.labels[first:]) if first + 1 < len(row.ids) else row


def _full(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()
