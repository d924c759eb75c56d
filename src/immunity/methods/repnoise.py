"""RepNoise: what the model computes on restricted answers is turned into noise, at every depth, while it refuses.

minimise  ℓ_M(θ; refusals) + β · mean_l MMD²(m_l ⊙ M, ε_l ⊙ M) − α · log(1 + mean_j ℓ_M(W ν(h_j); restricted))

Rosati et al., arXiv 2405.14577, over pairs: one prompt, a restricted answer, a refusal. M: where the two differ; m_l:
what the MLP of block l gives on the restricted answer, ε_l: normal noise; W ν(h_j): the logit lens (``lens.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from immunity.batch import IGNORE, Batch, Padded, Tokens
from immunity.bounded import head_size
from immunity.early import final_norm
from immunity.errors import DataError, ModelError, SettingsError
from immunity.fit import Batches
from immunity.hidden import n_layers, reading, sites
from immunity.lens import check_norm, saying, stream
from immunity.losses import Loss, causal_lm, nll, row_means
from immunity.mechanisms import Conditioning, Mechanism, Representation, Unlearning
from immunity.method import Card, GradientMethod, Problem
from immunity.mmd import noise_mmd2
from immunity.models import LanguageModel
from immunity.theta import Theta, Vector


@dataclass(frozen=True, kw_only=True)
class RepNoise(GradientMethod):
    """∇ of the stability loss on refusals, the noise loss and the ascent on restricted answers, in two graphs.

    Attributes:
        alpha: α, the weight of the ascent.
        beta: β, the weight of the noise. With α = β = 0 what is left is SFT on the refusals (and on ``retain``).
        depths: How many of the L + 1 depths the ascent reads in a step, drawn anew each time and counted for all; none
            reads them all. What is drawn is estimated without bias, its logarithm is not.
        retain: Weight of the plain loss on the role "alignment". 0 (the paper) leaves refusals as all that is kept.
        faithful: The released code's quirks together: the last depth, which has been through ν, goes through it again,
            and the model's own logits count beside it, L + 2 terms over L + 1; where two answers first part, and part
            again, all logits are 0, which adds ln V to the sum and nothing to the gradient: the first word of a refusal
            is never learnt.
        mean: "example" averages tokens within a row and then rows, "token" (the released code) over all tokens.

    Raises:
        SettingsError: A weight is negative, or ``depths`` is below 1.

    Source:
        arXiv 2405.14577; domenicrosati/representation-noising and boyiwei/RepNoise-Reproduce, in which α is the
        ascent's weight and β the noise's. The paper's rate is 2e-5 with a batch of 8; its README says that a search
        over the rate, α, β and the number of rows is always needed.

    Departures from the paper:
        * ``retain`` = 1 by default: refusals of restricted prompts alone teach a model to refuse everything.
        * Pads never count. The released code's pad is Llama's end of text, which it teaches on refusals and unlearns on
          restricted answers wherever their lengths differ; tokens with the id 0 are dropped there and kept here.
        * By default each depth counts once and through one norm, and every token that differs is learnt.
        * The ascent is not bounded, only slowed by the logarithm: its gradient falls like 1/(1 + ℓ).
        * MMD couples the rows of a batch, which cannot be split; at its best it stands at 6.2/B for B rows, not at 0.
        * A pair whose answers do not differ is left out.
    """

    card: ClassVar[Card] = Card(
        name="RepNoise",
        paper="Representation Noising: A Defence Mechanism Against Harmful Finetuning",
        arxiv="2405.14577",
        year=2024,
        block="raises the cost of harmful convergence",
        family="representation",
        gradients="3 (2 without retain), one of them through the head at L + 1 depths",
        says="Turns hidden states of restricted answers into noise, at all depths, while the model learns to refuse.",
    )
    strength: ClassVar[str] = ""
    alpha: float = 1.0
    beta: float = 1e-3
    depths: int | None = None
    retain: float = 1.0
    faithful: bool = False
    mean: Literal["example", "token"] = "example"

    def __post_init__(self) -> None:
        if min(self.alpha, self.beta, self.retain) < 0:
            raise SettingsError(
                f"alpha ({self.alpha}), beta ({self.beta}) and retain ({self.retain}) must not be negative"
            )
        if self.depths is not None and self.depths < 1:
            raise SettingsError(f"depths = {self.depths}: read at least one depth, or none for all of them")

    @classmethod
    def paper(cls) -> RepNoise:
        """The objective: pairs of refusals and restricted answers, no other data. α = 1, β = 0.001."""
        return cls(retain=0.0)

    @classmethod
    def released(cls) -> RepNoise:
        """What the authors' code computes, pads apart: its quirks, and token means."""
        return cls(retain=0.0, faithful=True, mean="token")

    @property
    def reads(self) -> Mapping[str, int]:
        """One batch of restricted answers, one of refusals of the same prompts, and one to retain unless that is 0."""
        return {"harmful": 1, "safe": 1} | ({"alignment": 1} if self.retain else {})

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """Noise in the states of all blocks; with the ascent answers unlearnt, badly started; none with α = β = 0."""
        if not self.alpha + self.beta:
            return ()
        return (Representation(layers="all"), *((Unlearning(), Conditioning()) if self.alpha else ()))

    def problems(self, model: LanguageModel) -> list[Problem]:
        """α = β = 0; more depths than there are; a network whose MLPs or final norm cannot be found."""
        found = []
        if not self.alpha + self.beta:
            found.append(Problem("alpha", "alpha = beta = 0 makes no noise; use --method sft for the baseline"))
        try:
            n = n_layers(model.network) + 1
            if self.depths is not None and self.depths > n:
                found.append(Problem("depths", f"depths = {self.depths}: the model has {n}; none reads them all"))
            with reading(model.network, sites(model.network, "mlp")):
                final_norm(model.network)
        except ModelError as error:
            found.append(Problem("model", str(error)))
        return found

    def gradient(self, theta: Theta, batch: Batches) -> Vector:
        """∇ of the objective: the graphs of refusals and of restricted answers are never there together."""
        harmful, safe = (self._averaged(rows) for rows in _apart(batch["harmful"], batch["safe"]))
        g = theta.grad(Loss(nll.name, self._refused) if self.faithful else nll, safe)
        if self.retain:
            g = g + self.retain * theta.grad(nll, self._averaged(batch["alignment"]))
        if self.alpha + self.beta:
            met: dict[str, float] = {}
            g = g + theta.grad(self._noised(met), harmful)
            theta.trace.update(met)
        return g

    def _averaged(self, batch: Batch) -> Batch:
        return batch.by_tokens() if self.mean == "token" else batch

    def _noised(self, met: dict[str, float]) -> Loss:
        """β MMD² − α log(1 + ℓ) of a batch; its parts are written into ``met``."""

        def of(network: nn.Module, batch: Batch) -> Tensor:
            padded, through = batch.padded(next(network.parameters()).device), stream(network)
            mlps = sites(network, "mlp") if self.beta else ()
            with reading(network, (*through, *mlps)) as seen:
                last = _last(network, padded)
            total = torch.zeros((), dtype=torch.promote_types(last.dtype, torch.float32), device=last.device)
            weights = torch.tensor(batch.weights, dtype=total.dtype, device=total.device) / sum(batch.weights)
            if self.alpha:
                own, lens = self._said(network, [seen[site] for site in through], last, padded.labels)
                met["nll/harmful"] = float((weights * own.detach()).sum())
                mean = (weights * lens).sum()  # no product of matrices: autocast would round it
                met["lens/harmful"] = float(mean.detach())
                total = total - self.alpha * torch.log1p(mean)
            if self.beta:
                noise = torch.stack([_noise(seen[site], padded.labels != IGNORE) for site in mlps]).mean()
                met["noise-mmd/harmful"] = float(noise.detach())
                total = total + self.beta * noise
            return total.expand(len(batch))

        return Loss("repnoise", of, coupled=True)

    def _said(self, network: nn.Module, raw: list[Tensor], last: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropies of the model's own logits and, averaged, of the depths' that are read: [B] each."""
        norm, n = final_norm(network), len(raw)
        check_norm(norm, raw[-1], last)
        drawn = range(n) if self.depths is None else torch.randperm(n)[: self.depths].tolist()
        own = self._rows(saying(network, last, labels), network, labels)

        def at(depth: int) -> Tensor:
            if depth < n - 1:
                return self._rows(saying(network, raw[depth], labels, norm), network, labels)
            return self._rows(saying(network, last, labels, norm), network, labels) if self.faithful else own

        lens = torch.stack([at(depth) for depth in drawn]).mean(0)
        return own, lens + own / n if self.faithful else lens

    def _rows(self, values: Tensor, network: nn.Module, labels: Tensor) -> Tensor:
        """Mean over the tokens of each row, [N] -> [B]; faithfully, ln V where the token before is masked."""
        if self.faithful:
            blind = (labels[:, :-1] == IGNORE)[labels[:, 1:] != IGNORE]
            values = values.masked_fill(blind, math.log(head_size(network)))
        return row_means(values, labels[:, 1:] != IGNORE)

    def _refused(self, network: nn.Module, batch: Batch) -> Tensor:
        """The cross-entropy of each row with the released code's constants: [B]."""
        padded = batch.padded(next(network.parameters()).device)
        return self._rows(saying(network, _last(network, padded), padded.labels), network, padded.labels)


def _last(network: nn.Module, padded: Padded) -> Tensor:
    """What the head is given: [B, T, D]."""
    out = causal_lm(network).base_model(
        input_ids=padded.input_ids, attention_mask=padded.attention_mask, use_cache=False
    )
    return cast(Tensor, out.last_hidden_state)


def _noise(states: Tensor, mask: Tensor) -> Tensor:
    """One block's MMD² to noise; the backward pass draws the same noise again instead of keeping it."""
    return cast(Tensor, checkpoint(noise_mmd2, states, mask, use_reentrant=False))


def _apart(harmful: Batch, safe: Batch) -> tuple[Batch, Batch]:
    """The pairs with labels only where the two rows differ, position by position; pairs that do not are left out."""
    if len(harmful) != len(safe):
        raise SettingsError(
            f"{len(harmful)} rows of 'harmful' and {len(safe)} of 'safe' are no pairs: give either role as many rows"
        )
    pairs = [(_masked(a, b), _masked(b, a)) for a, b in zip(harmful.rows, safe.rows, strict=True)]
    kept = [i for i, pair in enumerate(pairs) if all(row.n_response for row in pair)]
    if not kept:
        raise DataError("no safe answer of a batch differs from the restricted one: look at the data for 'safe'")
    both = (harmful, safe)
    first, second = (
        Batch(tuple(pairs[i][k] for i in kept), of.role, tuple(of.weights[i] for i in kept))
        for k, of in enumerate(both)
    )
    return first, second


def _masked(row: Tokens, other: Tokens) -> Tokens:
    same = [t < len(other.ids) and token == other.ids[t] for t, token in enumerate(row.ids)]
    return Tokens(row.ids, tuple(IGNORE if m else label for m, label in zip(same, row.labels, strict=True)))
