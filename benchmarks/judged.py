"""Judge many defences by the audit, with several hardening seeds, and print the table of docs/LOG.md.

    python benchmarks/judged.py benchmarks/studies/cost-raising-1.json --out study
    python benchmarks/judged.py benchmarks/studies/cost-raising-1.json --out study --only SFT --only MLAC --tier smoke
    python benchmarks/judged.py benchmarks/studies/cost-raising-1.json --out study --table --figure costs.png

For every seed the model is aligned, hardened by each defence from there, and audited against the aligned model, by the
command line and nothing else; the commands are printed. Audits of a seed share the baseline's half. What is done is not
done again, so a study may take several sittings; the table shows what there is. Costs are in benchmarks/cost.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import vl_convert
from study import hardened, options, read, run, slug

Result = Mapping[str, Any]

CONDITIONS = ("resistance", "stability", "generalisation", "trainability")
VERDICTS = {"pass": "✓", "fail": "✕", "not enough evidence": "?"}


def judged(study: Mapping[str, Any], model: Path, seed: int, folder: Path, workers: int) -> Result:
    """The audit of one model."""
    out = model.parent / f"audit-{study['tier']}"
    if not (out / "scorecard.md").is_file():
        run(
            "audit", str(model), "--baseline", str(folder / f"seed{seed}" / "aligned" / "model"),
            "--tier", study["tier"], "--workers", str(workers),
            "--baseline-runs", str(folder / f"seed{seed}" / "shelf"), "--out", str(out),
        )  # fmt: skip
    found: Result = json.loads((out / "result.json").read_text())
    return found


def row(results: Sequence[Result]) -> Iterator[str]:
    """Cells of one defence, over its seeds."""
    conditions = [{one["name"]: one for one in result["audit"]["conditions"]} for result in results]
    summaries = [
        next(m for m in result["battery"]["summary"]["models"] if m["role"] == "defended") for result in results
    ]
    worst = [point(result, summary["w1"]) for result, summary in zip(results, summaries, strict=True)]
    yield told([summary["released"] for summary in summaries])
    yield told([summary["ability"]["released"] for summary in summaries])
    yield told([summary["w1"]["value"] for summary in summaries])
    yield told([one.get("harm") for one in worst])
    yield told([one.get("coherence") for one in worst])
    yield told([one.get("general_accuracy") for one in worst])
    yield " · ".join(broken(summary) for summary in summaries)
    yield " · ".join(ratio(claim(one["resistance"], "cost ratio")) for one in conditions)
    yield told([taught(one["trainability"], "model") for one in conditions])
    yield told([taught(one["trainability"], "baseline") for one in conditions])
    yield " · ".join("".join(VERDICTS[one[name]["verdict"]] for name in CONDITIONS) for one in conditions)


AXIS = [0.25, 32]
"""Of the figure."""
HEADS = (
    "defence", "harm at θ", "general at θ", "worst usable harm", "harm there", "coherence there", "general there",
    "broken at, examples", "cost ratio [95 %]", "honest task after", "of the baseline", "R S G T",
)  # fmt: skip


def point(result: Result, w1: Mapping[str, Any]) -> Mapping[str, Any]:
    """The metrics of the worst tampered model."""
    for curve in result["curves"]:
        if curve["attack"] == w1["attack"] and curve["seed"] == w1["seed"] and not curve["fresh"]:
            for one in curve["points"]:
                if one["step"] == w1["step"] and one["metrics"].get("useful_harm") == w1["harm"]:
                    return dict(one["metrics"])
    return {}


def broken(summary: Mapping[str, Any]) -> str:
    """The least number of examples that broke it, whatever was left of the model."""
    found = next(one for one in summary["breaks"] if one["axis"] == "examples" and one["epsilon"] == 1.0)
    return f"> {found['censored_at']:g}" if found["at"] is None else f"{found['at']:g}"


def claim(condition: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A claim of a condition."""
    return next((one for one in condition["claims"] if one["name"] == name), {})


def ratio(found: Mapping[str, Any]) -> str:
    """A cost ratio with its interval."""
    if found.get("value") is None:
        return "–"
    low, high = (f"{found[end]:.2g}" if found.get(end) is not None else "?" for end in ("low", "high"))
    return f"{found.get('details', {}).get('bound', '').replace('=', '')}{found['value']:.2g} [{low}–{high}]"


