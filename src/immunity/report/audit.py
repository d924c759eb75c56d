"""The section of an audit: four conditions, what their claims are made of, and what made them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from immunity.metrics.conclusion import UNITS
from immunity.metrics.stats import finite
from immunity.report import scorecard
from immunity.report.audit_figures import ROLES, Forest, LessonPanel, Pair, Survival, forests, lessons, survival, tone
from immunity.report.audit_judges import Judge, Judges, agreement, judged
from immunity.report.audit_overlaps import Overlap, overlaps
from immunity.report.audit_words import CONDITIONS, VERDICTS, ClaimRow, claim_row, ends, verdict_of
from immunity.report.battery import MAIN, FlagGroup, flag_groups
from immunity.report.look import Look
from immunity.report.show import NOTHING, budget, decimal, duration, plural

Row = Mapping[str, Any]

SHOWN: Final = 4
"""Claims of a card that are shown at once; the others are folded."""

FINE_TUNING: Final = "sft"


class Card(NamedTuple):
    """One condition.

    Attributes:
        name: Its name.
        title: The same as a heading.
        question: What it asks.
        verdict: A key of ``VERDICTS``.
        tone: Of the verdict.
        sign: Of the verdict.
        says: The sentence.
        notes: What else is known of it.
        first: The claims that decide.
        others: The other claims.
    """

    name: str
    title: str
    question: str
    verdict: str
    tone: str
    sign: str
    says: str
    notes: tuple[str, ...]
    first: tuple[ClaimRow, ...]
    others: tuple[ClaimRow, ...]

    @property
    def counts(self) -> str:
        """How many claims have which verdict."""
        every = [claim.verdict for claim in (*self.first, *self.others)]
        return ", ".join(f"{every.count(name)} {name}" for name in VERDICTS if name in every)


class Side(NamedTuple):
    """One model in one cell of the matrix."""

    tone: str
    sign: str
    broke: str
    harm: str


class Cell(NamedTuple):
    """One domain under one threat."""

    domain: str
    threat: str
    defence: str
    held_out: bool
    sides: tuple[Side, Side]
    tone: str
    ratio: str
    interval: str
    carried: ClaimRow | None


class Audit(NamedTuple):
    """Everything that the section shows."""

    pair: Pair
    tier: str
    domain: str
    minutes: str
    cards: tuple[Card, ...]
    supports: tuple[str, ...]
    cannot: tuple[str, ...]
    survival: Survival | None
    forests: tuple[Forest, ...]
    matrix: tuple[Cell, ...]
    threats: tuple[Cell, ...]
    lessons: tuple[LessonPanel, ...]
    again: tuple[LessonPanel, ...]
    judged: tuple[Judge, ...]
    judges: tuple[Judges, ...]
    flags: tuple[FlagGroup, ...]
    flags_at: str
    overlaps: tuple[Overlap, ...]


def audit(result: Row, look: Look) -> Audit | None:
    """The section, or None if the result is no audit's."""
    found = result.get("audit")
    if not isinstance(found, Mapping) or not found:
        return None
    model, baseline = str(found.get("model") or "the model"), str(found.get("baseline") or "the baseline")
    pair = Pair(model, baseline, look.colours.get(model, 1), look.colours.get(baseline, 0))
    rows = scorecard.conditions(found)
    resisting = rows["resistance"].get("details") or {}
    cells = _cells(rows["generalisation"])
    learnt = lessons(rows["trainability"], pair)
    return Audit(
        pair=pair,
        tier=str(found.get("tier") or ""),
        domain=str(found.get("domain") or ""),
        minutes=duration(60.0 * found["minutes"]) if finite(found.get("minutes")) else "",
        cards=tuple(_card(name, row) for name, row in rows.items()),
        supports=tuple(map(str, found.get("supports") or ())),
        cannot=tuple(map(str, found.get("cannot") or ())),
        survival=survival(rows["resistance"], pair),
        forests=tuple(forests(list(rows.values()))),
        matrix=tuple(cell for cell in cells if cell.threat == FINE_TUNING),
        threats=tuple(cell for cell in cells if cell.threat != FINE_TUNING),
        lessons=tuple(one for one in learnt if not one.again),
        again=tuple(one for one in learnt if one.again),
        judged=tuple(judged(found)),
        judges=tuple(agreement(found, result)),
        flags=tuple(flag_groups(found.get("flags") or resisting.get("flags") or ())),
        flags_at=_flags_at(result, model),
        overlaps=tuple(overlaps(found, rows["generalisation"])),
    )


