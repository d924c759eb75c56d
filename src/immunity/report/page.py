"""A result becomes one HTML page that needs nothing else: no network, no file beside it, no script to be readable.

Everything that a model, a user or a data set wrote is escaped by jinja2; charts are drawn as SVG here (``charts.py``);
the page's own few lines of script and its style sheet are named by their SHA-256 in a Content-Security-Policy that
forbids everything else, so text that somehow became markup still could not run, load or send anything.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, cast

import jinja2
from markupsafe import Markup

from immunity.errors import DataError
from immunity.metrics.curves import curves
from immunity.metrics.trap import by_pair, judge_all
from immunity.metrics.unscored import holed
from immunity.metrics.verdict import Thresholds
from immunity.report import geometry as around
from immunity.report import show
from immunity.report.audit import audit
from immunity.report.audit_words import SEEN
from immunity.report.battery import battery, summed
from immunity.report.clean import cleaned, script_json, spelt_out
from immunity.report.figures import figures, folded
from immunity.report.logs import logs
from immunity.report.look import DASHES, DATA, THREAT_NAMES, look
from immunity.report.samples import groups
from immunity.report.tables import costs, numbers, prompts, verdict_table, worst_pairs
from immunity.report.words import caveats, findings, lead

SCHEMA: Final = 1


def render(result: Mapping[str, Any], thresholds: Thresholds | None = None) -> str:
    """The page of a result, as in the schema of ``result.json``. The same result always gives the same page.

    Args:
        result: Missing keys, missing metrics, NaN and infinities are fine: the page says what was not measured.
        thresholds: Where verdicts begin; the defaults if None.

    Raises:
        DataError: The result has another schema, or its curves cannot be read.
    """
    if result.get("schema", SCHEMA) != SCHEMA:
        raise DataError(
            f"result has schema {result.get('schema')!r}, but this version reads {SCHEMA}; "
            "make the page with the version of immunity that wrote the result"
        )
    data = _complete(cast("dict[str, Any]", cleaned(_light(result))))
    context = _context(cast("dict[str, Any]", spelt_out(data)), thresholds or Thresholds())
    return _environment().get_template("page.html").render(context, json=script_json(_numbers_only(data)))


def write(result: Mapping[str, Any], path: Path | str, thresholds: Thresholds | None = None) -> Path:
    """Write the page beside ``path`` and rename it there, so that a reader never sees half a page.

    Raises:
        DataError: See :func:`render`.
        OSError: The folder cannot be written.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(target.name + ".tmp")
    beside.write_bytes(render(result, thresholds).encode())
    return beside.replace(target)


def _light(result: Mapping[str, Any]) -> dict[str, Any]:
    """The result without its values per prompt: only the battery's summary needs them, and they are most of a file.

    Those of a judge that left answers without a score stay, as the page says what these could hide.
    """
    kept = [
        {**row, "points": [holed(point) for point in row.get("points") or []]} for row in result.get("curves") or []
    ]
    found = summed(result)
    given = {} if found is None else {"battery": {**result["battery"], "summary": found}}
    return {**result, **({"curves": kept} if "curves" in result else {}), **given}


def _complete(data: dict[str, Any]) -> dict[str, Any]:
    """The result with every top-level key of the schema, and a name for each defence and attack."""
    whole = {key: data.get(key) or [] for key in ("data", "curves", "verdicts", "limits", "failures", "skipped")}
    for key in ("defences", "attacks"):
        whole[key] = [{**row, "name": str(row.get("name") or "unnamed")} for row in data.get(key) or []]
    facts = {key: data.get(key) for key in ("title", "command", "created", "seconds")}
    return {
        "schema": SCHEMA,
        **facts,
        "model": data.get("model") or {},
        "versions": data.get("versions") or {},
        "battery": data["battery"] if isinstance(data.get("battery"), Mapping) else {},
        **{key: data[key] for key in ("audit", "geometry") if isinstance(data.get(key), Mapping)},
        **whole,
    }


def _numbers_only(data: Mapping[str, Any]) -> dict[str, Any]:
    """The result without its sample answers: the page shows some of them, and all would make it heavy."""
    kept = [
        {**row, "points": [{k: v for k, v in point.items() if k != "samples"} for point in row.get("points") or []]}
        for row in data["curves"]
    ]
    return {**data, "curves": kept}


def _context(data: dict[str, Any], limits: Thresholds) -> dict[str, Any]:
    """Everything that the templates read."""
    read = curves(data)
    verdicts = judge_all(data, limits)
    pairs = by_pair(verdicts)
    style = look(data, read)
    told = {(str(row.get("defence")), str(row.get("attack"))): str(row.get("text")) for row in data["verdicts"]}
    table = verdict_table(read, pairs, style, told)
    few = () if style.many else read
    shape = around.geometry(data, style)
    alone = shape is not None and not read and "audit" not in data
    return {
        "data": data,
        "audit": audit(data, style),
        "seen": SEEN,
        "battery": battery(data, style),
        "title": str(data["title"] or "What the attack did to the trap"),
        "geometry": shape,
        "alone": alone,
        "lead": around.lead(shape) if shape is not None and alone else lead(data, read, style),
        "findings": findings(worst_pairs(pairs), read, style),
        "verdicts": table,
        "n_prompts": prompts(table),
        "figures": figures(few, style),
        "folded": folded(read, style) if style.many else [],
        "logs": logs(data["defences"], style),
        "samples": groups(read, verdicts, style),
        "numbers": numbers(read, style),
        "costs": costs(data["defences"], style),
        "caveats": shape.limits if shape is not None and alone else caveats(data, read, style),
        "attack_seeds": sorted({curve.seed for curve in read}),
        "many_seeds": len({curve.seed for curve in read}) > 1,
        "look": style,
        "dashes": DASHES,
        "threats": THREAT_NAMES,
        "uses": DATA,
        "limits": asdict(limits),
        "css": Markup(_text("page.css")),
        "js": Markup(_text("page.js")),
        "policy": _policy(),
    }


@cache
def _text(name: str) -> str:
    """A file of this package, with the line ends that its hash is taken over."""
    return files("immunity.report").joinpath(name).read_text(encoding="utf-8").replace("\r\n", "\n")


def _policy() -> str:
    """Nothing may be loaded, sent or run, except the page's own script and style, known by their hashes."""
    script, style = (
        base64.b64encode(hashlib.sha256(_text(name).encode()).digest()).decode() for name in ("page.js", "page.css")
    )
    return (
        f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _grouped(rows: Sequence[Any], attribute: str) -> list[tuple[str, list[Any]]]:
    """(value, rows that have it), in the order in which the values first appear."""
    found: dict[str, list[Any]] = {}
    for row in rows:
        found.setdefault(row._asdict()[attribute], []).append(row)
    return list(found.items())


@cache
def _environment() -> jinja2.Environment:
    """Templates from this package, everything escaped, an unknown name an error."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_text),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        count=show.count,
        decimal=show.decimal,
        duration=show.duration,
        groupby_in_order=_grouped,
        parameters=show.parameters,
        setting=show.setting,
    )
    return environment
