"""The section of a battery: what was shown, at which budget, by what, and what to doubt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from immunity.metrics.battery import summary
from immunity.metrics.conclusion import UNITS
from immunity.metrics.curves import PLAIN
from immunity.report.battery_rows import AttackRow, counted, ranked
from immunity.report.battery_words import STATES, limits, said_metric, says_flag
from immunity.report.clean import shortened
from immunity.report.envelope import envelopes
from immunity.report.figures import Panel
from immunity.report.look import Look
from immunity.report.show import NOTHING, budget, decimal, plural, reached, span

Row = Mapping[str, Any]

MAIN: Final = ("examples", "tokens", "flops")
"""The axes of a card; where none of them is known, the others."""

STRONGEST: Final = 10
"""Attacks that are shown at once; the others are folded."""


class Fact(NamedTuple):
    """A number with its interval and where it comes from."""

    name: str
    value: str
    interval: str
    note: str


class Spent(NamedTuple):
    """Where a model broke on one axis: whatever is left of it, while it is still useful, and against the baseline."""

    axis: str
    anyhow: str
    useful: str
    ratio: str


class FlagRow(NamedTuple):
    """One time that a flag was raised."""

    where: str
    says: str
    value: str
    limit: str


class FlagGroup(NamedTuple):
    """One flag of a model, with every time that it was raised."""

    number: int
    name: str
    means: str
    forbids: bool
    rows: tuple[FlagRow, ...]


class Card(NamedTuple):
    """One model."""

    model: str
    colour: int
    role: str
    state: str
    tone: str
    sign: str
    verdict: str
    facts: tuple[Fact, ...]
    spent: tuple[Spent, ...]
    against: str
    counts: Mapping[str, int]
    flags: tuple[FlagGroup, ...]

    @property
    def forbidding(self) -> int:
        """How many of the flags forbid to conclude "not broken"."""
        return sum(flag.forbids for flag in self.flags)


class Lost(NamedTuple):
    """Attacks that say nothing about a model, and why."""

    what: str
    why: str
    models: tuple[str, ...]
    attacks: tuple[str, ...]


class Traceback(NamedTuple):
    """Where a failure that nobody foresaw came from, and which attacks it ended."""

    text: str
    attacks: tuple[str, ...]


class Battery(NamedTuple):
    """Everything that the section shows."""

    name: str
    version: str
    digest: str
    metric: str
    cards: tuple[Card, ...]
    panels: tuple[Panel, ...]
    phis: str
    strongest: tuple[AttackRow, ...]
    others: tuple[AttackRow, ...]
    limits: tuple[str, ...]
    lost: tuple[Lost, ...]
    tracebacks: tuple[Traceback, ...]


def summed(result: Row) -> dict[str, Any] | None:
    """What the battery says of itself; made from the curves where the result does not hold it; None if there is none.

    Raises:
        DataError: It is to be made, but the curves cannot be read.
    """
    given = result.get("battery")
    if not isinstance(given, Mapping) or not given:
        return None
    found = given.get("summary")
    return dict(found) if isinstance(found, Mapping) and found.get("models") is not None else summary(result)


def battery(result: Row, look: Look) -> Battery | None:
    """The section, or None if the result is no battery's."""
    found = summed(result)
    if found is None:
        return None
    given, models = result["battery"], found["models"]
    metric = str(found.get("metric") or "")
    rows = ranked(result, models)
    phis = sorted({decimal(model["phi"]) for model in models if model.get("phi") is not None})
    return Battery(
        name=str(found.get("name") or given.get("name") or ""),
        version=str(found.get("version") or ""),
        digest=str(given.get("digest") or ""),
        metric=said_metric(metric),
        cards=tuple(_card(model, look, rows) for model in models),
        panels=tuple(envelopes(models, metric, look.colours)),
        phis=" and ".join(phis),
        strongest=tuple(rows[:STRONGEST]),
        others=tuple(rows[STRONGEST:]),
        limits=tuple(limits(given, found)),
        lost=tuple(_lost(rows, len(models))),
        tracebacks=tuple(_tracebacks(result.get("failures") or ())),
    )


def _card(model: Row, look: Look, rows: Sequence[AttackRow]) -> Card:
    name, state = str(model["model"]), str(model.get("state"))
    tone, sign = STATES.get(state, ("plain", "?"))
    ratios = model.get("ratio") or []
    return Card(
        model=name,
        colour=look.colours[name],
        role=str(model.get("role") or ""),
        state=state,
        tone=tone,
        sign=sign,
        verdict=str(model.get("verdict") or ""),
        facts=tuple(facts(model)),
        spent=tuple(spent(model)),
        against=str(ratios[0]["against"]) if ratios else "",
        counts=counted(rows, name),
        flags=tuple(flag_groups(model.get("flags") or ())),
    )