def _flags_at(result: Row, model: str) -> str:
    """The id of the model's flags in the battery's section, or ""."""
    summed = (result.get("battery") or {}).get("summary") or {}
    for i, row in enumerate(summed.get("models") or (), 1):
        if row.get("model") == model and row.get("flags"):
            return f"flags-{i}"
    return ""


def _card(name: str, row: Row) -> Card:
    verdict = verdict_of(row)
    told = scorecard.claims(row)
    return Card(
        name=name,
        title=name.capitalize(),
        question=CONDITIONS[name],
        verdict=verdict,
        tone=VERDICTS[verdict][0],
        sign=VERDICTS[verdict][1],
        says=str(row.get("says") or ""),
        notes=tuple(_notes(row.get("details") or {})),
        first=tuple(told if len(told) <= SHOWN + 1 else told[:SHOWN]),
        others=tuple(() if len(told) <= SHOWN + 1 else told[SHOWN:]),
    )


def _notes(details: Row) -> list[str]:
    """What a condition says beside its claims."""
    said = []
    strength = str(details.get("strength") or "")
    if strength and strength != "not shown":
        said.append(f"{strength[0].upper()}{strength[1:]}.")
    for key, before in (("t_star", "First above what is tolerated at "), ("t_max", "Tried up to T_max = ")):
        known = details.get(key) or {}
        spent = [f"{budget(known[axis])} {UNITS[axis]}" for axis in MAIN if finite(known.get(axis)) is not None]
        said += [f"{before}{', '.join(spent)}."] if spent else []
    for row in details.get("perplexity_ratio") or ():
        interval = f"{decimal(row['low'])}–{decimal(row['high'])}"
        said.append(f"Perplexity on {row['task']}: {decimal(row['value'])} × [{interval}] of the baseline's.")
    for row in details.get("kl") or ():
        interval = ends(row.get("low"), row.get("high"), "nats").replace("+", "")
        said.append(f"KL on {row['task']}: {row['value']:.3f} nats per token [{interval}], reported only.")
    if score := details.get("score"):
        said.append(f"Score: {score['value']:.0%} of the protection in the worst held-out domain, {score['domain']}.")
    return said


def _cells(condition: Row) -> list[Cell]:
    carried = {
        (str(details.get("defence") or ""), str(details["domain"])): told
        for claim, told in zip(condition.get("claims") or (), _in_order(condition), strict=True)
        if (details := claim.get("details") or {}).get("domain") is not None
    }
    made = []
    for row in (condition.get("details") or {}).get("matrix") or ():
        ratio, threat = row.get("ratio") or {}, str(row.get("threat") or FINE_TUNING)
        domain, defence = str(row.get("domain")), str(row.get("defence") or "")
        held_out = bool(row.get("held_out"))
        mine, theirs = (_side(row.get(role) or {}) for role in ROLES)
        value, bound = finite(ratio.get("value")), str(ratio.get("bound") or "=")
        told = NOTHING if value is None else f"{'' if bound == '=' else bound + ' '}{value:.3g} ×"
        made.append(
            Cell(
                domain=domain,
                threat=threat,
                defence=defence,
                held_out=held_out,
                sides=(mine, theirs),
                tone=tone(value),
                ratio=told,
                interval=ends(ratio.get("low"), ratio.get("high"), "ratio"),
                carried=carried.get((defence, domain)) if threat == FINE_TUNING else None,
            )
        )
    return made


def _in_order(condition: Row) -> list[ClaimRow]:
    return [claim_row(str(condition.get("name")), claim) for claim in condition.get("claims") or ()]


def _side(side: Row) -> Side:
    """Where it broke, "broke at 64–128, 2 of 3 runs", or how far it went without."""
    at, tried = list(side.get("at") or ()), [one for one in side.get("tried") or () if finite(one) is not None]
    harm = "" if finite(side.get("harm")) is None else f"harm {decimal(side['harm'])}"
    if not tried:
        return Side("plain", "–", "not attacked", harm)
    broke = sorted(one for one in at if finite(one) is not None)
    if not broke:
        return Side("good", "✓", f"not broken at {budget(max(tried))}", harm)
    place = budget(broke[0]) if broke[0] == broke[-1] else f"{budget(broke[0])}–{budget(broke[-1])}"
    some = "" if len(broke) == len(at) else f", {len(broke)} of {plural(len(at), 'run')}"
    return Side("bad", "✕", f"broke at {place}{some}", harm)
