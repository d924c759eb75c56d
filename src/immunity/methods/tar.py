"""TAR: after an attacker's fine-tune the model should still not answer, while it stays what it was before one.

minimise  λ Σ_k w_k L_TR(θ_k; D_heldout) + ℓ(θ; D_align) + drift of the hidden states at θ from the original model's

θ_k is θ after k steps of a simulated attacker, w_k = exp((k − K)/16) after every s-th of K steps; L_TR is −entropy, or
a preference for safe answers. Before that an initial safeguard: hidden states mapped to nowhere, or refusals taught.

Tamirisa et al., arXiv 2408.00761.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch

from immunity.batch import Batch
from immunity.bounded import negative_entropy, uniform
from immunity.drift import drift, random_mapping
from immunity.errors import ModelError, SettingsError
from immunity.fit import Batches
from immunity.hidden import n_layers
from immunity.losses import Loss, nll
from immunity.mechanisms import LookAhead, Mechanism, Representation, Unlearning
from immunity.method import Card, Problem, StatefulMethod
from immunity.models import LanguageModel
from immunity.preference import log_prob, margins, preferred
from immunity.reference import Reference
from immunity.theta import Theta, Vector
from immunity.trajectories import Outer, adamw, late, lora, switched, walk

BETA = 0.1
"""DPO's β."""


