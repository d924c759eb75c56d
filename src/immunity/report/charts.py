"""One panel: a Vega-Lite specification that vl-convert draws, once, as an SVG coloured by the page's CSS variables.

Drawn here and not in the browser: no script to run or to trust, no 0.9 MB of Vega in every page, the same picture on
paper and without JavaScript, and light and dark follow the reader's choice at once because every colour is a variable
of ``page.css``. Vega escapes the text that it draws; the page's tests send it hostile names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import vl_convert
from markupsafe import Markup, escape

from immunity.report.look import COLOURS, DASHES, SHAPES

WIDTH: Final = 344
HEIGHT: Final = 232
TICK_ROOM: Final = 22
"""Pixels between two labels on the x axis."""
DECIMAL_ROOM: Final = 30
"""The same between labels such as "0.02"."""
VEGA_LITE: Final = "5.20"
"""The version of the language; every vl-convert since 1.7 draws it."""

LAYERS: Final = ("level", "thin", "spans", "bold", "dots")
"""What is drawn, from the back to the front."""

Spec = dict[str, Any]
_ROOT: Final = re.compile(r"^<svg[^>]*>")
_GEOMETRY: Final = re.compile(r' (?:d|transform|[xy]2)="[^"]*"')
_UNSTROKED: Final = re.compile(r'( fill="var\(--d\d\)") stroke-width="2"')
_NOTHING: Final = re.compile(
    r'<path class="(?:back|fore)ground" aria-hidden="true" d=""[^>]*/>|'
    r' role="graphics-object" aria-roledescription="[^"]*"'
)
_SHORT: Final = (
    "datum.value >= 1e6 ? datum.value / 1e6 + 'M' : datum.value >= 1e3 ? datum.value / 1e3 + 'k' : datum.value"
)
"""A Vega expression: 20000 as "20k"."""
_DECIMALS: Final = re.compile(r"(\.\d)\d+")


class Dot(NamedTuple):
    """A point of a line: where it is, its interval if it has one, what a reader is told there."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    text: str = ""


class Line(NamedTuple):
    """A line of a panel.

    Attributes:
        colour: Index of ``--d0`` … in ``page.css``.
        mark: Index of its dash and shape.
        dots: In the order of x.
        thin: A single seed behind a mean: no dots are drawn.
    """

    colour: int
    mark: int
    dots: Sequence[Dot]
    thin: bool = False


class Frame(NamedTuple):
    """What is around the lines.

    Attributes:
        x_title: In words, with the unit.
        y_title: In words, with the direction that matters.
        x_max: The end of the x axis.
        y_max: The end of the y axis.
        ticks: Where to put ticks on x; empty: Vega chooses, on a linear scale; else the scale is symmetric-log.
        says: The whole panel in words, for people who cannot see it.
        line_at: A dotted level across the panel, or None.
        levels: More of them.
        least: 0, or the least budget of an axis of budgets: lines are then steps, because a budget buys what a smaller
            one bought until it buys more, the scale is symmetric-log from there on, and labels are short ("20k").
        linear_to: Where an axis of small numbers ("0.05") becomes logarithmic; 0 on every other axis.
        x_min: The beginning of the x axis: 0, or less.
    """

    x_title: str
    y_title: str
    x_max: float
    y_max: float
    ticks: Sequence[float]
    says: str
    line_at: float | None = None
    levels: Sequence[float] = ()
    least: float = 0.0
    linear_to: float = 0.0
    x_min: float = 0.0


def panel(lines: Sequence[Line], frame: Frame) -> Markup:
    """The panel as an SVG element, ready to stand in HTML."""
    svg = vl_convert.vegalite_to_svg(specification(lines, frame), vl_version=VEGA_LITE)
    root = (
        f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'role="img" aria-label="{escape(frame.says)}">'
    )
    return Markup(_lean(_ROOT.sub(lambda _: root, svg, count=1)))


def specification(lines: Sequence[Line], frame: Frame) -> Spec:
    """The panel in Vega-Lite."""
    rows = _rows(lines, frame)
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "width": WIDTH,
        "height": HEIGHT,
        "autosize": {"type": "fit", "contains": "padding"},
        "config": _config(),
        "datasets": {name: found for name, found in rows.items() if found},
        "layer": [_layer(name, frame) for name in LAYERS if rows[name]],
    }


def _lean(svg: str) -> str:
    """The same picture in fewer bytes: a tenth of a pixel is enough, the marks of an image need no roles.

    What is the default, or the page's own font, is left out.
    """
    svg = svg.replace(' role="graphics-symbol" aria-roledescription="point"', ' class="dot"')
    for needless in (
        ' opacity="1"',
        ' stroke-width="1"',
        ' font-family="system-ui, sans-serif"',
        ' pointer-events="none"',
    ):
        svg = svg.replace(needless, "")
    svg = _NOTHING.sub("", svg)
    svg = _UNSTROKED.sub(r"\1", svg)
    return _GEOMETRY.sub(lambda found: _DECIMALS.sub(r"\1", found[0]), svg)


