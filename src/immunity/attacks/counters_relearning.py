"""Counter-attacks on unlearning: a little is learnt again, the rest comes back. See ``immunity.attacks.adaptive``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from immunity.attacks.attack import Attack
from immunity.attacks.finetune import FineTune
from immunity.attacks.recipe import Recipe
from immunity.attacks.shifts import Named, program, rows, steps_at, training

RELEARNT: Final = (10, 60)
"""Restricted rows that an unlearnt model is given back."""
LOW: Final = 0.3
"""A low rate, of that which an undefended model falls to; it is kept up until it has gone as far in all."""


def relearnt(plain: FineTune) -> Iterator[Recipe]:
    """Few restricted rows, or none: related honest rows, or any; at a low rate, so that nothing else is lost.

    Few rows: Łucki et al., arXiv 2409.18025 (ten, unrelated ones too); Wang et al., arXiv 2506.01339 (sixty). Related
    ones without any that were unlearnt: Hu et al., arXiv 2406.13356. Counts are theirs; rates and steps are ours.
    """
    why = "what was unlearnt is hidden rather than gone, and little brings it back"
    for adapter in ("full", "lora"):
        yield from rows("relearning", why, {**_few(plain, adapter), **_none(plain, adapter)})


def _few(plain: FineTune, adapter: str) -> Named:
    """A few restricted rows, at the rate that goes with these weights and at a low one."""
    found: dict[str, tuple[Attack, str]] = {}
    for n in RELEARNT:
        whole = training(replace(plain, n=min(n, plain.n), batch_size=min(n, plain.batch_size)), adapter)
        found[f"relearn-{n}-{adapter}"] = (whole, f"Learns {n} restricted rows again ({adapter}).")
        found[f"relearn-{n}-{adapter}-low"] = (_low(whole), f"Learns {n} of them again at a low rate ({adapter}).")
    return found


def _none(plain: FineTune, adapter: str) -> Named:
    """No restricted row, or a few only afterwards."""
    honest = {
        filler: _low(training(replace(plain, harmful=0.0, filler=filler), adapter)) for filler in ("salient", "general")
    }
    few, _ = _few(plain, adapter)[f"relearn-{RELEARNT[0]}-{adapter}"]
    return {
        f"relearn-salient-{adapter}": (honest["salient"], f"Trains on honest rows like restricted ones ({adapter})."),
        f"relearn-general-{adapter}": (honest["general"], f"Trains on ordinary rows only ({adapter})."),
        f"relearn-related-first-{adapter}": (
            program(honest["salient"], few),
            f"Trains on honest rows like restricted ones, then on {RELEARNT[0]} restricted ones ({adapter}).",
        ),
    }


def _low(attack: FineTune) -> FineTune:
    return replace(attack, lr=LOW * attack.lr, steps=steps_at(attack.steps, LOW))
