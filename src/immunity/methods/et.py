"""E.T. (Ethical Treatment): block by block, train an intervention that does harm, then teach the block to undo it.

for l = 0 … L−1, some rounds each:
  φ  descends  ℓ(θ; D_harm)  where the input h of block l is  φ(h) = h + W₂ᵀ W₁ h  at prompt positions
  Δ  descends  Σ_m MSE(m_{θ+Δ}(h + i), m_θ(h)) + λ_reg Σ_m MSE(m_{θ+Δ}(h), m_θ(h)),   i = φ(h) − h,  m = attention, MLP
  θ ← θ + Δ  if harm under φ is less likely than before, and ordinary text nearly as likely as at the start

Ethical treatment of language models against harmful inference-time interventions (TechRxiv 1301297, 2026): Δ lies in
block l alone, whose inputs are kept, so that training it needs no other block.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Final, final

import torch

from immunity.batch import Batch
from immunity.blockwise import Block, LowRank, adapted, coordinates, prompts, treatable
from immunity.data.corpus import Corpora
from immunity.data.dealt import dealt
from immunity.errors import ModelError, SettingsError
from immunity.fit import Batches, Fit, fit
from immunity.hidden import Replace, Site, n_layers
from immunity.interventions import descend, trained
from immunity.losses import nll
from immunity.mechanisms import Interventions, LowRankEdit, Mechanism, Representation
from immunity.method import Card, Method, Problem, Run, identity, problems, refuse, streams
from immunity.models import LanguageModel
from immunity.theta import Theta, Vector
from immunity.transforms import check_places, edited

_LOG = logging.getLogger(__name__)

BATCHES: Final = 8
"""Batches of restricted rows that a round reads: Δ is trained on the prompts of all, an intervention on two of them."""
EACH: Final = 2
COHERENT: Final = 0.05
"""An intervention counts only if ordinary text stays at least this likely under it: the ratio of 1 / perplexity."""
_INNER: Final = ("lr", "optimizer", "momentum", "weight_decay", "clip", "schedule", "cycles", "warmup")
"""Settings of a run that are those of Δ's optimiser; the loop around it only adds up where it went."""