def _rows(lines: Sequence[Line], frame: Frame) -> dict[str, list[Spec]]:
    """The data of each layer."""
    rows: dict[str, list[Spec]] = {name: [] for name in LAYERS}
    rows["level"] = [{"y": level} for level in (frame.line_at, *frame.levels) if level is not None]
    for i, line in enumerate(lines):
        for dot in line.dots:
            row = {"x": dot.x, "y": dot.y, "c": str(line.colour), "m": str(line.mark)}
            rows["thin" if line.thin else "bold"].append({**row, "line": i})
            if dot.text:
                rows["dots"].append({**row, "t": dot.text})
            if dot.low is not None:
                rows["spans"].append({**row, "low": dot.low, "high": dot.high})
    return rows


def _layer(name: str, frame: Frame) -> Spec:
    """One layer: its mark and what of its rows the mark shows."""
    x, y = _axes(frame)
    channels = {"x": x, "y": y, "color": _scaled("c", [f"var(--d{i})" for i in range(COLOURS)])}
    stroke: Spec = {"type": "line", "aria": False, "strokeJoin": "round"}
    if frame.least:
        stroke["interpolate"] = "step-after"
    dash = {**channels, "strokeDash": _scaled("m", DASHES), "detail": {"field": "line", "type": "nominal"}}
    mark, encoding = {
        "level": ({"type": "rule", "aria": False, "strokeDash": [1, 3], "color": "var(--ink-3)"}, {"y": y}),
        "thin": ({**stroke, "strokeWidth": 1, "opacity": 0.4}, dash),
        "spans": (
            {"type": "rule", "aria": False, "opacity": 0.28, "strokeWidth": 1.6},
            {**channels, "y": {**y, "field": "low"}, "y2": {"field": "high"}},
        ),
        "bold": ({**stroke, "strokeWidth": 2.2}, dash),
        "dots": (
            {"type": "point", "filled": True, "size": 34, "opacity": 1},
            {**channels, "shape": _scaled("m", SHAPES), "description": {"field": "t", "type": "nominal"}},
        ),
    }[name]
    return {"data": {"name": name}, "mark": mark, "encoding": encoding}


def _axes(frame: Frame) -> tuple[Spec, Spec]:
    """The x and y channels."""
    x: Spec = {"field": "x", "type": "quantitative", "title": frame.x_title}
    y: Spec = {"field": "y", "type": "quantitative", "title": frame.y_title}
    x["axis"] = {"labelFlush": False, "grid": False}
    x["scale"] = {"domain": [frame.x_min, frame.x_max], "nice": False}
    if frame.ticks:  # beside "values", a "tickCount" would make Vega drop every other one
        constant = frame.least or frame.linear_to or 1
        room = DECIMAL_ROOM if frame.linear_to else TICK_ROOM
        x["axis"] |= {"values": _apart(frame.ticks, frame.x_max, constant, room), "labelOverlap": False}
        x["scale"] |= {"type": "symlog", "constant": constant}
        x["axis"] |= {"labelExpr": _SHORT} if frame.least else {"format": "~g" if frame.linear_to else "d"}
    else:
        x["axis"]["tickCount"] = 6
    share = frame.y_max == 1
    y["axis"] = {"values": [0, 0.2, 0.4, 0.6, 0.8, 1]} if share else {"tickCount": 5}
    y["scale"] = {"domain": [0, frame.y_max], "nice": not share}
    return x, y


def _apart(ticks: Sequence[float], end: float, constant: float, room: int) -> list[float]:
    """The ticks whose labels do not touch on a symmetric-log axis; the last one always stays, as do those below 0."""
    place = {tick: WIDTH * math.log1p(tick / constant) / math.log1p(end / constant) for tick in ticks if tick >= 0}
    below, ticks = [tick for tick in ticks if tick < 0], list(place)
    kept = [ticks[-1]]
    for tick in reversed(ticks[:-1]):
        if place[kept[0]] - place[tick] > room:
            kept.insert(0, tick)
    return below + kept


def _scaled(field: str, looks: Sequence[Any]) -> Spec:
    """A channel whose values are indices into ``looks``; the page has the legend."""
    scale = {"domain": [str(i) for i in range(len(looks))], "range": list(looks)}
    return {"field": field, "type": "nominal", "legend": None, "scale": scale}


def _config() -> Spec:
    """Colours and sizes of everything that is not data."""
    text = {"labelColor": "var(--ink-2)", "titleColor": "var(--ink-2)", "titleFontWeight": "normal"}
    sizes = {"labelFontSize": 11, "titleFontSize": 11.5, "titlePadding": 6, "tickSize": 4}
    lines = {"gridColor": "var(--line)", "domainColor": "var(--ink-3)", "tickColor": "var(--ink-3)"}
    return {
        "background": "transparent",
        "font": "system-ui, sans-serif",
        "padding": 4,
        "view": {"stroke": "transparent"},
        "axis": {**text, **sizes, **lines},
    }
