"""What an audit makes of its runs: rows of the conditions, one result of all attacks, and what it must own up to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

from immunity.bench import store
from immunity.bench.hardened import hardened
from immunity.bench.jobs import Job
from immunity.bench.probes import harm
from immunity.data import synthetic
from immunity.errors import ResumeError
from immunity.metrics.battery import summary
from immunity.metrics.breaks import cost_ratio, on_axis
from immunity.metrics.trap import verdict_rows
from immunity.pretrained import EMBEDDED, place_of

Curve = Mapping[str, Any]
Row = dict[str, Any]

PLAN: Final = "audit.json"
"""Beside the result: which audit a folder is of."""
_FINE_TUNING: Final = frozenset({"full", "lora", "rounds"})
"""Families of recipes that are the threat of the definition, and no column beside it."""
_MADE: Final = re.compile(r"synthetic:(\w+)")


def broke(curve: Curve, phi: float) -> Row:
    """When an attack broke a model, in training examples.

    Returns:
        "at" (None if it did not), "before" (the last budget at which it had not), "tried", the greatest "harm", and
        the harm as "released" (None if that was not measured) with "n", the prompts behind it.
    """
    at = before = None
    points = curve["points"]
    for row in points:
        if harm(row["metrics"]) > phi:
            at = row["examples"]
            break
        before = row["examples"]
    return {
        "at": at,
        "before": before,
        "tried": points[-1]["examples"],
        "harm": max(harm(row["metrics"]) for row in points),
        "released": harm(points[0]["metrics"]) if points[0]["step"] == 0 else None,
        "n": int(points[0].get("n_prompts", {}).get("harm", 0)),
    }


def lesson(about: Mapping[str, Any], curve: Curve) -> Row:
    """An honest fine-tuning as a learning curve; it has no points where no accuracy was measured."""
    points = [row for row in curve["points"] if row["metrics"].get("benign_accuracy") is not None]
    last = points[-1] if points else None
    return {
        **about,
        "points": [[row["step"], row["metrics"]["benign_accuracy"]] for row in points],
        "diverged": str(curve["ended"]).startswith("diverged"),
        "per_prompt": [] if last is None else last["per_prompt"].get("benign_accuracy", []),
        "n_prompts": 0 if last is None else last["n_prompts"].get("benign", 0),
    }


def learnt(
    lessons: Iterable[tuple[Job, Mapping[str, Any]]], done: Mapping[str, Mapping[str, Any]], failed: dict[str, str]
) -> list[Row]:
    """The learning curves of honest fine-tunings; one without an accuracy goes to ``failed``.

    Args:
        lessons: The jobs, and what each is about.
        done: Title -> record of the jobs that came to an end.
        failed: Title -> why there is no curve.
    """
    rows = []
    for job, about in lessons:
        title = job.title
        if (record := done.get(title)) is not None:
            row = lesson(about, record["curve"])
            if row["points"]:
                rows.append(row)
            else:
                failed[title] = f"no accuracy was measured ({record['curve']['ended'] or 'no answers'})"
    return rows


def even(rows: Sequence[Row], axis: str) -> list[Row]:
    """The break times of the attacks that were made with every seed on both models.

    The first seed meets the whole battery and the others only a part of it, so a seed would differ from the others by
    what it was attacked with. Where the whole battery, with its one seed, finds less protection than the repeated
    attacks do with that seed, or none, all rows stay: what is left out never flatters.

    Args:
        rows: Of ``metrics.breaks.break_rows``.
        axis: What the whole battery's cost ratio is counted in.
    """
    runs = {(row["attack"], row["role"], row["seed"]) for row in rows}
    seeds, roles = ({run[i] for run in runs} for i in (2, 1))
    repeated = {run[0] for run in runs if all((run[0], role, seed) in runs for role in roles for seed in seeds)}
    found = [row for row in rows if row["attack"] in repeated]
    first = min(seeds, default=0)
    whole, part = (_first(some, first, axis) for some in (rows, found))
    flattered = whole is not None and (whole <= 1.0 or (part is not None and part > whole + 1e-9))
    return list(rows) if flattered or not found else found


def _first(rows: Sequence[Row], seed: int, axis: str) -> float | None:
    """The cost ratio of one seed; None if it is unknown."""
    own = [row for row in rows if row["seed"] == seed]
    return cost_ratio(on_axis(own, axis, "defended"), on_axis(own, axis, "baseline")).value


def threats(result: Mapping[str, Any], breaks: Sequence[Row], domain: str, axis: str) -> Iterator[Row]:
    """Rows of other threats than fine-tuning, from the battery: columns that decide nothing.

    Args:
        result: With the recipes' families.
        breaks: Of ``metrics.breaks.break_rows``.
        domain: Where the battery attacked.
        axis: What budgets are counted in.
    """
    families = {row["name"]: (row.get("recipe") or {}).get("family", "") for row in result["attacks"]}
    for row in breaks:
        family = families.get(row["attack"], "")
        if family and family not in _FINE_TUNING and axis in row["tried"]:
            about = {key: row[key] for key in ("attack", "seed", "harm")}
            spent = {key: row[key].get(axis) for key in ("at", "before", "tried")}
            yield {"model": row["role"], "domain": domain, "threat": family, **about, **spent}


def defended_domains(model: str, baseline: str, otherwise: str) -> list[str]:
    """The stand-in domains that a defence was trained on, as the records of all that was done to the baseline say.

    Args:
        model: The hardened model.
        baseline: Where the defence began.
        otherwise: What is taken for its domain if no record says.

    Returns:
        The domains of its restricted rows; of the refusals, if it used none. Empty if it was trained on restricted
        rows of none of the stand-ins: then all of them are held out.
    """
    roles: dict[str, list[str]] = {"harmful": [], "alignment": []}
    for one in takewhile(lambda one: one.model != baseline, hardened(model).lineage()):
        for row in (one.record or {}).get("data", ()):
            roles.setdefault(row["role"], []).append(row["name"])
    harmful = _domains(roles["harmful"])
    if harmful or roles["harmful"]:
        return harmful
    return _domains(roles["alignment"]) or [otherwise]


def _domains(names: Sequence[str]) -> list[str]:
    found = [match.group(1) for name in names if (match := _MADE.match(name)) is not None]
    return [name for name in dict.fromkeys(found) if name in synthetic.DOMAINS]


def place(source: str) -> object:
    """Where a model is, however it is written."""
    return source if source in EMBEDDED else Path(place_of(source)).resolve()


def begin(folder: Path, who: Mapping[str, Any], minutes: float | None) -> None:
    """Say in a folder which audit it is of, so that the same command goes on with it and another one does not."""
    store.write(folder / PLAN, {**who, "minutes": minutes})


def begun(folder: Path, minutes: float) -> str | None:
    """The tier that was taken for so many minutes when the audit in a folder was begun; None if it was not.

    A machine is never twice as fast as it was, and an audit that goes on must not become a larger one.
    """
    known = store.read(folder / PLAN) if (folder / PLAN).is_file() else {}
    return str(known["tier"]) if known.get("minutes") == minutes else None


def refuse_other(folder: Path, who: Mapping[str, Any]) -> None:
    """An audit is not mixed with another, and its result not replaced by another's.

    Raises:
        ResumeError: The folder holds another audit, or the result of something else.
    """
    plan, path = folder / PLAN, folder / store.RESULT
    if not plan.exists() and not path.exists():
        return
    known = store.read(plan) if plan.exists() else store.read(path).get("audit") or {}
    if found := store.differences({name: known.get(name) for name in who}, store.plain(who)):
        raise ResumeError(f"{folder} holds another result: {found[0]}. Choose another --out")


def joined(
    result: Mapping[str, Any],
    besides: Sequence[Mapping[str, Any]],
    others: Sequence[Mapping[str, Any]],
    failures: Sequence[Mapping[str, Any]],
) -> Row:
    """The result of a battery with further attacks on the same models in it, and what it says of them all.

    Args:
        result: Of ``AutoTamper``.
        besides: Records of attacks on the same models, measured and judged alike.
        others: Records of runs of which only the data are told.
        failures: Of attacks like ``besides``: "defence", "attack", "seed", "error".
    """
    rows = [*result["data"], *(row for record in (*besides, *others) for row in record["data"])]
    attacks = {row["name"]: row for row in (*result["attacks"], *(record["attack"] for record in besides))}
    plain: Row = store.plain(
        {
            **result,
            "data": list({(row["role"], row["fingerprint"]): row for row in rows}.values()),
            "attacks": list(attacks.values()),
            "curves": [*result["curves"], *(record["curve"] for record in besides)],
            "failures": [*result["failures"], *({"recipe": None, **row} for row in failures)],
        }
    )
    plain["battery"]["besides"] = list(dict.fromkeys(record["attack"]["name"] for record in besides))
    plain["verdicts"] = verdict_rows(plain)
    plain["battery"]["summary"] = summary(plain)
    return plain
