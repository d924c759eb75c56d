"""What attacks share that fit something small, beside the weights, on a few restricted examples."""

from __future__ import annotations

from dataclasses import asdict
from functools import cache
from typing import Any, Final, final

from immunity.attacks.attack import THREATS, Attack, Manner, needed
from immunity.attacks.curve import Spent
from immunity.batch import Batch
from immunity.data.corpus import Corpora
from immunity.data.streams import Shuffled, Stream, TokenSet, tokenise
from immunity.errors import SettingsError
from immunity.losses import causal_lm
from immunity.models import LanguageModel

FORWARD: Final = 2.0
"""FLOPs per weight and token of a forward pass."""
FITTED: Final = 4.0
"""And of a forward pass with a backward pass to hidden states, not to weights."""


class Restricted(Attack):
    """An attack on restricted examples and nothing else.

    Attributes:
        n: How many; with fewer at hand, what there is.
    """

    n: int

    @property
    def manner(self) -> Manner:
        """Restricted examples only."""
        return Manner(THREATS["harmful"])

    def reads(self, data: Corpora) -> Corpora:
        """The first ``n`` restricted examples.

        Raises:
            DataError: There are none.
        """
        return few(data, self.n, self.name)


def few(data: Corpora, n: int, why: str) -> Corpora:
    """The first ``n`` restricted examples, or as many as there are.

    Raises:
        DataError: There are none.
    """
    whole = needed(data, "harmful", why=f"the attack {why!r}")
    return {"harmful": whole.take(min(n, len(whole)))}


def tokens(model: LanguageModel, data: Corpora) -> TokenSet:
    """The restricted examples as ``model`` is asked them.

    Raises:
        DataError: No row is left.
    """
    return tokenise(needed(data, "harmful"), model.template, model.max_length)


def weights(model: LanguageModel) -> int:
    """How many a pass goes through."""
    return sum(p.numel() for p in causal_lm(model.network).parameters())


@final
class Rows(Stream):
    """The batches of a shuffled set, under the role "train", and what they cost.

    Args:
        model: What they are run through.
        data: What :func:`few` gave.
        batch_size: Rows per step.
        seed: Of their order.
    """

    def __init__(self, model: LanguageModel, data: Corpora, batch_size: int, seed: int) -> None:
        self._rows = Shuffled(tokens(model, data), batch_size, seed)
        self._weights = weights(model)
        self._size = batch_size
        self._seen = cache(self._tokens)

    def __call__(self, step: int) -> Batch:
        """See :class:`~immunity.data.streams.Stream`."""
        return self._rows(step).as_role("train")

    def spent(self, done: int) -> Spent:
        """What ``done`` steps have cost."""
        seen = sum(self._seen(step) for step in range(done))
        return Spent(done * self._size, seen, FITTED * self._weights * seen)

    def _tokens(self, step: int) -> int:
        return sum(len(row.ids) for row in self(step).rows)


def identity(attack: Any, model: LanguageModel, data: Corpora) -> dict[str, object]:  # noqa: ANN401 - any dataclass
    """What makes a training run this run; a folder of another one is refused."""
    return {
        "attack": {name: value for name, value in asdict(attack).items() if name != "micro_batch"},
        "model": model.source,
        "max_length": model.max_length,
        "data": needed(data, "harmful").fingerprint,
    }


def at_least_1(**settings: int) -> None:
    """Refuse settings below 1.

    Raises:
        SettingsError: One is; the message names it.
    """
    for name, value in settings.items():
        if value < 1:
            raise SettingsError(f"{name} = {value}: there must be at least 1")
