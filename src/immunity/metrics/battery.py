"""What a battery of attacks found: everything that a page, an audit or a gate needs to say of it, as plain data.

``summary(result)`` reads ``attacks``, ``curves``, ``failures``, ``skipped`` and ``result["battery"]``: ``name``,
``version``, ``phi``, ``models`` (rows with ``model`` and ``role``, "defended" or "baseline"), ``metric`` (optional)
and the evidence of :mod:`immunity.metrics.flags`. Without ``models`` the baseline is the first defence whose method is
"sft". Whatever was not measured is None or an empty list; nothing is made up for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final, NamedTuple

from immunity.checks import MARGIN
from immunity.metrics import budget
from immunity.metrics.budget import Break, Checkpoint, Envelope, Ratio
from immunity.metrics.conclusion import Findings, conclude, state
from immunity.metrics.curves import AXES, Curve, asked, curves, released
from immunity.metrics.flags import Scene, flags
from immunity.metrics.runs import attack_rows, names_run
from immunity.metrics.stats import Interval, finite
from immunity.metrics.worst import Best, Portfolio, again, best_single, portfolio

HARM: Final = ("useful_harm", "harm")
"""What a battery is judged by: the first of them that any curve measured."""

ABILITY: Final = ("general_accuracy", "coherence")
"""What stands for general ability: the first of them that the reference measured."""

BASELINE_METHOD: Final = "sft"


class Settings(NamedTuple):
    """What holds for all models of a result.

    Attributes:
        phi: Least tolerance; a model that was released with more harm than that has its own.
        metric: The harm; "" if none was measured.
        baselines: Names of undefended models.
        baseline: The first of them that was attacked, or "".
    """

    phi: float
    metric: str
    baselines: tuple[str, ...]
    baseline: str


class Part(NamedTuple):
    """One model with its numbers; see :func:`summary` for their names."""

    model: str
    curves: Sequence[Curve]
    phi: float
    start: float | None
    ability: str
    reference: float | None
    points: tuple[Checkpoint, ...]
    envelopes: tuple[Envelope, ...]


def summary(result: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that a battery says, JSON-plain.

    Returns:
        ``name``, ``version``, ``against`` (the mechanisms that attacks were derived from), ``phi`` (the least of any
        model), ``metric`` and ``models``, each:

        * ``model``, ``role`` ("defended" or "baseline"), ``phi``, ``released`` (harm at step 0), ``asked`` (how it was
          asked then: "plain", or the styles of all its curves where none asks plainly), ``state``, ``verdict`` (one
          sentence);
        * ``ability``: ``metric``, ``released``, ``reference`` (what ε is relative to), ``of`` (whose that is);
        * ``w1``: ``value``, ``low``, ``high``, ``attack``, ``seed``, ``step``, ``unit``, ``harm``, ``ability``, ``of``
          (models compared), and ``artefact`` and ``recipe``: ``value``, ``low``, ``high``, ``seeds``, or None;
        * ``w2``: ``value``, ``low``, ``high``, ``any_checkpoint``, ``attacks`` (how many), ``names``, ``prompts``;
        * ``breaks``: ``epsilon``, ``axis``, ``phi``, ``at``, ``decisive_at`` (where the interval's lower end is above
          φ), ``censored_at``, ``attack``, ``step``, ``value``, ``vacuous`` (the model as released fails this ε);
        * ``ratio``: ``axis``, ``epsilon``, ``phi``, ``value``, ``bound`` ("=", "≥", "≤", "unknown"), ``against``;
        * ``envelope``: axis -> ε -> [[budget, F], …]; ``area``: axis -> mean of F over log budgets, at ε = 1;
          ``phi_curve``: axis -> [[φ, t* or None], …], at ε = 1;
        * ``attacks``: one row for each attack and seed, see :func:`immunity.metrics.runs.attack_rows`;
        * ``flags``: ``number``, ``name``, ``says``, ``value``, ``limit``, ``where``, ``forbids``.

    Raises:
        DataError: The curves cannot be read.
    """
    read = curves(result)
    given = result.get("battery") or {}
    phi, undefended = finite(given.get("phi")), _baselines(given, result)
    settings = Settings(
        phi=budget.TOLERATED if phi is None else phi,
        metric=_metric(given, read),
        baselines=undefended,
        baseline=next((name for name in undefended if any(curve.defence == name for curve in read)), ""),
    )
    parts = {name: _part(name, read, settings) for name in _models(result, read)}
    return {
        "name": str(given.get("name") or ""),
        "version": given.get("version"),
        "against": list(given.get("against") or ()),
        "phi": settings.phi,
        "metric": settings.metric,
        "models": [_model(part, parts.get(settings.baseline), result, settings) for part in parts.values()],
    }


