"""LAPT: noise in the hidden states of a fragile block, drawn anew in every step, while safe answers are trained.

minimise  E_l ℓ(y_safe | x; h_l ← h_l + δ′),  δ′ = μ(h_l) + σ(h_l) (δ − μ(δ)) / σ(δ),  δ ~ N(0, I),  l ~ its fragility
then      θ ← θ_0 + λ (θ − θ_0),  λ the largest with which the model stays good

Layer-wise Adversarial Patch Training (LAPT), arXiv 2506.16078: h_l is the output of block l, at the answer's positions.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Any, ClassVar, Final, Literal

import torch
from torch import Tensor

from immunity.adapters import blocks
from immunity.batch import Batch
from immunity.data.corpus import Corpora
from immunity.data.dealt import dealt
from immunity.errors import ModelError, SettingsError
from immunity.fit import Batches, compute, fit, undisturbed
from immunity.hidden import Site, n_layers, sites
from immunity.losses import Loss, nll
from immunity.mechanisms import Drift, Layers, Mechanism, Representation
from immunity.method import Card, Method, Problem, Run, identity, problems, refuse, streams
from immunity.models import LanguageModel
from immunity.noise import noised
from immunity.preference import log_prob_per_token, margins
from immunity.theta import Theta, Vector
from immunity.transforms import check_places

_LOG = logging.getLogger(__name__)

FRAGILE: Final = "fragile"
CASES: Final = 4
"""Batches of pairs, and of ordinary rows, that blocks and λ are chosen by."""
SHARES: Final = (1.0, 0.8, 0.6, 0.4, 0.2)
"""Of ``lam``: what is tried for λ."""
_FIXED: Final = 42
"""The seed of the released code's noise."""


