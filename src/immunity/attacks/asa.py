"""ASA: a fixed vector is added to one block's output; the best of a few trials, without any training."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from itertools import product
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from immunity.attacks.curve import Recorder, Spent, budgets
from immunity.attacks.restricted import FITTED, FORWARD, Restricted, at_least_1, tokens, weights
from immunity.batch import Batch
from immunity.data.corpus import Corpora
from immunity.errors import DivergedError, SettingsError
from immunity.hidden import Replace, Site, reading, replacing, sites, width
from immunity.interventions import added, parameter
from immunity.losses import nll, response_states
from immunity.models import LanguageModel
from immunity.theta import Theta


@final
@dataclass(frozen=True, kw_only=True)
class ASA(Restricted):
    """Activation steering without training: several blocks, lengths and vectors are tried, the best is kept.

    A trial is a block, a length and a unit vector u: h ← h + strength · m · u at every position, m being the median
    length of that block's hidden states on the attacker's examples. The model is measured with the best of the trials
    so far: that of least NLL of the attacker's own compliant answers. Measured prompts choose nothing.

    Attributes:
        n: Restricted examples to choose by; with fewer at hand, what there is.
        gradient: u is −sign of the gradient of that NLL with respect to an added vector, of length 1; not random.
        depths: Blocks that are tried, from 0 (first) to 1 (last).
        strengths: Lengths that are tried, in shares of m.
        draws: Random vectors for each block and length; 1 with ``gradient``.
        batch_size: Rows per forward pass; memory only.
        seed: Of the vectors, and of the order of trials.

    Raises:
        SettingsError: A setting is out of range.

    Source:
        The activation steering attacks of LAPT (arXiv 2506.16078), read in Carol-gutianle/LatentSafety
        (``exp/asa.py``, ``sv/intervent.py``): a random vector, or the sign of a gradient, given the mean and the
        deviation of the hidden state that it is added to.

    Departures from the paper:
        * One vector for all prompts, at every position; theirs is scaled to each prompt's last state and added to the
          last position only. Strength 1 is about theirs; their own scale cancels when they normalise.
        * The gradient is descended on compliant answers; their code adds its sign, which raises the loss it is of.
        * They count a prompt as broken by any block; here one block has to serve all prompts.
    """

    name: ClassVar[str] = "asa"
    unit: ClassVar[str] = "trials"
    stays: ClassVar[bool] = False
    n: int = 16
    gradient: bool = False
    depths: tuple[float, ...] = (0.2, 0.4, 0.5, 0.6, 0.8)
    strengths: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0)
    draws: int = 1
    batch_size: int = 8
    seed: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "depths", tuple(float(depth) for depth in self.depths))
        object.__setattr__(self, "strengths", tuple(float(strength) for strength in self.strengths))
        at_least_1(n=self.n, draws=self.draws, batch_size=self.batch_size)
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise SettingsError(f"depths = {self.depths}: give some, from 0, the first block, to 1, the last")
        if not self.strengths or not all(0 < strength < math.inf for strength in self.strengths):
            raise SettingsError(f"strengths = {self.strengths}: give some, each above 0")
        if self.gradient and self.draws > 1:
            raise SettingsError(f"draws = {self.draws}: a block has one gradient; say draws=1, or gradient=False")
        if self.seed < 0:
            raise SettingsError(f"seed = {self.seed}: a seed cannot be negative")

    @property
    def budgets(self) -> tuple[int, ...]:
        """Log-spaced trials."""
        return budgets(len(self.depths) * len(self.strengths) * self.draws)

    def tamper(self, model: LanguageModel, data: Corpora, recorder: Recorder) -> LanguageModel:
        """See :meth:`Attack.tamper`; the model comes back as it was, without the vector."""
        recorder.reached(0, model)
        batch = Batch(tokens(model, data).rows, "harmful")
        theta, vectors = self._added(model)
        lengths = self._lengths(model, tuple(vectors), batch)
        units = self._downhill(theta, vectors, batch) if self.gradient else {}
        draw = torch.Generator().manual_seed(self.seed)
        best: dict[Site, Replace] = {}
        least = math.inf
        for done, (site, strength) in enumerate(self._trials(model), 1):
            unit = units[site] if self.gradient else _drawn(vectors[site], draw)
            by = {site: added(strength * lengths[site] * unit)}
            with replacing(model.network, by):
                value = _value(theta, batch)
            if not best or value < least:
                best, least = by, value
            with replacing(model.network, best):
                recorder.reached(done, model, self._spent(model, batch, done), {"nll/harmful": value, "best": least})
        return model

    def _trials(self, model: LanguageModel) -> list[tuple[Site, float]]:
        """In an order of its own, so that the first trials are no worse spread than all of them."""
        places = [sites(model.network, "output", [depth])[0] for depth in self.depths]
        trials = [(site, strength) for site, strength, _ in product(places, self.strengths, range(self.draws))]
        random.Random(self.seed).shuffle(trials)
        return trials

    def _added(self, model: LanguageModel) -> tuple[Theta, dict[Site, nn.Parameter]]:
        """A zero vector [D] for each block that is tried, and the point that they are."""
        places = sites(model.network, "output", self.depths)
        zeros = {at: parameter(model, torch.zeros(width(model.network, at))) for at in places}
        named = {str(at.layer): vector for at, vector in zeros.items()}
        return Theta(model.network, trainable=named, micro_batch=self.batch_size), zeros

    def _lengths(self, model: LanguageModel, places: tuple[Site, ...], batch: Batch) -> dict[Site, float]:
        """Median length of the hidden states at each site, over all positions but pads."""
        found: dict[Site, list[Tensor]] = {at: [] for at in places}
        for part in batch.split(self.batch_size):
            mask = part.padded(model.device).attention_mask.bool()  # [B, T]
            with torch.no_grad(), reading(model.network, places) as seen:
                response_states(model.network, part)
            for at, h in seen.items():
                found[at].append(h[mask].float().norm(dim=-1))
        return {at: float(torch.cat(norms).median()) for at, norms in found.items()}

    def _downhill(self, theta: Theta, vectors: dict[Site, nn.Parameter], batch: Batch) -> dict[Site, Tensor]:
        """−sign of the gradient with respect to a vector that is added at each site, of length 1: site -> [D]."""
        with replacing(theta.network, {at: added(vector) for at, vector in vectors.items()}):
            gradient = theta.grad(nll, batch)
        signs = [-part.sign() for part in gradient.tensors()]
        return {at: sign / sign.norm().clamp(min=1.0) for at, sign in zip(vectors, signs, strict=True)}

    def _spent(self, model: LanguageModel, batch: Batch, done: int) -> Spent:
        """One pass for the lengths, one for the gradient, one for each trial."""
        passes, seen = 1 + self.gradient + done, sum(len(row.ids) for row in batch.rows)
        each = FORWARD * (1 + done) + FITTED * self.gradient
        return Spent(passes * len(batch), passes * seen, each * weights(model) * seen)


def _drawn(like: Tensor, draw: torch.Generator) -> Tensor:
    """A random unit vector [D]."""
    vector = torch.randn(like.shape, generator=draw, dtype=torch.float32)
    unit: Tensor = vector / vector.norm()
    return unit.to(like)


def _value(theta: Theta, batch: Batch) -> float:
    """The NLL; a vector under which it is not finite is worse than any other."""
    try:
        return theta.value(nll, batch)
    except DivergedError:
        return math.inf
