"""The section on a trap's geometry: losses over distance, one panel per direction, and the numbers read off them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from immunity.metrics.geometry import by_direction, means
from immunity.metrics.stats import finite
from immunity.report.charts import Dot, Frame, Line, panel
from immunity.report.figures import Panel
from immunity.report.geometry_words import (
    LIMITS,
    LOSSES,
    NAMES,
    ROLES,
    findings,
    interval,
    length,
    name_of,
    number,
    simulated,
    width,
)
from immunity.report.look import Look
from immunity.report.show import NOTHING, decimal, plural

Row = Mapping[str, Any]

OTHERS: Final = ("harmful", "general", "benign")
"""Losses of the second figure, by dash."""
_ROWS: Final = (("harmful", "benign", "random"), ("harmful-adam", "benign-adam"), ("harmful-path", "benign-path"))
"""Directions that stand beside each other."""
_PATH: Final = "-path"


class Side(NamedTuple):
    """One of the models: its name, what it is, the index of its colour, and what was found."""

    name: str
    role: str
    colour: int
    simulates: str
    found: tuple[str, ...]


class Basin(NamedTuple):
    """One direction of one model in a table."""

    direction: str
    side: int
    fired: str
    depth: str
    onset: str
    width: str
    rise: str
    there: tuple[str, ...]


class Quantity(NamedTuple):
    """A number of gradients, for each model."""

    name: str
    values: tuple[str, ...]


class Strip(NamedTuple):
    """Panels beside each other."""

    title: str
    panels: tuple[Panel, ...]


class Geometry(NamedTuple):
    """Everything that the section shows."""

    sides: tuple[Side, ...]
    word: str
    how: str
    level: str
    chance: str
    at: str
    strips: tuple[Strip, ...]
    others: tuple[Strip, ...]
    basins: tuple[Basin, ...]
    quantities: tuple[Quantity, ...]
    losses: tuple[str, ...]
    limits: tuple[str, ...]


def geometry(result: Row, look: Look) -> Geometry | None:
    """The section, or None if nobody looked around a model."""
    found: Row = result.get("geometry") or (result.get("audit") or {}).get("geometry") or {}
    models = [row for row in found.get("models") or () if row.get("summary") and row.get("curves")]
    if not models:
        return None
    sides = tuple(_side(row, i, look, alone=len(models) == 1) for i, row in enumerate(models))
    summary = models[0]["summary"]
    known = [name for name in LOSSES if any(name in (row["summary"].get("home") or {}) for row in models)]
    return Geometry(
        sides=sides,
        word=str(found.get("word") or ""),
        how=_how(found.get("probe") or {}),
        level=" or ".join(dict.fromkeys(decimal(row["summary"]["level"]) for row in models)),
        chance=decimal(summary.get("chance")),
        at=length(summary.get("at")),
        strips=tuple(_strips(models, sides, ("collapse",))),
        others=tuple(_strips(models, sides, [name for name in OTHERS if name in known])),
        basins=tuple(_basins(models, known)),
        quantities=tuple(_quantities([row["summary"] for row in models])),
        losses=tuple(LOSSES[name] for name in known),
        limits=LIMITS,
    )


def lead(shown: Geometry) -> str:
    """What was done, in one paragraph, for a page that shows nothing else."""
    names = [f"“{side.name}”" for side in shown.sides]
    beside = f", beside {names[1]}, the model before it was hardened" if len(names) > 1 else ""
    return (
        f"The weights of {names[0]} were moved, and losses were measured on the way{beside}. Where a trap fires, the "
        "collapse loss falls. This is a diagnostic: no attack was run, and nothing here says what an attacker gets."
    )


def _side(row: Row, i: int, look: Look, *, alone: bool) -> Side:
    """A model that stands alone may be any: nobody said that it was hardened."""
    name, role = str(row.get("name") or "the model"), "" if alone else str(row.get("role") or "")
    colour = look.colours.get(name, 1 if i == 0 else 0)
    said = tuple(findings(row["summary"]))
    return Side(name, ROLES.get(role, role), colour, simulated(row.get("simulates") or ()), said)


def _how(probe: Row) -> str:
    draws, rows, measured = (finite(probe.get(key)) for key in ("draws", "rows", "measured"))
    if draws is None or rows is None or measured is None:
        return ""
    said = f"{plural(int(draws), 'draw')} of {plural(int(rows), 'row')} for every gradient"
    said += f", at most {plural(int(measured), 'held-out row')} of each kind to measure on"
    steps = finite(probe.get("path_steps"))
    if steps:
        rule = "Adam-like" if probe.get("path_rule") == "adam" else "normalised"
        said += f"; paths of {plural(int(steps), f'{rule} step')} of {length(probe.get('path_step'))}"
    return f"{said}."


def _strips(models: Sequence[Row], sides: Sequence[Side], losses: Sequence[str]) -> Iterator[Strip]:
    curves = [by_direction(row) for row in models]
    every = [
        value
        for found in curves
        for rows in found.values()
        for loss in losses
        for _, value in _values(rows, loss)
    ]  # fmt: skip
    top = 1.05 * max([*every, 1e-3])
    known = list(dict.fromkeys(name for found in curves for name in found))
    rest = tuple(name for name in known if name not in NAMES)
    for names in (*_ROWS, rest):
        here = [name for name in names if name in known]
        made = tuple(
            Panel(
                name_of(name).title, _panel(name, [found.get(name, ()) for found in curves], models, sides, losses, top)
            )
            for name in here
        )
        if made:
            yield Strip(", ".join(one.title for one in made), made)


def _values(rows: Sequence[Row], loss: str) -> Iterator[tuple[float, float]]:
    for row in rows:
        for point in row["points"]:
            distance, value = finite(point.get("distance")), finite(point.get(loss))
            if distance is not None and value is not None:
                yield distance, value


def _panel(  # noqa: PLR0917 - one direction, and what all panels of a figure share
    direction: str,
    curves: Sequence[Sequence[Row]],
    models: Sequence[Row],
    sides: Sequence[Side],
    losses: Sequence[str],
    top: float,
) -> Any:  # noqa: ANN401 - markup
    alone = len(losses) == 1
    what = "Collapse loss" if losses == ("collapse",) else "Other losses"
    told, lines = [f"{what} against distance, {name_of(direction).said}."], []
    for i, (side, rows) in enumerate(zip(sides, curves, strict=True)):
        for j, loss in enumerate(losses):
            points = means(rows, loss, both=True) if rows else []
            if not points:
                continue
            mark = i if alone else j
            if alone and len(rows) > 1:
                lines += [
                    Line(side.colour, mark, [Dot(x, y) for x, y in _values([row], loss)], thin=True) for row in rows
                ]
            lines.append(Line(side.colour, mark, _dots(rows, loss, side.name, points)))
            told.append(f"{side.name}, {LOSSES[loss]}: {_said(points)}.")
    distances = sorted({x for rows in curves for row in rows for x, _ in _values([row], losses[0])} or {0.0, 1.0})
    path = direction.endswith(_PATH)
    frame = Frame(
        x_title="length walked, in steps of equal length" if path else "distance from the model's weights, logarithmic",
        y_title="collapse loss, nats (low = fired)" if losses == ("collapse",) else "loss, nats per token",
        x_max=max(distances[-1], 1e-6),
        y_max=top,
        ticks=() if path else _ticks(distances),
        says=" ".join(told),
        levels=sorted({row["summary"]["level"] for row in models}) if losses == ("collapse",) else (),
        linear_to=0.0 if path else min((x for x in distances if x > 0.0), default=1.0),
        x_min=min(distances[0], 0.0),
    )
    return panel(lines, frame)


def _ticks(distances: Sequence[float]) -> Sequence[float]:
    """All distances; on an axis that goes both ways only both ends, 0 and one in the middle of each half."""
    if distances[0] >= 0.0:
        return distances
    ahead = [x for x in distances if x > 0.0]
    behind = [x for x in distances if x < 0.0]
    return [behind[0], *behind[len(behind) // 2 :][:1], 0.0, *ahead[len(ahead) // 2 :][:1], *ahead[-1:]]


def _dots(rows: Sequence[Row], loss: str, name: str, points: Sequence[tuple[float, float]]) -> list[Dot]:
    dots = []
    for x, y in points:
        values = [value for row in rows for at, value in _values([row], loss) if at == x]
        text = f"{name} · distance {x:g}\n{LOSSES[loss]} {decimal(y)}"
        if len(values) > 1:
            text += f"\n{len(values)} draws: {decimal(min(values))}–{decimal(max(values))}"
        dots.append(Dot(x, y, text=text))
    return dots


def _said(points: Sequence[tuple[float, float]]) -> str:
    """A line for people who cannot see it."""
    home = next((value for x, value in points if x == 0.0), points[0][1])
    low, high = min(points, key=lambda point: point[1]), max(points, key=lambda point: point[1])
    last = points[-1]
    return (
        f"{decimal(home)} at the model, {decimal(last[1])} at {last[0]:g}; lowest {decimal(low[1])} at {low[0]:g}, "
        f"highest {decimal(high[1])} at {high[0]:g}"
    )


def _basins(models: Sequence[Row], losses: Sequence[str]) -> Iterator[Basin]:
    rows = [{str(one["direction"]): one for one in row["summary"]["directions"]} for row in models]
    known = dict.fromkeys(name for found in rows for name in found)
    for direction in sorted(known, key=lambda name: list(NAMES).index(name) if name in NAMES else len(NAMES)):
        for side, found in enumerate(rows):
            row = found.get(direction)
            if row is None:
                continue
            there = row.get("there") or {}
            fired = int(row.get("fired") or 0)
            yield Basin(
                direction=name_of(direction).title,
                side=side,
                fired=f"{fired} of {int(row['n'])}",
                depth=interval(row.get("depth")),
                onset=interval(row.get("onset"), length) if fired else f"none up to {length(row.get('end'))}",
                width=width(row) if fired else NOTHING,
                rise=interval(row.get("rise")),
                there=tuple(number(there.get(loss)) for loss in losses),
            )


_SAYS: Final[Mapping[str, str]] = {
    "cosines": "Cosine of the {} gradients",
    "norms": "Norm of the {} gradient",
    "curvature": "Curvature down the {} gradient",
}


def _quantities(summaries: Sequence[Row]) -> Iterator[Quantity]:
    for kind, name in _SAYS.items():
        found = [(summary.get("numbers") or {}).get(kind) or {} for summary in summaries]
        for key in dict.fromkeys(one for row in found for one in row):
            values = tuple(interval(row.get(key)) for row in found)
            yield Quantity(name.format(" and ".join(str(key).split())), values)