@dataclass(frozen=True, kw_only=True)
class LAPT(Method):
    """∇ℓ of safe answers to restricted prompts, under noise in one block; then part of the way back.

    Attributes:
        lam: λ, the largest: how much of the change is kept. 0 keeps nothing, bit for bit.
        tolerance: Nats a token that the NLL of ordinary text may rise by; λ is the largest of ``lam`` times 1, 0.8, …,
            0.2 with which it rises by no more, the smallest if there is none. none: λ is ``lam``.
        layers: "fragile": blocks are drawn, one for each step, by how much more often noise in them makes a compliant
            answer likelier than the safe one, than no noise does. Else which blocks, with equal odds: "all",
            "first-half", "last-half", "middle", "even", "odd", or "0,3,5".
        alpha: Length of the noise, in multiples of the hidden state's. 0 is SFT on safe answers.
        positions: Where noise is added: "predicting", from the last position of the prompt, which says the first token
            of the answer (where the paper's attack adds it), or "response", at the answer's own tokens (the paper).
        like: Whose mean and deviation the noise has: those of the block's "output", which it is added to, or of its
            "input" (the released code).
        noise: "fresh" in every step and for each example, or "fixed": one table of noise for all answers of one length,
            the same in every step (the released code, which seeds it anew with each call).

    Raises:
        SettingsError: A setting is out of range.

    Source:
        arXiv 2506.16078 and its released code, Carol-gutianle/LatentSafety: AdamW at 1e-4, cosine, warm-up 0.1, weight
        decay 2e-6, 20 steps of 2 examples; λ is at most 0.5, the largest with which CommonsenseQA falls by 0.05.

    Departures from the paper:
        * How fragile a block is, is not judged by generated text but by pairs of answers: the mean over prompts of
          σ(ℓ(safe) − ℓ(compliant)), ℓ in nats a token, less what it is without noise. The paper's cases (prompt and
          block that its attack broke) make blocks as frequent as its rate of success; so do these odds.
        * λ is chosen by the NLL of ordinary text, not by CommonsenseQA.
        * Labels are the answer alone; in the released code they are the whole sequence.
        * Under a fresh LoRA adapter λ scales B, which is the interpolation of the weights; of an adapter that was
          trained before, both factors are interpolated, which is not quite.
        * No preset for the released code, which cannot have run: modules and files that it needs are missing. What is
          left of it are ``like`` and ``noise``. It does not interpolate.
    """

    card: ClassVar[Card] = Card(
        name="LAPT",
        paper="Probing the Robustness of Large Language Models Safety to Latent Perturbations",
        arxiv="2506.16078",
        year=2025,
        block="raises the cost of harmful convergence",
        family="perturbed hidden states",
        gradients="1, and a pass without gradients",
        says="Trains safe answers under noise in the hidden states of fragile blocks, and keeps part of the change.",
    )
    strength: ClassVar[str] = ""
    lam: float = 0.5
    tolerance: float | None = 0.05
    layers: str = FRAGILE
    alpha: float = 1.0
    positions: Literal["predicting", "response"] = "predicting"
    like: Literal["output", "input"] = "output"
    noise: Literal["fresh", "fixed"] = "fresh"

    def __post_init__(self) -> None:
        if not 0 <= self.lam <= 1:
            raise SettingsError(f"lam = {self.lam}: the share of the change that is kept lies between 0 and 1")
        if not 0 <= self.alpha < math.inf or (self.tolerance is not None and not 0 <= self.tolerance < math.inf):
            raise SettingsError(f"alpha ({self.alpha}) and tolerance ({self.tolerance}) must not be negative")

    @classmethod
    def paper(cls) -> LAPT:
        """Noise at the answer's own tokens."""
        return cls(positions="response")

    @property
    def reads(self) -> Mapping[str, int]:
        """Safe answers; their compliant ones if blocks are chosen by them; ordinary text if λ is."""
        pairs = {"harmful": 1} if self.layers == FRAGILE else {}
        return {"safe": 1, **pairs, **({} if self.tolerance is None else {"general": 1})}

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """Hidden states of some blocks may be disturbed; which, nobody knows beforehand unless they were named."""
        if not self.alpha or not self.lam:
            return ()
        named = "all" if self.layers == FRAGILE else self.layers
        found = (Representation(layers=named), Drift(radius=self.alpha, per="state", layers=named))
        return found if named == "all" else (*found, Layers(protected=named))

    def problems(self, model: LanguageModel) -> list[Problem]:
        """λ = 0, no noise, blocks that there are not."""
        found = [] if self.lam else [Problem("lam", "lam = 0 keeps nothing of what is trained")]
        if not self.alpha:
            found.append(Problem("alpha", "alpha = 0 disturbs nothing; use --method sft on the safe answers"))
        try:
            check_places(model.network, sites(model.network, "output"))
            _named(self.layers, n_layers(model.network))
        except ModelError as error:
            found.append(Problem("model", str(error)))
        except SettingsError as error:
            found.append(Problem("layers", f"{error}, or {FRAGILE}"))
        return found

    def immunise(self, model: LanguageModel, data: Corpora, run: Run) -> None:
        """Train under noise for ``run.fit.steps`` steps, then interpolate with the start.

        Raises:
            SettingsError: :func:`problems` found something.
        """
        refuse(problems(self, model, data))
        data = dealt(self.reads, data)
        found = streams(self, model, data, run)
        theta = Theta(model.network, micro_batch=run.fit.micro_batch, autocast=compute(run.fit), token=model.word_id)
        start = [p.detach().clone() for p in theta.parameters]
        good = None if self.tolerance is None else _some(found["general"])
        with undisturbed(theta):
            before = theta.value(nll, good) if good else 0.0
        pairs = (_some(found["safe"]), _some(found["harmful"])) if self.layers == FRAGILE else None
        fit(
            model.network,
            Patching(self, n_layers(model.network), pairs),
            found,
            run.fit,
            folder=run.folder,
            observe=run.observe,
            token=model.word_id,
            identity=identity(self, model, {role: data[role] for role in self.reads}, run),
        )
        with undisturbed(theta):
            self._back(theta, start, good, before)

    def _back(self, theta: Theta, start: Sequence[Tensor], good: Batch | None, before: float) -> None:
        end = [p.detach().clone() for p in theta.parameters]
        for lam in [share * self.lam for share in (SHARES if good else SHARES[:1])]:
            interpolate(theta, start, end, lam)
            rise = theta.value(nll, good) - before if good else 0.0
            good_enough = self.tolerance is None or rise <= self.tolerance
            say = _LOG.info if good_enough else _LOG.warning
            say("LAPT: with %.0f %% of the change the NLL of ordinary text rises by %.3f nats", 100 * lam, rise)
            if good_enough:
                return
        _LOG.warning(
            "LAPT: that is more than the tolerance of %s, and is kept all the same: train less", self.tolerance
        )


