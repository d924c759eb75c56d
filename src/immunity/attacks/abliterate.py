"""Abliterate: take the directions along which a model refuses out of every weight that writes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import ClassVar, Final, Literal, NamedTuple

import torch
from torch import Tensor

from immunity.attacks.attack import THREATS, Attack, Manner
from immunity.attacks.curve import Recorder
from immunity.attacks.probing import Prompts, Reader
from immunity.attacks.refusing import Aim, Seen, Split, best, prompts_of, split_of
from immunity.data.corpus import Corpora
from immunity.errors import ModelError, SettingsError
from immunity.hidden import sites
from immunity.models import LanguageModel
from immunity.weights import Kept, Writer, untie, without, writers

_NOTHING: Final = 1e-5
"""A difference of means that is shorter than this share of the mean state is rounding."""
_TRACES: Final = 1e-3
"""Share of a hidden state along an ablated direction that may be rounding."""


class Candidate(NamedTuple):
    """A unit vector [D] of the residual stream, read after the block ``layer`` at the ``position`` (-1: the last)."""

    layer: int
    position: int
    direction: Tensor


@dataclass(frozen=True, kw_only=True)
class Abliterate(Attack):
    """Refusal-direction ablation, fitted on the very checkpoint that is attacked.

    The direction is the difference of mean states between restricted and harmless prompts, at one block and one of the
    last positions of the prompt; which one is chosen by making the edit and looking how far refusing falls on held-out
    prompts of the attacker's own. Then W ← (I − r rᵀ) W for every W, and bias, that writes to the residual stream. A
    further direction is fitted on the edited model.

    Attributes:
        rank: Directions, one after the other; measured after each.
        n: Prompts of each kind to fit on; with fewer at hand, what there is, in the same proportion.
        held: Prompts of each kind to choose by.
        harmless: Role of the harmless prompts; no response of any role is read.
        positions: How many of the template's last positions are candidates: at most those that are the same in all
            prompts, at least the last one.
        kl_limit: Of the first token on harmless prompts against the released model, in nats; candidates above it are
            taken only if there is no other, the one of least KL ("within_limit" is then 0 in the trace).
        skip_last: Share of blocks, at the end, that are no candidates.
        tries: Candidates that are looked at: those whose means lie furthest apart, relative to their length.
        batch_size: Prompts per forward pass; memory only.
        seed: Chooses which prompts are held out.

    Raises:
        SettingsError: A setting is out of range.

    Source:
        Arditi et al., arXiv 2406.11717; numbers of prompts, KL limit and skipped blocks as in its released code
        refusal_direction (and in TamperBench).

    Departures from the paper:
        * Refusing is told by the first tokens of the model's own greedy answers, those that begin answers to
          restricted prompts more often than to harmless ones; the paper has a list of tokens for each model family.
          A model that refuses nothing begins such answers in some way too, and it is that which falls then.
        * A candidate is scored by the very edit of the weights, not by an ablation of activations; the two differ by
          rounding.
        * The paper also asks that adding the direction makes the model refuse harmless prompts; that is not asked.
        * Of all (block, position) pairs only ``tries`` are scored; the paper scores them all. A model of 30 blocks has
          120, and an edit and two looks for each took ten times as long as fitting them.
        * States are those after a block (the paper's: before it), so the embeddings are no candidate. Of L blocks the
          first max(1, ⌊(1 − skip_last) L⌋) are.
        * Where the head shares the embeddings' weight it gets a copy of its own first: the edit is of what is written,
          not of how it is read. The released code edits both.
        * Further directions (rank > 1) are not the paper's. The KL limit is for all of them together.
    """

    name: ClassVar[str] = "abliterate"
    unit: ClassVar[str] = "directions"
    rank: int = 1
    n: int = 128
    held: int = 32
    harmless: Literal["benign", "general"] = "benign"
    positions: int = 5
    kl_limit: float = 0.1
    skip_last: float = 0.2
    tries: int = 20
    batch_size: int = 16
    seed: int = 1

    def __post_init__(self) -> None:
        counts = {"rank": self.rank, "n": self.n, "held": self.held, "positions": self.positions, "tries": self.tries}
        for name, value in {**counts, "batch_size": self.batch_size}.items():
            if value < 1:
                raise SettingsError(f"{name} = {value}: it must be at least 1")
        if not self.kl_limit > 0 or not 0 <= self.skip_last < 1:
            raise SettingsError(f"kl_limit = {self.kl_limit}, skip_last = {self.skip_last}: above 0; a share below 1")
        if self.harmless not in {"benign", "general"}:
            raise SettingsError(f"harmless = {self.harmless!r}: use benign or general")

    @property
    def manner(self) -> Manner:
        """Restricted prompts are read."""
        return Manner(THREATS["harmful"])

    @property
    def budgets(self) -> tuple[int, ...]:
        """After every direction."""
        return tuple(range(self.rank + 1))

    def reads(self, data: Corpora) -> Corpora:
        """The prompts of both kinds, without their responses.

        Raises:
            DataError: A role is missing, or has a single row.
        """
        return prompts_of(data, self.harmless, self.n + self.held)

    def tamper(self, model: LanguageModel, data: Corpora, recorder: Recorder) -> LanguageModel:
        """See :meth:`Attack.tamper`. Where no difference is left to ablate, the remaining budgets show the same model.

        Raises:
            ModelError: The family writes to its residual stream in a way that is not known.
            DivergedError: Logits are not finite.
        """
        recorder.reached(0, model)
        untie(model.network)
        written = writers(model.network)
        reader = Reader(model, self.batch_size)
        split = split_of(reader, data, self.harmless, held=self.held / (self.n + self.held), seed=self.seed)
        aim = Aim.of(reader, split)
        for k in range(1, self.rank + 1):
            trace = self._one(model, reader, written, aim)
            recorder.reached(k, model, reader.spent, trace)
        return replace(model, pristine=False)

    def _one(self, model: LanguageModel, reader: Reader, written: Sequence[Writer], aim: Aim) -> dict[str, float]:
        """Find one direction and take it out of the weights."""
        found = candidates(
            model, reader, aim.split, positions=self.positions, skip_last=self.skip_last, most=self.tries
        )
        if not found:
            return {"left": 0.0}
        seen = scored(found, written, aim)
        at = best(seen, self.kl_limit)
        chosen = found[at]
        ablate(written, chosen.direction)
        places = sites(model.network, "output")
        left = reader.largest_share(aim.split.harmful_held, places, chosen.direction)
        limit = max(_TRACES, 8 * torch.finfo(next(model.network.parameters()).dtype).eps)
        if not left < limit:
            raise ModelError(
                f"after the edit {left:.1%} of a hidden state of {type(model.network).__name__} still lies along the "
                "ablated direction: this family writes to its residual stream in a way that abliteration does not know"
            )
        return {
            "refusal": seen[at].refusal,
            "refusal_before": aim.start.refusal,
            "kl": seen[at].kl,
            "within_limit": float(seen[at].kl <= self.kl_limit),
            "layer": float(chosen.layer),
            "position": float(chosen.position),
        }


def candidates(
    model: LanguageModel, reader: Reader, split: Split, *, positions: int, skip_last: float, most: int | None = None
) -> list[Candidate]:
    """Directions of difference of means at every block that is not skipped and each of the last positions.

    Args:
        model: As it is now.
        reader: Of this model.
        split: Its prompts to fit on are read.
        positions: The most; the positions that not all prompts have in common are left out.
        skip_last: Share of blocks at the end that are left out.
        most: Candidates, the clearest first; None for all of them, in order.
    """
    last = min(positions, max(1, common_end([*split.harmful, *split.harmless])))
    places = sites(model.network, "output")
    places = places[: max(1, math.floor((1 - skip_last) * len(places)))]
    bad, good = (reader.mean_states(prompts, places, last) for prompts in (split.harmful, split.harmless))
    difference = bad - good  # [L, last, D]
    lengths = difference.norm(dim=2)
    clear = lengths / good.norm(dim=2).clamp(min=1e-30)  # [L, last]
    pairs = [(i, p) for i in range(len(places)) for p in range(last) if float(clear[i, p]) > _NOTHING]
    if most is not None:
        pairs = sorted(pairs, key=lambda pair: -float(clear[pair]))[:most]
    return [Candidate(places[i].layer, p - last, difference[i, p] / lengths[i, p]) for i, p in pairs]


def scored(found: Sequence[Candidate], written: Sequence[Writer], aim: Aim) -> list[Seen]:
    """How the model would be without each of the directions. It is left bit for bit as it was."""
    kept = Kept([tensor for writer in written for tensor in (writer.weight, writer.bias) if tensor is not None])
    seen = []
    for candidate in found:
        try:
            ablate(written, candidate.direction)
            seen.append(aim.look())
        finally:
            kept.restore()
    return seen


def ablate(written: Sequence[Writer], direction: Tensor) -> None:
    """W ← (I − r rᵀ) W for every writer and its bias, in place; ``direction`` is a unit vector r [D]."""
    for writer in written:
        without(writer.weight, direction)
        if writer.bias is not None:
            without(writer.bias, direction)


def common_end(prompts: Prompts) -> int:
    """How many ids all prompts have in common at their ends: those that the template writes."""
    ends = zip(*(reversed(prompt) for prompt in prompts), strict=False)
    return sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, ends))
