"""What there is no way to do to a model, whoever tries: a report names it as passed over, not as failed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from immunity.errors import INAPPLICABLE, DataError, ModelError


@contextmanager
def under(template: str) -> Iterator[None]:
    """Around what depends on a prompt template that the attacker chose; "auto", the model's own, excuses nothing.

    Raises:
        ModelError: The tokenizer cannot write the template, or rows have no room in it once they are written.
    """
    try:
        yield
    except (ModelError, DataError) as error:
        if template == "auto":
            raise
        raise ModelError(f"{INAPPLICABLE} under the template {template}: {error}") from error
