"""Feeding: corpora -> the batches of each step, for methods that read several corpora or several batches of a role."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import add

from immunity.batch import Batch
from immunity.data.corpus import Corpus
from immunity.data.streams import Mixed, Shuffled, TokenSet, tokenise
from immunity.errors import SettingsError
from immunity.models import LanguageModel


def parts(corpus: Corpus | tuple[Corpus, ...]) -> tuple[Corpus, ...]:
    """A role's corpora: one, or several that each batch is shared between."""
    return corpus if isinstance(corpus, tuple) else (corpus,)


def token_sets(corpus: Corpus | tuple[Corpus, ...], model: LanguageModel) -> tuple[TokenSet, ...]:
    """The corpora of one role, tokenised with the model's template and length."""
    return tuple(tokenise(part, model.template, model.max_length) for part in parts(corpus))


def stream(
    sets: tuple[TokenSet, ...], rows: int, seed: int, times: int = 1, beside: str = ""
) -> Callable[[int], Batch]:
    """``times`` batches of ``rows`` rows of one role, one after the other, for each step; in step with ``beside``.

    Every one of them is shared evenly between the role's corpora (the first ones take the remainder), so that
    ``Batch.parts(times)`` gives back batches of the same make-up.

    Raises:
        SettingsError: There are more corpora than rows.
    """
    if rows < len(sets):
        raise SettingsError(
            f"a batch of {rows} rows cannot be shared between {len(sets)} corpora; raise the batch size"
        )
    share, rest = divmod(rows, len(sets))
    # A seed for each: corpora of equal size must not walk in step.
    seeds = [seed * len(sets) + i for i in range(len(sets))]
    one = Mixed([Shuffled(sets[i], share + (i < rest), seeds[i], beside) for i in range(len(sets))], sets[0].role)
    return lambda step: reduce(add, (one(step * times + k) for k in range(times)))