@dataclass
class Patching:
    """A step: draw a block and noise, train under it.

    Attributes:
        how: Settings.
        n: Blocks of the model.
        pairs: Safe and compliant answers to the same prompts, row for row; None where blocks are named.
        odds: Of each block, once they are known.
    """

    how: LAPT
    n: int
    pairs: tuple[Batch, Batch] | None
    odds: list[float] = field(default_factory=list)

    def __call__(self, theta: Theta, batch: Batches) -> Vector:
        """The gradient of safe answers' NLL under noise in one block."""
        if not self.odds:
            self.odds = self._fragility(theta, *self.pairs) if self.pairs else _named(self.how.layers, self.n)
        layer = int(torch.multinomial(torch.tensor(self.odds, dtype=torch.float64), 1))
        seed = int(torch.randint(2**31, ())) if self.how.noise == "fresh" else _FIXED
        theta.trace["block"] = float(layer)
        return theta.grad(self.under(nll, layer, seed), batch["safe"])

    def under(self, loss: Loss, layer: int, seed: int) -> Loss:
        """``loss`` under the method's noise in one block."""
        how, place = self.how, Site(layer, "output")
        like = {place: Site(layer, how.like)}
        return noised(
            loss, [place], seed=seed, scale=how.alpha, positions=how.positions, like=like, apart=how.noise == "fresh"
        )

    def _fragility(self, theta: Theta, safe: Batch, harmful: Batch) -> list[float]:
        """How much more often noise in a block makes the compliant answer the likelier one, block by block."""
        seed, before = int(torch.randint(2**31, ())), dict(theta.trace)
        broken = [
            _broken(margins(theta, safe, harmful, self.under(log_prob_per_token, i, seed))) for i in range(self.n)
        ]
        whole = _broken(margins(theta, safe, harmful, log_prob_per_token))
        rises = [max(0.0, share - whole) for share in broken]
        theta.trace = before | {f"fragility/{i}": rise for i, rise in enumerate(rises)}
        if not any(rises):
            _LOG.warning("LAPT: noise in no block makes compliant answers likelier: all blocks are drawn alike")
            return [1.0] * self.n
        return rises

    def state_dict(self) -> dict[str, Any]:
        """The odds."""
        return {"odds": self.odds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.odds = list(state["odds"])


def interpolate(theta: Theta, start: Sequence[Tensor], end: Sequence[Tensor], lam: float) -> None:
    """θ ← start + λ (end − start), in place; a LoRA factor A whose B was 0 at the start stays at its end."""
    was = dict(zip(theta.names, start, strict=True))
    with torch.no_grad():
        for name, p, a, b in zip(theta.names, theta.parameters, start, end, strict=True):
            partner = was.get(name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B"))
            fresh = "lora_" in name and partner is not None and partner is not was[name] and not partner.any()
            p.copy_(a if lam == 0 else b if fresh else torch.lerp(a, b, lam))


def _broken(found: Iterable[float]) -> float:
    """The mean over pairs of σ(−margin), 1 where the compliant answer is by far the likelier."""
    return float(torch.sigmoid(-torch.tensor(list(found), dtype=torch.float64)).mean())


def _named(layers: str, n: int) -> list[float]:
    """Equal odds for the blocks that are named, 0 for the others."""
    named = range(n) if layers == FRAGILE else blocks(layers, n)
    return [float(i in named) for i in range(n)]


def _some(stream: Callable[[int], Batch]) -> Batch:
    """The batches of the first steps as one."""
    return reduce(add, (stream(step) for step in range(CASES)))