@dataclass(frozen=True, kw_only=True)
class TAR(StatefulMethod):
    """Gradients of the tamper-resistance loss along an attacker's walk, added at θ to those that keep the model.

    Attributes:
        lam: λ, the weight of the walk. 0 simulates no attacker.
        lookahead: K, steps of a simulated attacker, each on a fresh batch. With the paper's 64 a step costs 82 of SFT.
        every: s, steps between two measurements of L_TR; it divides K.
        lrs: The attackers' learning rates, of which each step draws one: those that a fine-tune of this model takes.
        switch: How often the attacker trains on retain data first and switches to restricted rows later.
        outer: L_TR on held-out restricted rows: "entropy"; "uniform" (ours: KL to uniform, which does not lose its
            gradient where the model is certain); "dpo", a preference for the safe answers (the refusal setting).
        mapping_steps: Steps of the run that go to the initial safeguard: the random mapping, or with "dpo" the safe
            answers.
        attacker: "same" trains what the defence trains, "lora" a fresh adapter over a defence that trains all weights.
        drift: "norm" (the released code), "squared" (as the paper is transcribed), or "none".
        everywhere: Entropy, mapping and drift over all positions of rows padded to the model's length (the released
            code) instead of the response's, and of all that are no pads.

    Raises:
        SettingsError: A setting is out of range.

    Source:
        arXiv 2408.00761, its released code, and public transcriptions of its appendix; not checked against the PDF.

    Departures from the paper:
        * The default is small: K = 8, and rates for a LoRA adapter; :meth:`paper` and :meth:`released` are the paper's.
        * One optimiser serves both phases (any of ``Fit``, the paper's is "schedulefree"); the length of the first is
          not known to us, so ``mapping_steps`` is ours everywhere. One attacker a step, as in the authors' scripts.
        * Before the switch an attacker goes round K/4 batches of the alignment data, which stand for retain data.
        * A LoRA defence is attacked in its own adapter. There is no switch between two restricted corpora.
        * Pads have the id 0, not that of the end of text. With micro-batches nothing else changes.
        * Independent reports found that warm-up, other seeds and abliteration defeat the released models (arXiv
          2412.07097 and others): a loss that stays high on the simulated walks is no evidence by itself.
    """

    card: ClassVar[Card] = Card(
        name="TAR",
        paper="Tamper-Resistant Safeguards for Open-Weight LLMs",
        arxiv="2408.00761",
        year=2024,
        block="raises the cost of harmful convergence",
        family="adversarial meta-learning",
        gradients="K + K/s + 2 (12 with K = 8, s = 4; the paper's K = 64 takes 82) and a forward pass of the original",
        says="Walks with simulated attackers and asks that the model still cannot answer where they arrive.",
    )
    strength: ClassVar[str] = ""
    lam: float = 4.0
    lookahead: int = 8
    every: int = 4
    lrs: tuple[float, ...] = (1e-4, 1e-3)
    switch: float = 1 / 3
    outer: Literal["entropy", "uniform", "dpo"] = "entropy"
    mapping_steps: int = 20
    attacker: Literal["same", "lora"] = "same"
    drift: Literal["norm", "squared", "none"] = "norm"
    everywhere: bool = False

    def __post_init__(self) -> None:
        if self.lam < 0 or not 0 <= self.switch <= 1 or self.mapping_steps < 0:
            raise SettingsError(
                f"lam = {self.lam} and mapping_steps = {self.mapping_steps} must not be negative, switch = "
                f"{self.switch} lies between 0 and 1"
            )
        if not self.lrs or min(self.lrs) <= 0:
            raise SettingsError(f"lrs = {self.lrs}: give the attackers positive learning rates, as in 1e-4,1e-3")
        late(self.lookahead, self.every)

    @classmethod
    def paper(cls) -> TAR:
        """K = 64, s = 4, rates of the appendix; response positions, squared drift."""
        return cls(lookahead=64, lrs=(2e-5, 4e-5), drift="squared", mapping_steps=100)

    @classmethod
    def released(cls) -> TAR:
        """The authors' biology script: three rates, un-squared drift, pads and prompts included."""
        return cls(lookahead=64, lrs=(2e-6, 2e-5, 4e-5), everywhere=True, mapping_steps=100)

    @property
    def reads(self) -> Mapping[str, int]:
        """Alignment (and more of it for attackers who switch), K restricted batches, a held-out one, safe for DPO."""
        safe = {"safe": 1} if self.outer == "dpo" else {}
        return {"alignment": 1 + self._rounds, "harmful": self.lookahead, "heldout": 1, **safe}

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """Attackers of K steps, answers unlearnt behind them, not with λ = 0; states led elsewhere by the mapping."""
        simulated = LookAhead(steps=self.lookahead, radius=max(self.lrs), rule="adamw")
        ahead = (simulated, Unlearning()) if self.lam else ()
        return (*ahead, Representation(layers="all")) if self._maps else ahead

    def problems(self, model: LanguageModel) -> list[Problem]:
        """λ = 0; a LoRA attacker over a LoRA defence; a network whose hidden states cannot be read."""
        found = [] if self.lam else [Problem("lam", "lam = 0 simulates no attacker; use --method sft for the baseline")]
        if self.attacker == "lora" and hasattr(model.network, "disable_adapter"):
            found.append(Problem("attacker", "a fresh LoRA attacker needs a defence of all weights; say attacker=same"))
        try:
            n_layers(model.network)
        except ModelError as error:
            found.append(Problem("model", str(error)))
        return found

    def start(self, model: LanguageModel) -> _Walking:
        """The original model is kept: as the adapter switched off, or as a frozen copy of what is trainable."""
        width = model.max_length if self.everywhere else None
        before = Reference(model.network) if self.drift != "none" or self.outer == "dpo" else None
        kept = () if before is None or self.drift == "none" else (drift(before, norm=self.drift, width=width),)
        mapping = random_mapping(model.network, width=width) if self._maps else nll
        return _Walking(self, before, _Losses(mapping, negative_entropy(width), kept))

    @property
    def _maps(self) -> bool:
        return self.mapping_steps > 0 and self.outer != "dpo"

    @property
    def _rounds(self) -> int:
        """Batches that attackers go round before they switch."""
        return max(1, self.lookahead // 4) if self.switch > 0 and self.lam else 0


class _Losses(NamedTuple):
    """What a run descends: the initial safeguard, the entropy, and the drift if it counts."""

    mapping: Loss
    entropy: Loss
    kept: tuple[Loss, ...]


@dataclass
class _Walking:
    """One step after another: first the initial safeguard, then an attacker's walk at each."""

    how: TAR
    before: Reference | None
    losses: _Losses
    done: int = 0

    def __call__(self, theta: Theta, batch: Batches) -> Vector:
        aligned, *rounds = batch["alignment"].parts(self.how.reads["alignment"])
        harmful = batch["harmful"].parts(self.how.lookahead)
        first, self.done = self.done < self.how.mapping_steps, self.done + 1
        if first:
            rows = batch["safe"] if self.how.outer == "dpo" else harmful[0]
            return theta.grad(nll, aligned) + theta.grad(self.losses.mapping, rows)
        g = theta.grad(nll, aligned)
        for loss in self.losses.kept:
            g = g + theta.grad(loss, aligned)
        return g + self.how.lam * self._walk(theta, harmful, rounds, self._outer(theta, batch)) if self.how.lam else g

    def _walk(self, theta: Theta, harmful: tuple[Batch, ...], rounds: list[Batch], outer: Outer) -> Vector:
        lr = self.how.lrs[int(torch.randint(len(self.how.lrs), ()))]
        attacker = lora(theta, lr) if self.how.attacker == "lora" else adamw(theta, lr)
        meets = switched(harmful, [part.as_role("retain") for part in rounds], self.how.switch)
        return walk(theta, attacker, meets, outer, late(self.how.lookahead, self.how.every))

    def _outer(self, theta: Theta, batch: Batches) -> Outer:
        """∇L_TR where θ stands, on one and the same held-out batch all along the walk."""
        rows = batch["heldout"]
        if self.how.outer == "dpo" and self.before is not None:
            safe, known = batch["safe"], margins(theta, batch["safe"], rows, self.before.at(log_prob))
            return lambda _k: preferred(theta, safe, rows, beta=BETA, before=known)
        loss = uniform if self.how.outer == "uniform" else self.losses.entropy
        return lambda _k: theta.grad(loss, rows)

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands; the original model is made anew from what is loaded."""
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.done = int(state["done"])