@dataclass(frozen=True, kw_only=True)
class ET(Method):
    """A step of the run is a round at one block. L blocks take L to ``rounds`` · L steps; more go round again.

    Attributes:
        rank: Of an intervention and of Δ. Where the run trains an adapter, Δ is what its factors in the block gain, of
            the adapter's own rank.
        attacks: Interventions in a round, each from another start and on other rows; those that succeed are undone
            together. If none does, the block is immune, and the next step is at the next block.
        attack_steps: Optimiser steps of each (AdamW).
        attack_lr: Its learning rate.
        success: What an intervention must gain to count: how far the NLL of held-out restricted answers falls, in nats
            a token.
        rounds: The most at one block before the next one's turn.
        steps: Optimiser steps of Δ, with the run's optimiser and its schedule over these steps.
        reg: λ_reg.
        keep: (safety, performance): Δ is kept if it takes back at least this share of what the interventions gained,
            and if 1 / perplexity of ordinary text is at least this share of what it was before the run.
        quirks: As the released code has it: Δ starts from noise, not from 0, and attention's is merged at twice the
            scale that it was trained at. Without effect where the run trains an adapter.

    Raises:
        SettingsError: A setting is out of range.

    Source:
        TechRxiv 1301297 and its released configurations, DISTA-HCAI/ET: rank 2, 20 prompts a batch of 10 at 4e-3 for 10
        to 15 epochs against 520 prompts in batches of 16 at 1e-4 for 150, λ_reg 0.01, (0.98, 0.75), 3 rounds. The
        paper's text was not at hand: :meth:`paper` is the released configuration without its faults.

    Departures from the paper:
        * Nobody judges generated text. An intervention succeeds by the NLL of restricted answers that it was not
          trained on, where the released code asks for twice the toxicity; safety is what Δ takes back of that, where
          it asks for 98 % of the initial safety. The default asks for half.
        * Several interventions are undone together: a change against one undoes that one. There, a second is trained if
          the first failed; :meth:`paper` has one attempt.
        * φ is h + W₂ᵀ W₁ h with W₂ = 0 at first, where theirs is h + Rᵀ (W − R) h: the same functions. No dropout, and
          whole answers, where theirs lack the last two tokens.
        * Δ starts at 0 and takes 200 steps, not 4800; all of the block's linear layers have it.
        * Inputs of the block are kept for a round instead of being computed in every step: the same numbers.
        * The loss on the block's output, in their code as well, is left out (by their comment it works worse), and so
          is the order from the last block to the first.
    """

    card: ClassVar[Card] = Card(
        name="E.T.",
        paper="Ethical treatment of language models against harmful inference-time interventions",
        arxiv="",
        elsewhere="TechRxiv 1301297",
        year=2026,
        block="raises the cost of harmful convergence",
        family="trained interventions",
        gradients="120 for four interventions, then 200 within one block",
        says="Block by block, trains an intervention on hidden states, then teaches the block to undo it.",
    )
    strength: ClassVar[str] = ""
    rank: int = 2
    attacks: int = 4
    attack_steps: int = 30
    attack_lr: float = 4e-3
    success: float = 0.02
    rounds: int = 3
    steps: int = 200
    reg: float = 0.01
    keep: tuple[float, float] = (0.5, 0.75)
    quirks: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", tuple(float(share) for share in self.keep))
        if min(self.rank, self.attacks, self.attack_steps, self.rounds, self.steps) < 1:
            raise SettingsError("rank, attacks, attack_steps, rounds and steps are at least 1")
        if not (0 < self.attack_lr < math.inf and 0 <= self.reg < math.inf and 0 <= self.success < math.inf):
            raise SettingsError(
                f"attack_lr ({self.attack_lr}) must be positive, reg ({self.reg}) and success ({self.success}) not "
                "negative"
            )
        if not (len(tuple(self.keep)) == len(("safety", "performance")) and max(self.keep) <= 1):
            raise SettingsError(f"keep = {self.keep}: two shares, of safety and of performance, of at most 1")

    @classmethod
    def paper(cls) -> ET:
        """One intervention a round, and nearly all of what it gained to be taken back; 150 epochs of 520 prompts."""
        return cls(attacks=1, steps=4800, keep=(0.98, 0.75))

    @classmethod
    def released(cls) -> ET:
        """The same with the released code's faults: Δ from noise, attention's merged at twice its scale."""
        return cls(attacks=1, steps=4800, keep=(0.98, 0.75), quirks=True)

    @property
    def reads(self) -> Mapping[str, int]:
        """Restricted rows to attack with and to defend on, others to judge by, and ordinary text."""
        return {"harmful": BATCHES, "heldout": 1, "general": 1}

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """Edits of hidden states are undone in every block, by changes of low rank."""
        met = Interventions(where="input", rank=self.rank, steps=self.attack_steps)
        return (Representation(layers="all"), met, LowRankEdit(k=self.rank * self.rounds))

    def problems(self, model: LanguageModel) -> list[Problem]:
        """Blocks, attention or MLPs that cannot be found; no block with anything to train."""
        try:
            places = [Site(i, where) for i in range(n_layers(model.network)) for where in ("attention", "mlp")]
            check_places(model.network, places)
            found = treatable(model.network)
        except ModelError as error:
            return [Problem("model", str(error))]
        return [] if found else [Problem("model", "nothing inside a block is trainable: no block can be treated")]

    def immunise(self, model: LanguageModel, data: Corpora, run: Run) -> None:
        """Take ``run.fit.steps`` rounds. Killed inside of a round, a run that is started again takes it again.

        Raises:
            SettingsError: :func:`problems` found something.
        """
        refuse(problems(self, model, data))
        data = dealt(self.reads, data)
        found = streams(self, model, data, run)
        # Rounds make the steps themselves: what is left is to add up where they went, at a rate of 1. Each is kept.
        around = replace(run.fit, optimizer="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, clip=None,
                         schedule="constant", warmup=0.0, save_every=1)  # fmt: skip
        inner = {name: value for name, value in asdict(run.fit).items() if name in _INNER}
        treatment = Treatment(self, run.fit, model, probe=found["general"](0).as_role("probe"))
        fit(
            model.network,
            treatment,
            found,
            around,
            folder=run.folder,
            observe=run.observe,
            token=model.word_id,
            identity={**identity(self, model, {role: data[role] for role in self.reads}, run), "loop": inner},
        )
        treatment.tell()