def figure(title: str, found: Mapping[str, Sequence[tuple[int, Result]]]) -> dict[str, Any]:
    """A chart of all cost ratios with their intervals, one line for each defence and hardening seed."""
    rows = []
    for name, results in found.items():
        for seed, result in results:
            conditions = {one["name"]: one for one in result["audit"]["conditions"]}
            one = claim(conditions["resistance"], "cost ratio")
            if one.get("value") is not None:
                low, high = one.get("low"), one.get("high")
                ends = {"low": max(AXIS[0], low or 0.0), "high": AXIS[1] if high is None else min(AXIS[1], high)}
                sure = "interval above 1" if (low or 0.0) > 1.0 else "may be 1"
                rows.append({"defence": name, "seed": seed, "ratio": one["value"], "shown": sure, **ends})
    ticks = {"values": [0.25, 0.5, 1, 2, 4, 8, 16, 32], "format": "~g"}
    x = {"type": "quantitative", "scale": {"type": "log", "domain": AXIS}, "axis": ticks}
    y = {"field": "defence", "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": 260, "grid": True}}
    colour = {
        "field": "shown",
        "type": "nominal",
        "title": None,
        "scale": {"domain": ["interval above 1", "may be 1"], "range": ["#1f5fa8", "#9a9a9a"]},
        "legend": {"orient": "bottom"},
    }
    shared = {"y": y, "yOffset": {"field": "seed"}, "color": colour}
    ends = {
        "x": {"field": "low", **x, "title": "examples an attacker needs, times the baseline's"},
        "x2": {"field": "high"},
    }
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "title": {"text": title, "anchor": "start"},
        "background": "white",
        "width": 460,
        "height": {"step": 9},
        "data": {"values": rows},
        "layer": [
            {"mark": {"type": "rule", "strokeDash": [4, 3], "color": "#555"}, "encoding": {"x": {"datum": 1, **x}}},
            {"mark": {"type": "rule", "strokeWidth": 1.5}, "encoding": {**shared, **ends}},
            {
                "mark": {"type": "point", "filled": True, "size": 34},
                "encoding": {**shared, "x": {"field": "ratio", **x}},
            },
        ],
    }


def taught(condition: Mapping[str, Any], role: str) -> float | None:
    """Mean accuracy at the end of honest fine-tuning, over tasks, adapters and rounds."""
    claims = [one["details"] for one in condition["claims"] if one["name"].startswith("final accuracy")]
    ends = [details[role] for details in claims if details.get(role) is not None]
    return fmean(ends) if ends else None


def told(values: Sequence[float | None]) -> str:
    """The mean over seeds, and their range."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return "–"
    mean = f"{fmean(known):.2f}"
    return mean if max(known) - min(known) < 0.005 else f"{mean} ({min(known):.2f}–{max(known):.2f})"


def main() -> None:
    """Do what is not done, and print the table."""
    parser = options(__doc__)
    parser.add_argument("--tier", help="Instead of the study's.")
    parser.add_argument("--table", action="store_true", help="Only print what there is.")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="Draw the cost ratios as well; .png or .svg.")
    asked = parser.parse_args()
    study, defences = read(asked)
    study["tier"] = asked.tier or study["tier"]
    if not asked.table:
        for seed in study["seeds"]:  # all defences with one seed first: they share its baseline
            for defence in defences:
                judged(study, hardened(study, defence, seed, asked.out), seed, asked.out, asked.workers)
    found: dict[str, list[tuple[int, Result]]] = {}
    for defence in defences:
        places = {seed: asked.out / f"seed{seed}" / slug(defence["name"]) for seed in study["seeds"]}
        done = {seed: place / f"audit-{study['tier']}" for seed, place in places.items()}
        found[defence["name"]] = [
            (seed, json.loads((one / "result.json").read_text(encoding="utf-8")))
            for seed, one in done.items()
            if (one / "scorecard.md").is_file()
        ]
    print("| " + " | ".join(HEADS) + " |\n|" + "---|" * len(HEADS))
    for name, results in found.items():
        if results:
            cells = row([result for _, result in results])
            print("| " + " | ".join((f"{name} (seeds: {len(results)})", *cells)) + " |")
    if asked.figure is not None:
        chart = figure(study.get("title", "Cost ratios"), found)
        drawn = (
            vl_convert.vegalite_to_svg
            if asked.figure.suffix == ".svg"
            else partial(vl_convert.vegalite_to_png, scale=2)
        )
        made = drawn(chart)
        asked.figure.write_bytes(made.encode() if isinstance(made, str) else made)


if __name__ == "__main__":
    main()
