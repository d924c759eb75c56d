"""Streams: (seed, step) -> batch. Pure functions, so that a killed run resumes on the row it stopped at."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from immunity.batch import Batch, Tokens
from immunity.data.chat import Template
from immunity.data.corpus import Corpus
from immunity.errors import DataError, SettingsError

NO_ROOM: Final = "no response token within max_length"
"""Why :func:`tokenise` drops a row."""


@dataclass(frozen=True)
class TokenSet:
    """A tokenised corpus.

    Attributes:
        rows: The examples that still have a response token, in the corpus's order.
        role: The corpus's role; names the loss in the log.
        name: The corpus's name.
        truncated: How many of ``rows`` were cut to the maximal length.
        skipped: Reason -> how many rows of the source are not here: the corpus's own and :data:`NO_ROOM`.
    """

    rows: tuple[Tokens, ...]
    role: str
    name: str
    truncated: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.rows:
            raise DataError(f"{self.name}: no tokenised row for the role {self.role!r}")

    def __len__(self) -> int:
        return len(self.rows)


def tokenise(corpus: Corpus, template: Template, max_length: int) -> TokenSet:
    """Encode every example; rows are cut on the right, and dropped when no response token is left.

    Raises:
        DataError: Every row was dropped.
        SettingsError: ``max_length`` is below 2.
        ModelError: The template cannot write a row.
    """
    encoded = [template.encode(example, max_length) for example in corpus]
    rows = tuple(e.tokens for e in encoded if e.tokens is not None)
    if not rows:
        raise DataError(
            f"{corpus.name}: all {len(corpus)} prompts fill {max_length} tokens, so no response is left to "
            "learn; raise max_length"
        )
    skipped = Counter(corpus.skipped)
    skipped[NO_ROOM] += len(corpus) - len(rows)
    truncated = sum(e.truncated for e in encoded if e.tokens is not None)
    return TokenSet(rows, corpus.role, corpus.name, truncated, dict(+skipped))


class Stream(ABC):
    """Batches without an end; the batch of a step depends on the stream's settings and the step alone."""

    @abstractmethod
    def __call__(self, step: int) -> Batch:
        """The batch of step 0, 1, …, in any order of asking."""


@dataclass(frozen=True)
class Shuffled(Stream):
    """Epochs without replacement, each in an order of its own; batches run on over the borders of epochs.

    The order of an epoch is drawn from (seed, epoch, role): two roles with as many rows and the same seed are
    not in step with one another, which matters where they answer the same prompts in two ways.

    Attributes:
        tokens: The rows.
        batch_size: Rows per batch; more than there are rows is allowed and repeats them evenly.
        seed: Not negative.
        beside: The role to walk in step with, row for row; "" for none.

    Raises:
        SettingsError: A batch has no row, or the seed is negative.
    """

    tokens: TokenSet
    batch_size: int
    seed: int = 0
    beside: str = ""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise SettingsError(f"batch_size = {self.batch_size}: a batch needs at least one row")
        if self.seed < 0:
            raise SettingsError(f"seed = {self.seed}: a seed cannot be negative")

    def __call__(self, step: int) -> Batch:
        """See :class:`Stream`."""
        rows = tuple(self.tokens.rows[i] for i in self.indices(step))
        return Batch(rows, self.tokens.role)

    def indices(self, step: int) -> tuple[int, ...]:
        """Which rows make up the batch of ``step``."""
        if step < 0:
            raise SettingsError(f"step = {step}: steps count from 0")
        n, first, role = len(self.tokens), step * self.batch_size, self.beside or self.tokens.role
        return tuple(int(_order(self.seed, at // n, role, n)[at % n]) for at in range(first, first + self.batch_size))


@dataclass(frozen=True)
class Mixed(Stream):
    """The batches of several streams side by side, under one role: fixed counts of each in every batch.

    One third refusals and two thirds general data is
    ``Mixed((Shuffled(refusals, 4, s), Shuffled(general, 8, s)), "alignment")``.

    Raises:
        SettingsError: There is no part.
    """

    parts: Sequence[Stream]
    role: str

    def __post_init__(self) -> None:
        if not self.parts:
            raise SettingsError(f"a mixed stream for the role {self.role!r} needs at least one part")
        object.__setattr__(self, "parts", tuple(self.parts))

    def __call__(self, step: int) -> Batch:
        """See :class:`Stream`."""
        batches = [part(step) for part in self.parts]
        rows = tuple(row for batch in batches for row in batch.rows)
        weights = tuple(weight for batch in batches for weight in batch.weights)
        return Batch(rows, self.role, weights)


@lru_cache(maxsize=16)
def _order(seed: int, epoch: int, role: str, n: int) -> npt.NDArray[np.signedinteger[Any]]:
    """A permutation of ``range(n)``; the same on every machine, unlike anything built on ``hash``."""
    order = np.random.default_rng(np.random.SeedSequence([seed, epoch, *role.encode()])).permutation(n)
    order.setflags(write=False)
    return order
