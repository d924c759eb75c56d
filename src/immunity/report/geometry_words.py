"""What a probe of a trap's geometry found, in words: the same on a page and in a terminal. No verdict among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from immunity.metrics.stats import finite
from immunity.report.show import NOTHING, decimal, plural

Row = Mapping[str, Any]

_RULES: Final = {"adam": "Adam-like"}
_NOTHING: Final = 0.005
"""What is less is written as 0.00."""


class Name(NamedTuple):
    """A direction: as a heading, and inside a sentence."""

    title: str
    said: str


NAMES: Final[Mapping[str, Name]] = {
    "harmful": Name("Down the harmful gradient", "down the harmful gradient"),
    "benign": Name("Down the benign gradient", "down the benign gradient"),
    "random": Name("Random directions", "in random directions"),
    "harmful-adam": Name("Adam's first step, harmful", "along Adam's first harmful step"),
    "benign-adam": Name("Adam's first step, benign", "along Adam's first benign step"),
    "harmful-path": Name("A path of harmful steps", "on a path of harmful steps"),
    "benign-path": Name("A path of benign steps", "on a path of benign steps"),
}
"""Direction -> its names, in the order of a page."""
HONEST: Final = ("benign", "benign-adam", "benign-path", "random")
"""Directions along which nothing should happen."""
LOSSES: Final[Mapping[str, str]] = {
    "collapse": "collapse loss",
    "harmful": "harmful loss",
    "general": "general loss",
    "benign": "benign loss",
}
ROLES: Final[Mapping[str, str]] = {"model": "hardened", "baseline": "before hardening"}
DIAGNOSTIC: Final = (
    "A diagnostic, and no claim: it says how the losses lie around a model, not what an attacker gets. No attack was "
    "run for it."
)
LIMITS: Final = (
    "An attacker goes where his optimiser leads him, and turns at every step; a ray does not. What he gets is for "
    "the attacks of a battery or an audit to show.",
    "Gradients and distances are over every weight. Somebody who trains an adapter walks in fewer directions.",
    "The collapse loss asks for one word. A model that falls to something else than that word does not show it; the "
    "general loss then rises all the same.",
    "Distances are Euclidean and compare models that come from the same weights, not models of different sizes.",
    "Intervals are Student's t over draws: other batches for the gradients, other random directions. The rows that are "
    "measured stay the same, and another hardening seed may give another geometry.",
)


def name_of(direction: str) -> Name:
    """The names of a direction; an unknown one is called by its own."""
    return NAMES.get(direction) or Name(direction, f"along {direction}")


def number(value: object) -> str:
    """A loss or a cosine; what rounds to 0 has no sign."""
    found = finite(value)
    return decimal(0.0 if found is not None and abs(found) < _NOTHING else found)


def length(value: object) -> str:
    """A distance, with three digits."""
    found = finite(value)
    return NOTHING if found is None else f"{found:.3g}"


def interval(found: object, said: Callable[[object], str] = number) -> str:
    """A spread, "0.13 [0.10 to 0.17]"."""
    if not isinstance(found, Mapping) or finite(found.get("mean")) is None:
        return NOTHING
    low, high = found.get("low"), found.get("high")
    ends = "" if finite(low) is None or finite(high) is None else f" [{said(low)} to {said(high)}]"
    return f"{said(found['mean'])}{ends}"


def width(row: Row) -> str:
    """Of a basin; a lower bound without an interval where one is not left again."""
    found = row.get("width")
    if not row.get("open"):
        return interval(found, length)
    return f"≥ {length(found.get('mean'))}" if isinstance(found, Mapping) else NOTHING


def sentence(row: Row, level: float) -> str:
    """What the collapse loss does in one direction."""
    name, n, fired = name_of(str(row["direction"])).said, int(row["n"]), int(row["fired"])
    end, depth = length(row["end"]), number((row.get("depth") or {}).get("mean"))
    if not fired:
        falls = "it does not fall" if depth == number(0.0) else f"it falls by {depth} at the most"
        return f"{name[:1].upper()}{name[1:]} the collapse loss stays above {decimal(level)} up to {end}; {falls}."
    of = f"in {'each' if fired == n else str(fired)} of {plural(n, 'draw')}" if n > 1 else "in the one draw"
    where = length((row.get("onset") or {}).get("mean"))
    back = int(row.get("open") or 0)
    if back == fired:
        then = f"and is not back above it up to {end}"
    else:
        some = f" in {fired - back} of {fired}" if back else ""
        then = (
            f"and comes back above it{some}: it is below it for {length((row.get('inside') or {}).get('mean'))} in all"
        )
    return (
        f"{name[:1].upper()}{name[1:]} the collapse loss falls below {decimal(level)} at {where} ({of}), by {depth} at "
        f"the most, {then}."
    )


def findings(summary: Row) -> Iterator[str]:
    """What one model's numbers say, the harmful direction first."""
    level, rows = summary["level"], {str(row["direction"]): row for row in summary["directions"]}
    yield from (sentence(rows[name], level) for name in ("harmful", "harmful-adam", "harmful-path") if name in rows)
    honest = [rows[name] for name in HONEST if name in rows]
    if met := [row for row in honest if row["fired"]]:
        yield f"Not clear: {_listed(met, 'from', 'clear_until')}."
    if clear := [row for row in honest if not row["fired"]]:
        yield f"Clear: {_listed(clear, 'up to', 'end')}."
    if cosine := ((summary.get("numbers") or {}).get("cosines") or {}).get("harmful benign"):
        yield f"The cosine of the harmful and the benign gradient is {interval(cosine)}."


def _listed(rows: Sequence[Row], word: str, key: str) -> str:
    return ", ".join(f"{name_of(str(row['direction'])).said} {word} {length(row[key])}" for row in rows)


def simulated(rows: Sequence[Row]) -> str:
    """What a model's record says that its defence walks itself, or ""."""
    said = []
    for row in rows:
        rule = str(row.get("rule"))
        size = f"at a rate of {length(row['radius'])}" if rule == "plain" else f"of {length(row['radius'])}"
        said.append(f"{plural(int(row['steps']), f'{_RULES.get(rule, rule)} step')} {size}")
    return f"Its record says that the defence prepares for {', '.join(said)}." if said else ""
