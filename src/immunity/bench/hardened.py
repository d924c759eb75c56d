"""What the record beside a saved model says about how it was hardened: the attacker reads it as anybody can."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from immunity import mechanisms
from immunity.bench import store
from immunity.bench.jobs import MODEL
from immunity.fetch import MEMO

_LOG: Final = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hardened:
    """A model and its record.

    Attributes:
        model: As the user named it.
        record: Of the hardening, under the name of the model; None if there is none.
    """

    model: str
    record: dict[str, Any] | None

    @property
    def found(self) -> bool:
        """Whether there is a record."""
        return self.record is not None

    @property
    def mechanisms(self) -> tuple[mechanisms.Mechanism, ...]:
        """What the defence says that it does, then those that it was laid over; none twice, empty without a record.

        Raises:
            DataError: A record is damaged.
            SettingsError: A record names a mechanism that this version does not know.
        """
        rows = (row for one in self.lineage() for row in (one.record or {}).get("mechanisms", ()))
        return tuple(dict.fromkeys(mechanisms.read(rows)))

    @property
    def word(self) -> str | None:
        """The word that a trapped model repeats, if it says so."""
        word = (self.record or {}).get("settings", {}).get("word")
        return None if word is None else str(word)

    def lineage(self) -> Iterator[Hardened]:
        """This model, the one that it was made from, and so on, as far as their records are there; warns of a gap.

        Raises:
            DataError: A record is damaged.
        """
        met: set[str] = set()
        model = self
        while model.record is not None and model.model not in met:
            met.add(model.model)
            yield model
            made_from = model.record.get("identity", {}).get("model", {}).get("source")
            if made_from is None:
                _LOG.warning("the record of %s does not say what it was made from: its past ends there", model.model)
                return
            above, model = model, hardened(str(made_from))
            if model.record is None and Path(model.model).name == MODEL:
                _LOG.warning("%s was made from %s, which has no record: its past ends there", above.model, model.model)


def hardened(source: str) -> Hardened:
    """The record that ``immunise`` left beside a model, if ``source`` is such a model.

    Raises:
        DataError: The record is damaged.
    """
    place = Path(source).expanduser()
    record = store.record(place.parent) if place.name == MODEL else None
    if record is None or record.get("kind") != "harden":
        return Hardened(source, None)
    return Hardened(source, {**record, "name": source})


def origin(source: str) -> str:
    """The model that a saved one was made from in the end: "tiny", "smollm2", a hub id, a folder."""
    memo = Path(source).expanduser() / MEMO
    return str(store.read(memo).get("origin", source)) if memo.is_file() else source


def ordinary(source: str) -> str:
    """The stand-in for what a model knows in general: the tiny one knows its own world only."""
    return "general" if origin(source) == "tiny" else "common"