def _model(part: Part, baseline: Part | None, result: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """One model's row."""
    mine = part.curves
    best, pool = best_single(mine, settings.metric), portfolio(mine, settings.metric)
    raised = flags(
        Scene(
            model=part.model,
            curves=mine,
            baseline=baseline.curves if baseline is not None else (),
            attacks={str(row.get("name")): row for row in result.get("attacks") or ()},
            metric=settings.metric,
            low=max(MARGIN, part.phi),
            evidence=result.get("battery") or {},
        )
    )
    found = Findings(
        metric=settings.metric,
        phi=part.phi,
        start=part.start,
        best=best,
        pool=pool,
        breaks={one.axis: _surest(one, part.phi) for one in part.envelopes if one.epsilon == 1.0},
        rows=attack_rows(part.model, mine, result, settings.metric, part.phi),
        flags=raised,
        alone=baseline is None,
        recipe=None if best is None else again(mine, settings.metric, best, "recipe"),
    )
    defended = part.model not in settings.baselines
    return {
        "model": part.model,
        "role": "defended" if defended else "baseline",
        "phi": part.phi,
        "released": part.start,
        "asked": asked(mine),
        "state": state(found).value,
        "verdict": conclude(found),
        "ability": {
            "metric": part.ability,
            "released": released(mine).get(part.ability),
            "reference": part.reference,
            "of": part.model if baseline is None else baseline.model,
        },
        "w1": None if best is None else _w1(best, part, settings.metric),
        "w2": None if pool is None else _w2(pool),
        "breaks": [_break(one, part) for one in part.envelopes],
        "ratio": _ratios(part, baseline) if defended and baseline is not None else [],
        "envelope": {
            axis: {str(one.epsilon): one.steps for one in part.envelopes if one.axis == axis} for axis in _axes(part)
        },
        "area": {one.axis: one.area() for one in part.envelopes if one.epsilon == 1.0},
        "phi_curve": {one.axis: budget.phi_curve(one) for one in part.envelopes if one.epsilon == 1.0},
        "attacks": list(found.rows),
        "flags": [asdict(flag) for flag in raised],
    }


def _part(model: str, read: Sequence[Curve], settings: Settings) -> Part:
    """A model's curves, tolerance and envelopes. The reference of its ability is the baseline, where there is one."""
    mine = [curve for curve in read if curve.defence == model]
    sound = released([curve for curve in read if curve.defence == settings.baseline]) or released(mine)
    ability = next((name for name in ABILITY if name in sound), "")
    start = released(mine).get(settings.metric)
    points = budget.checkpoints(mine, settings.metric, ability)
    known = [axis for axis in AXES if any(axis in point.cost for point in points)]
    epsilons = budget.EPSILONS if ability else (1.0,)
    return Part(
        model=model,
        curves=mine,
        phi=budget.tolerated(start, settings.phi),
        start=start,
        ability=ability,
        reference=sound.get(ability),
        points=points,
        envelopes=tuple(
            budget.envelope(points, axis, epsilon=epsilon, reference=sound.get(ability))
            for axis in known
            for epsilon in epsilons
        ),
    )


def _axes(part: Part) -> list[str]:
    return list(dict.fromkeys(one.axis for one in part.envelopes))


def _surest(found: Envelope, phi: float) -> Break:
    """Where the interval says that it broke; if it nowhere does, where the value says so."""
    sure = found.breaks(phi, decisive=True)
    return found.breaks(phi) if sure.at is None else sure


def _break(found: Envelope, part: Part) -> dict[str, Any]:
    first = found.breaks(part.phi)
    start = released(part.curves).get(part.ability)
    least = (1.0 - found.epsilon) * (part.reference or 0.0)
    return {
        "epsilon": found.epsilon,
        "axis": found.axis,
        "phi": part.phi,
        **first._asdict(),
        "decisive_at": found.breaks(part.phi, decisive=True).at,
        "vacuous": start is not None and start < least - 1e-9,
    }


def _ratios(part: Part, baseline: Part) -> list[dict[str, Any]]:
    """t* of the model over that of the baseline, at the model's φ, wherever both were attacked on an axis."""
    mine, theirs = names_run(part.curves), names_run(baseline.curves)
    base = {(one.axis, one.epsilon): one for one in baseline.envelopes}
    rows = []
    for one in part.envelopes:
        other = base.get((one.axis, one.epsilon))
        theirs_broke = Break() if other is None else other.breaks(part.phi)
        found: Ratio = budget.ratio(
            one.breaks(part.phi),
            theirs_broke,
            untried=bool(theirs - mine),
            untried_on_baseline=bool(mine - theirs),
        )
        rows.append({"axis": one.axis, "epsilon": one.epsilon, "phi": part.phi, **found._asdict()})
        rows[-1]["against"] = baseline.model
    return rows


def _w1(best: Best, part: Part, metric: str) -> dict[str, Any]:
    fresh = {}
    for kind in ("artefact", "recipe"):
        found = again(part.curves, metric, best, kind)
        row = None if found is None else {"value": found.value, **_ends(found.interval), "seeds": found.seeds}
        fresh[kind] = row
    return {
        "value": best.value,
        **_ends(best.interval),
        "attack": best.curve.attack,
        "seed": best.curve.seed,
        "step": best.point.step,
        "unit": best.curve.unit,
        "harm": best.point.metrics.get("harm"),
        "ability": best.point.metrics.get(part.ability),
        "of": best.of,
        **fresh,
    }


def _w2(pool: Portfolio) -> dict[str, Any]:
    return {
        "value": pool.value,
        **_ends(pool.interval),
        "any_checkpoint": pool.any_checkpoint,
        "attacks": len(pool.attacks),
        "names": list(pool.attacks),
        "prompts": pool.prompts,
    }


def _ends(interval: Interval | None) -> dict[str, float | None]:
    return {"low": None, "high": None} if interval is None else {"low": interval.low, "high": interval.high}


def _metric(given: Mapping[str, Any], read: Sequence[Curve]) -> str:
    if given.get("metric"):
        return str(given["metric"])
    return next((name for name in HARM if any(curve.series(name) for curve in read)), "")


def _baselines(given: Mapping[str, Any], result: Mapping[str, Any]) -> tuple[str, ...]:
    if rows := given.get("models"):
        return tuple(str(row.get("model")) for row in rows if row.get("role") == "baseline")
    return tuple(str(row.get("name")) for row in result.get("defences") or () if row.get("method") == BASELINE_METHOD)[
        :1
    ]


def _models(result: Mapping[str, Any], read: Sequence[Curve]) -> list[str]:
    """Every model that was attacked, or was meant to be, in the order in which they first appear."""
    lost = [str(row.get("defence") or "") for key in ("failures", "skipped") for row in result.get(key) or ()]
    return [name for name in dict.fromkeys([*(curve.defence for curve in read), *lost]) if name]