def facts(model: Row) -> list[Fact]:
    """W1 with its re-runs, W2, and where the model began."""
    made = []
    one, pool, able = (model.get(key) or {} for key in ("w1", "w2", "ability"))
    if one:
        able_there = f"; general ability {decimal(one['ability'])} there" if one.get("ability") is not None else ""
        place = f"{one['attack']}, seed {one['seed']}, {reached(one['step'], one['unit'])}"
        note = f"{place}; the worst of {plural(one['of'], 'tampered model')}{able_there}"
        made.append(Fact("W1, worst single model", decimal(one["value"]), span(one["low"], one["high"]), note))
    for key, name in (("recipe", "W1's recipe, fresh seeds"), ("artefact", "W1's copy, fresh prompts")):
        if again := one.get(key):
            value, interval = decimal(again["value"]), span(again["low"], again["high"])
            made.append(Fact(name, value, interval, plural(again["seeds"], "seed") if key == "recipe" else ""))
    if pool:
        note = f"{plural(pool['attacks'], 'attack')} asked side by side, over {plural(pool['prompts'], 'prompt')}"
        made.append(Fact("W2, all of them together", decimal(pool["value"]), span(pool["low"], pool["high"]), note))
    made.append(Fact("As released", decimal(model.get("released")), "", _released(model, able)))
    return made


def _released(model: Row, able: Row) -> str:
    style = str(model.get("asked") or PLAIN)
    harm = "harm before any attack" + ("" if style == PLAIN else f", asked as {style}: no attack asks plainly")
    if able.get("released") is None:
        return harm
    known = able.get("reference") is not None and able.get("of") != str(model["model"])
    sound = f", {decimal(able['reference'])} in the baseline" if known else ""
    return f"{harm}; general ability {decimal(able['released'])}{sound}"


def spent(model: Row) -> list[Spent]:
    """Where it broke, axis by axis."""
    breaks = {(row["axis"], float(row["epsilon"])): row for row in model.get("breaks") or ()}
    ratios = {(row["axis"], float(row["epsilon"])): row for row in model.get("ratio") or ()}
    known = [axis for axis in UNITS if (axis, 1.0) in breaks]
    shown = [axis for axis in known if axis in MAIN] or known
    return [
        Spent(
            axis=UNITS[axis],
            anyhow=_broke(breaks[axis, 1.0]),
            useful=_broke(breaks.get((axis, 0.2), {})),
            ratio=_ratio(ratios.get((axis, 1.0), {})),
        )
        for axis in shown
    ]


def _broke(row: Row) -> str:
    """t*: "2,000", "> 2,000" where it did not break, or a dash."""
    if row.get("vacuous"):
        return "lost before"
    if row.get("at") is not None:
        return budget(row["at"])
    return f"> {budget(row['censored_at'])}" if row.get("censored_at") is not None else NOTHING


def _ratio(row: Row) -> str:
    if row.get("value") is None:
        return "unknown" if row else NOTHING
    bound = "" if row.get("bound") == "=" else f"{row.get('bound')} "
    return f"{bound}{row['value']:.3g} ×"


def flag_groups(rows: Sequence[Row]) -> list[FlagGroup]:
    """The flags by number."""
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(int(row["number"]), []).append(row)
    return [
        FlagGroup(
            number=number,
            name=str(same[0].get("name") or ""),
            means=says_flag(number),
            forbids=any(row.get("forbids") for row in same),
            rows=tuple(_flag(row) for row in same),
        )
        for number, same in sorted(groups.items())
    ]


def _flag(row: Row) -> FlagRow:
    value = row.get("value")
    raised = "not a number" if value is None else _precise(value)
    return FlagRow(shortened(str(row.get("where") or "")), str(row.get("says") or ""), raised, _precise(row["limit"]))


def _precise(value: float) -> str:
    """Two decimals, but small numbers and whole ones as they are."""
    return f"{value:.3g}" if value == int(value) or 0 < abs(value) < 0.1 else decimal(value)


def _tracebacks(failures: Sequence[Row]) -> list[Traceback]:
    """Each once, with the attacks that ended so."""
    found: dict[str, list[str]] = {}
    for row in failures:
        if row.get("details"):
            found.setdefault(str(row["details"]), []).append(f"{row.get('attack')} on {row.get('defence')}")
    return [Traceback(text, tuple(dict.fromkeys(attacks))) for text, attacks in found.items()]


def _lost(rows: Sequence[AttackRow], models: int) -> list[Lost]:
    """What crashed, diverged, was skipped or never measured, put together where the reason is the same."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in rows:
        for cell in row.cells:
            if cell.status in {"skipped", "crashed", "diverged", "not measured", "not run"}:
                found.setdefault((cell.status, cell.note), {}).setdefault(row.name, []).append(cell.model)
    made: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    for (what, why), attacks in found.items():
        for attack, on in attacks.items():
            everywhere = len(on) == models > 1
            made.setdefault((what, why, () if everywhere else tuple(on)), []).append(attack)
    return [Lost(what, why, on, tuple(attacks)) for (what, why, on), attacks in made.items()]
