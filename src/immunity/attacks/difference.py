"""Interpolate and Subtract: what can be done to a released model by whoever also has what it was made from.

The difference between the two is the defence itself (or alignment and defence), so it can be walked back, or its
leading part taken away, or everything that writes where it writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from immunity.attacks.attack import THREATS, Attack, Manner
from immunity.attacks.curve import Recorder
from immunity.attacks.edits import rising, stepped
from immunity.data.corpus import Corpora
from immunity.errors import ModelError, SettingsError
from immunity.losses import causal_lm
from immunity.models import LanguageModel, load
from immunity.pretrained import place_of
from immunity.weights import LowRank, interpolate, low_rank, matrices, without

_NAMES: Mapping[torch.dtype, str] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float64: "float64",
}


@dataclass(frozen=True, kw_only=True)
class Interpolate(Attack):
    """θ + t (θ_base − θ): walk back from the released weights to what they were made from, and beyond.

    Every weight moves: embeddings, norms and the head too.

    Attributes:
        base: What the released model was made from, as ``immunity.models.load`` takes it; "" is what a released
            adapter names as its base.
        shares: t in per cent; 100 is the base bit for bit, above 100 the difference is taken off more than once.
        seed: Of no effect: nothing is drawn.

    Raises:
        SettingsError: The shares do not increase.

    Source:
        arXiv 2203.05482 and 2212.04089 (a difference of weights is a direction that can be scaled and negated).

    Departures from the paper:
        * Away from the base (t < 0) is no attack but a defence (LoX, ExPO), so it is not offered here.
    """

    name: ClassVar[str] = "interpolate"
    unit: ClassVar[str] = "% of the way to the base"
    base: str = ""
    shares: tuple[int, ...] = (25, 50, 75, 100, 150)
    seed: int = 1

    def __post_init__(self) -> None:
        rising("shares", self.shares, most=1000)

    @property
    def manner(self) -> Manner:
        """Nothing is read but the base."""
        return Manner(THREATS["edit"])

    @property
    def budgets(self) -> tuple[int, ...]:
        """0 and the shares."""
        return (0, *self.shares)

    def reads(self, data: Corpora) -> Corpora:  # noqa: ARG002 - part of the interface
        """No data."""
        return {}

    def tamper(self, model: LanguageModel, data: Corpora, recorder: Recorder) -> LanguageModel:  # noqa: ARG002
        """See :meth:`Attack.tamper`.

        Raises:
            SettingsError: There is no base, see :func:`sibling`.
            ModelError: The base is another model.
        """
        weights, ends = paired(model, sibling(model, self.base))
        return stepped(model, weights, recorder, towards(weights, ends))


@dataclass(frozen=True, kw_only=True)
class Subtract(Attack):
    """Take the leading part of D = W − W_base = U S Vᵀ out of the released weights.

    Attributes:
        base: See :class:`Interpolate`.
        take: "difference" makes it W − U_k S_k V_kᵀ, for every weight with two dimensions: what LoX added a multiple of
            is gone, and with it the alignment that it rested on. "directions" makes it (I − U_k U_kᵀ) W, for the linear
            layers: all that they write where the difference writes, which hits a defence that scaled or turned what was
            there before. Layers that do not differ stay bit for bit.
        ranks: k; one model each, all from the released weights.
        seed: Of no effect: the decomposition of large matrices is randomised, from a seed of its own.

    Raises:
        SettingsError: The ranks do not increase.

    Source:
        The inverse of arXiv 2506.15606 (LoX), W + α U_k U_kᵀ D, at α = −1 (embeddings and the head are edited there as
        well); "directions" is ours, the nearest published edit is arXiv 2402.05162, which finds ranks from activations.

    Departures from the paper:
        * It is the counter-attack, not the method; the difference is that of the released pair, not of alignment alone.
    """

    name: ClassVar[str] = "subtract"
    unit: ClassVar[str] = "rank"
    base: str = ""
    take: Literal["difference", "directions"] = "difference"
    ranks: tuple[int, ...] = (1, 4, 16, 64)
    seed: int = 1

    def __post_init__(self) -> None:
        rising("ranks", self.ranks, most=100_000)
        if self.take not in {"difference", "directions"}:
            raise SettingsError(f"take = {self.take!r}: use difference or directions")

    @property
    def manner(self) -> Manner:
        """Nothing is read but the base."""
        return Manner(THREATS["edit"])

    @property
    def budgets(self) -> tuple[int, ...]:
        """0 and the ranks."""
        return (0, *self.ranks)

    def reads(self, data: Corpora) -> Corpora:  # noqa: ARG002 - part of the interface
        """No data."""
        return {}

    def tamper(self, model: LanguageModel, data: Corpora, recorder: Recorder) -> LanguageModel:  # noqa: ARG002
        """See :meth:`Attack.tamper`.

        Raises:
            SettingsError: There is no base, see :func:`sibling`.
            ModelError: The base is another model.
        """
        other = sibling(model, self.base)
        weights, bases = paired(model, other)
        if self.take == "difference":
            two = [i for i, weight in enumerate(weights) if weight.ndim == 2]
            weights, bases = [weights[i] for i in two], [bases[i] for i in two]
        else:
            weights = [matrix.weight for matrix in matrices(model.network)]
            bases = [matrix.weight for matrix in matrices(other.network)]
        found = [_leading(*pair, self.ranks[-1]) for pair in zip(weights, bases, strict=True)]
        whole = sum(float((a - b).square().sum()) for a, b in zip(weights, bases, strict=True))

        def edit(rank: int) -> dict[str, float]:
            for weight, part in zip(weights, found, strict=True):
                if self.take == "difference":
                    weight.sub_(part.matrix(rank).to(weight.dtype))
                else:
                    without(weight, part.u[:, :rank])
            leading = sum(float(part.s[:rank].square().sum()) for part in found)
            return {"share_of_difference": leading / whole if whole else 0.0}

        return stepped(model, weights, recorder, edit)


def sibling(model: LanguageModel, name: str) -> LanguageModel:
    """Another model, frozen, its adapter merged, on the device and in the precision of ``model``.

    Args:
        model: Says where the base is if ``name`` does not.
        name: As ``immunity.models.load`` takes it; "" is the base that the folder's adapter names.

    Raises:
        SettingsError: Neither says.
        ModelError: It cannot be loaded.
    """
    dtype = next(model.network.parameters()).dtype
    found = name or _named_by_adapter(model.source)
    return load(found, template=model.template.name, device=str(model.device), dtype=_NAMES[dtype], adapter="merged")


def paired(model: LanguageModel, other: LanguageModel) -> tuple[list[Tensor], list[Tensor]]:
    """The weights of ``model``, each once, and beside them those of ``other``.

    Raises:
        ModelError: They differ in architecture or vocabulary, or one ties weights that the other keeps apart.
    """
    ours, theirs = _weights(model), _weights(other)
    wrong = [name for name in {**ours, **theirs} if _shape(ours, name) != _shape(theirs, name)]
    if wrong:
        raise ModelError(
            f"{other.source!r} is another model than {model.source!r}: {wrong[0]} is {_shape(theirs, wrong[0])} there, "
            f"{_shape(ours, wrong[0])} here; give one of the same architecture and vocabulary"
        )
    known = other.tokenizer.get_vocab()
    if any(known.get(token, i) != i for token, i in model.tokenizer.get_vocab().items()):
        raise ModelError(
            f"the tokenizers of {other.source!r} and {model.source!r} give different ids to the same tokens: give a "
            "model with the same vocabulary"
        )
    ends: dict[int, tuple[Tensor, Tensor]] = {}
    for name, weight in ours.items():
        _, end = ends.setdefault(id(weight), (weight, theirs[name]))
        if end is not theirs[name] and not torch.equal(end, theirs[name]):
            raise ModelError(
                f"{model.source!r} ties {name} to another weight, {other.source!r} keeps them apart: save both tied"
            )
    return [weight.detach() for weight, _ in ends.values()], [end.detach() for _, end in ends.values()]


def towards(weights: Sequence[Tensor], ends: Sequence[Tensor]) -> Callable[[int], dict[str, float]]:
    """An edit for :func:`~immunity.attacks.edits.stepped`: the share of the way to ``ends``, in per cent."""

    def edit(share: int) -> dict[str, float]:
        for weight, end in zip(weights, ends, strict=True):
            interpolate(weight, weight.detach().clone(), end, share / 100)
        return {}

    return edit


def _leading(weight: Tensor, base: Tensor, rank: int) -> LowRank:
    """The leading part of W − W_base, without what is only the rounding of W."""
    dtype = weight.dtype if weight.dtype == torch.float64 else torch.float32
    noise = torch.finfo(weight.dtype).eps * float(weight.detach().to(dtype).norm())
    return low_rank(weight.detach().to(dtype) - base.detach().to(dtype), rank, noise=noise)


def _weights(model: LanguageModel) -> dict[str, Tensor]:
    """Every name of every weight: tied ones under each of their names."""
    return dict(causal_lm(model.network).named_parameters(remove_duplicate=False))


def _shape(weights: Mapping[str, Tensor], name: str) -> str:
    return "×".join(map(str, weights[name].shape)) if name in weights else "missing"


def _named_by_adapter(source: str) -> str:
    """The base of the LoRA adapter in a local folder, as :func:`~immunity.models.load` takes it."""
    folder = Path(place_of(source))
    config = folder / "adapter_config.json"
    stored = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    base = stored.get("base_model_name_or_path")
    if not base:
        raise SettingsError(
            f"{source!r} is no folder of an adapter that names its base: say base=… (what it was made from: a "
            "folder or a hub id)"
        )
    beside = folder / base
    return str(beside) if beside.is_dir() else str(base)