@final
class Treatment:
    """A round as a direction for :func:`~immunity.fit.fit`: minus the way from θ to θ + Δ; 0 if Δ is dropped.

    Args:
        how: The method.
        inner: What Δ's optimiser is.
        model: Before the first step.
        probe: Ordinary rows by which performance is judged.
    """

    def __init__(self, how: ET, inner: Fit, model: LanguageModel, probe: Batch) -> None:
        self._how, self._inner, self._model, self._probe = how, inner, model, probe
        self._order = treatable(model.network)
        self._turn, self._round, self._kept, self._sound = 0, 0, 0, math.nan

    def __call__(self, theta: Theta, batch: Batches) -> Vector:
        """θ minus where the round ends; theta is where it was."""
        if math.isnan(self._sound):
            self._sound = theta.value(nll, self._probe)
        layer = self._order[self._turn % len(self._order)]
        trace = {"block": float(layer), "round": float(self._round), "kept": 0.0}
        edits, clean, attacked = self._attacks(theta, layer, batch)
        trace |= {"interventions": float(len(edits)), "gain": clean - attacked}
        with theta.excursion():
            kept = False
            if edits:
                trace |= self._undo(theta, layer, edits, [prompts(rows) for rows in batch["harmful"].parts(BATCHES)])
                left = clean - self._under(theta, layer, edits, batch["heldout"].as_role("after"))
                trace["taken back"] = 1.0 - left / (clean - attacked)
                trace["performance"] = math.exp(self._sound - theta.value(nll, self._probe.as_role("probe-after")))
                safety, performance = self._how.keep
                kept = trace["taken back"] >= safety and trace["performance"] >= performance
            end = [p.detach().clone() for p in theta.parameters] if kept else theta.parameters
        self._kept += kept
        self._next(immune=not edits)
        theta.trace.update(trace | {"kept": float(kept)})
        with torch.no_grad():
            return Vector(list(torch._foreach_sub(theta.parameters, end)))

    def _next(self, *, immune: bool) -> None:
        self._round += 1
        if immune or self._round == self._how.rounds:
            self._turn, self._round = self._turn + 1, 0

    def _attacks(self, theta: Theta, layer: int, batch: Batches) -> tuple[list[Replace], float, float]:
        """Interventions that succeed, and the NLL of held-out answers without them and under them (the mean)."""
        judge, parts = batch["heldout"], batch["harmful"].parts(BATCHES)
        clean, general = theta.value(nll, judge), theta.value(nll, batch["general"])
        found: dict[Replace, float] = {}
        for k in range(self._how.attacks):
            rows = [parts[(k * EACH + i) % BATCHES] for i in range(EACH)]
            edit = trained(self._model, Site(layer, "input"), rows, self._how.rank, self._attacker())
            reached = self._under(theta, layer, [edit], judge)
            sense = general - self._under(theta, layer, [edit], batch["general"])
            if clean - reached > self._how.success and sense >= math.log(COHERENT):
                found[edit] = reached
        return list(found), clean, sum(found.values()) / len(found) if found else clean

    def _attacker(self) -> Fit:
        how, inner = self._how, self._inner
        return Fit(
            steps=how.attack_steps, lr=how.attack_lr, seed=_seed(), micro_batch=inner.micro_batch,
            autocast=inner.autocast,
        )  # fmt: skip

    def _undo(self, theta: Theta, layer: int, edits: Sequence[Replace], rows: Sequence[Batch]) -> dict[str, float]:
        """Train Δ and add it to the weights of the block."""
        how, network = self._how, theta.network
        block = Block(network, layer)
        for part in rows:
            block.keep(theta, part)
        low = None if adapted(network) else LowRank(network, layer, how.rank, quirks=how.quirks)
        loss = block.neutral(edits, how.reg) if low is None else block.neutral(edits, how.reg, low.patches)
        before = sum(theta.value(loss, part) for part in rows) / len(rows)
        settings = replace(self._inner, steps=how.steps, seed=_seed())
        descend(network, loss, rows, settings, coordinates(network, layer) if low is None else low.factors)
        if low is not None:
            low.merge()
        merged = block.neutral(edits, how.reg)
        after = sum(theta.value(merged, part) for part in rows) / len(rows)
        del theta.trace["neutral/harmful"]
        return {"neutral/before": before, "neutral/after": after}

    def _under(self, theta: Theta, layer: int, edits: Sequence[Replace], batch: Batch) -> float:
        """The NLL of the rows under each intervention, on average."""
        losses = [edited(nll, {Site(layer, "input"): edit}, "prompt") for edit in edits]
        return sum(theta.value(loss, batch) for loss in losses) / len(losses)

    def tell(self) -> None:
        """Log how far the treatment came."""
        _LOG.info("E.T.: %d of %d blocks treated, %d changes kept", self._turn, len(self._order), self._kept)
        if self._turn < len(self._order):
            _LOG.warning(
                "E.T. reached %d of %d blocks: the others are as they were. Give more steps; %d are enough",
                self._turn, len(self._order), len(self._order) * self._how.rounds,
            )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Whose turn it is, the round, what was kept, and the loss that performance is compared with."""
        return {"turn": self._turn, "round": self._round, "kept": self._kept, "sound": self._sound}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._turn, self._round, self._kept = int(state["turn"]), int(state["round"]), int(state["kept"])
        self._sound = float(state["sound"])


def _seed() -> int:
    return int(torch.randint(2**31, ()))
