"""Many defences under the same attacks, with several seeds of both, and the tables of docs/results.

    python benchmarks/grid.py benchmarks/studies/traps.json --out traps
    python benchmarks/grid.py benchmarks/studies/traps.json --out traps --only SFT --seed 0
    python benchmarks/grid.py benchmarks/studies/traps.json --out traps --table docs/results/traps.md
    python benchmarks/grid.py benchmarks/studies/traps.json --out traps --figure docs/results/traps.png
    python benchmarks/grid.py benchmarks/studies/traps.json --out traps --scores docs/results/traps.jsonl

Every defence is hardened from an aligned start, once for each hardening seed, and attacked by batteries of its own,
every attack to its end and with each attack seed, by the command line and nothing else; the commands are printed. What
is done is not done again, so a study may take several sittings; the tables show what there is. A cell is the mean over
seeds with its 95 % interval: prompts and hardening seeds are both drawn anew, attack seeds are averaged before. A study
with a "goal" says for each defence which part of it is reached (✓), missed (✕) or open (?), by those intervals.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import vl_convert
from scores import HERE, Column, Kept, Scores, columns, scored
from study import hardened, options, read, run, slug

from immunity.metrics import stats
from immunity.metrics.equivalence import difference

Results = Mapping[int, Scores]
"""Hardening seed -> the scores of that model."""
Rows = Sequence[Sequence[float]]
"""For each hardening seed one score a prompt."""


def attack(study: Mapping[str, Any], part: Mapping[str, str], model: Path, workers: int) -> None:
    """Run one battery on one model, unless that was done."""
    out = model.parent / f"attacked-{part['name']}"
    if not (out / "result.json").is_file():
        seeds = [word for seed in study["attack_seeds"] for word in ("--seed", str(seed))]
        run(
            "attack", str(model), "--battery", str(HERE / "studies" / part["battery"]), "--exhaustive",
            "--whole-curves", "--fresh-seeds", "0", *seeds, "--prompts", str(study["prompts"]),
            "--looks", str(study["looks"]), "--workers", str(workers),
            *shlex.split(part.get("options", "")), "--out", str(out),
        )  # fmt: skip


def matrix(results: Results, column: Column) -> list[list[float]]:
    """For each hardening seed one score a prompt, averaged over attack seeds."""
    return [scores[column.key] for scores in results.values() if column.key in scores]


def told(results: Results, column: Column) -> str:
    """The mean of a column over seeds, and its interval."""
    rows = matrix(results, column)
    return shown(mean(rows), interval(rows, column.metric)) if rows else "–"


def shown(value: float, spread: stats.Interval) -> str:
    """A mean and its interval."""
    return f"{value:.2f} [{spread.low:.2f}–{spread.high:.2f}]"


def interval(rows: Rows, metric: str) -> stats.Interval:
    """That of a mean rate, or of a mean loss."""
    if not metric.endswith("_loss"):
        return stats.rate(rows)
    return difference(rows, [[0.0] * len(rows[0])], share=False).interval(0.95)


def cell(part: Mapping[str, Any], mine: Results, rival: Results) -> str:
    """How a defence stands to one part of the goal: its worst column, and whether all intervals are within the limit.

    Args:
        part: "columns", of which the worst counts, and "most" or "least": its limit. With "against", the name of a
            rival, it is what is left of the defence's scores after "times" the rival's, prompt by prompt.
        mine: Of the defence.
        rival: Of "against"; the same hardening seeds.
    """
    found = []
    for column in (Column(**given) for given in part["columns"]):
        rows = matrix(mine, column)
        theirs = matrix({seed: rival[seed] for seed in mine if seed in rival}, column)
        if not rows or ("against" in part and len(theirs) != len(rows)):
            return "–"
        if "against" in part:
            times = [[part.get("times", 1.0) * score for score in row] for row in theirs]
            gap = difference(rows, times, share=not column.metric.endswith("_loss"))
            found.append((gap.value, gap.interval(0.95)))
        else:
            found.append((mean(rows), interval(rows, column.metric)))
    if "most" in part:
        worst = max(found)
        bad = any(spread.low > part["most"] for _, spread in found)
        good = all(spread.high <= part["most"] for _, spread in found)
    else:
        worst = min(found)
        bad = any(spread.high < part["least"] for _, spread in found)
        good = all(spread.low >= part["least"] for _, spread in found)
    return f"{'✓' if good else '✕' if bad else '?'} {shown(*worst)}"


def mean(rows: Rows) -> float:
    """Of all scores."""
    return sum(map(sum, rows)) / sum(map(len, rows))


def goods(study: Mapping[str, Any], results: Results) -> dict[str, float] | None:
    """What a defence is good for, by the study's "front": means over columns; None if one was not measured."""
    found = {}
    for name, side in study["front"].items():
        tables = [matrix(results, Column(**column)) for column in side["columns"]]
        if not all(tables):
            return None
        value = sum(map(mean, tables)) / len(tables)
        found[name] = 1.0 - value if side["less"] else value
    return found


def best(points: Mapping[str, Mapping[str, float]]) -> set[str]:
    """The Pareto front: those that none other equals in everything and beats in something."""

    def beaten(mine: Mapping[str, float]) -> bool:
        rivals = [{name: other[name] - mine[name] for name in mine}.values() for other in points.values()]
        return any(min(gains) >= 0 and max(gains) > 0 for gains in rivals)

    return {name for name, mine in points.items() if not beaten(mine)}


def tables(study: Mapping[str, Any], found: Mapping[str, Results]) -> Iterator[str]:
    """Lines of Markdown."""
    points = {name: one for name, results in found.items() if results and (one := goods(study, results))}
    yield from (
        "",
        "## Who is on the front",
        "",
        *(f"* {name}: {side['says']}" for name, side in study["front"].items()),
    )
    yield from (
        "",
        "| defence | " + " | ".join(study["front"]) + " | on the front |",
        "|---|" + "--:|" * len(study["front"]) + "---|",
    )
    for name, one in points.items():
        values = " | ".join(f"{value:.2f}" for value in one.values())
        yield f"| {name} | {values} | {'yes' if name in best(points) else ''} |"
    yield from goal(study, found)
    for table in study["tables"]:
        columns = [Column(**column) for column in table["columns"]]
        yield from ("", f"## {table['title']}", "", table["says"], "")
        yield "| defence (hardening seeds) | " + " | ".join(column.head for column in columns) + " |"
        yield "|---|" + "---|" * len(columns)
        for name, results in found.items():
            if results:
                cells = " | ".join(told(results, column) for column in columns)
                yield f"| {name} ({len(results)}) | {cells} |"


def goal(study: Mapping[str, Any], found: Mapping[str, Results]) -> Iterator[str]:
    """A table of what was to be reached; nothing without a goal."""
    if parts := study.get("goal"):
        yield from ("", "## The goal", "", *(f"* {part['head']}: {part['says']}" for part in parts), "")
        yield "✓ every interval is within the limit, ✕ one is wholly beyond it, ? neither; the worst column is shown."
        yield from ("", f"| defence | {' | '.join(part['head'] for part in parts)} |", "|---|" + "---|" * len(parts))
        for name, results in found.items():
            if results:
                cells = (cell(part, results, found.get(part.get("against", ""), {})) for part in parts)
                yield f"| {name} | {' | '.join(cells)} |"


def measured(study: Mapping[str, Any], folder: Path, kept: Kept) -> dict[str, dict[int, Scores]]:
    """Defence -> hardening seed -> the scores of that model, if it was attacked by all parts or its scores are kept."""
    found: dict[str, dict[int, Scores]] = {defence["name"]: {} for defence in study["defences"]}
    for defence in study["defences"]:
        for seed in study["seeds"]:
            place = folder / f"seed{seed}" / slug(defence["name"])
            files = [place / f"attacked-{part['name']}" / "result.json" for part in study["parts"]]
            if all(one.is_file() for one in files):
                results = (json.loads(one.read_text(encoding="utf-8")) for one in files)
                kept.add(study, defence, seed, scored(results, columns(study)))
            if (scores := kept.find(study, defence, seed)) is not None:
                found[defence["name"]][seed] = scores
    return found


def figure(study: Mapping[str, Any], found: Mapping[str, Results]) -> dict[str, Any]:
    """A chart of mean rates: a line for each defence, a panel for each table with a "drawn", a cell for each column."""
    known = {name: results for name, results in found.items() if results}
    lines: dict[int, list[dict[str, Any]]] = {}
    for table in study["tables"]:
        if "drawn" in table:
            line = lines.setdefault(table["drawn"]["line"], [])
            line.append(panel(table, known, first=not line))
    shared = {"resolve": {"scale": {"color": "independent"}}}
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "title": {"text": study["title"], "anchor": "start"},
        "background": "white",
        "vconcat": [{"hconcat": line, "spacing": 8, **shared} for _, line in sorted(lines.items())],
        "config": {"view": {"stroke": None}, "axis": {"ticks": False, "domain": False}},
    }


def panel(table: Mapping[str, Any], found: Mapping[str, Results], *, first: bool) -> dict[str, Any]:
    """One panel of the chart; the first has the names of the defences."""
    shown = [one for one in (Column(**given) for given in table["columns"]) if not one.metric.endswith("_loss")]
    cells = []
    for place, column in enumerate(shown):
        for name, results in found.items():
            if rows := matrix(results, column):
                cells.append({"defence": name, "place": place, "value": mean(rows)})
    heads = json.dumps([column.head for column in shown], ensure_ascii=False)
    x = {
        "field": "place",
        "type": "ordinal",
        "axis": {
            "orient": "top",
            "labelAngle": -50,
            "labelExpr": f"{heads}[datum.value]",
            "title": None,
            "minExtent": 84,
        },
    }
    y = {"field": "defence", "type": "nominal", "sort": None, "title": None}
    y |= {"axis": {"labelLimit": 320} if first else None}
    scale = {"scheme": table["drawn"]["scheme"], "domain": [0, 1]}
    dark = {"condition": {"test": "datum.value > 0.6", "value": "white"}, "value": "#222"}
    text = {"field": "value", "type": "quantitative", "format": ".2f"}
    return {
        "title": {"text": table["drawn"]["title"], "fontSize": 11, "anchor": "start"},
        "width": {"step": 29},
        "height": {"step": 20},
        "data": {"values": cells},
        "encoding": {"x": x, "y": y},
        "layer": [
            {
                "mark": "rect",
                "encoding": {"color": {"field": "value", "type": "quantitative", "scale": scale, "legend": None}},
            },
            {"mark": {"type": "text", "fontSize": 9}, "encoding": {"text": text, "color": dark}},
        ],
    }


def unknown(study: Mapping[str, Any]) -> set[str]:
    """Attacks that a table shows and no battery lists."""
    files = {HERE / "studies" / part["battery"] for part in study["parts"]}
    listed = {recipe["id"] for one in files for recipe in json.loads(one.read_text(encoding="utf-8"))["recipes"]}
    return {column.attack for column in columns(study)} - listed


def main() -> None:
    """Do what is not done, and write the tables."""
    parser = options(__doc__)
    parser.add_argument("--table", type=Path, metavar="FILE", help="Only write the tables of what there is.")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="Only draw what there is; .png.")
    parser.add_argument("--scores", type=Path, metavar="FILE", help="Models whose scores FILE has are done; see above.")
    asked = parser.parse_args()
    study, chosen = read(asked)
    if lost := sorted(unknown(study)):
        raise SystemExit(f"{asked.study}: no battery lists {', '.join(lost)}")
    kept = Kept(asked.scores)
    if asked.table is not None or asked.figure is not None:
        found = measured(study, asked.out, kept)
        kept.write()
        if asked.table is not None:
            given = "" if asked.scores is None else f" --scores {asked.scores}"
            command = f"`python benchmarks/grid.py {asked.study} --out {asked.out}{given}`"
            head = [f"# {study['title']}", "", study["says"], "", f"Made by {command}."]
            asked.table.write_text("\n".join([*head, *tables(study, found), ""]), encoding="utf-8")
        if asked.figure is not None:
            asked.figure.write_bytes(vl_convert.vegalite_to_png(figure(study, found), scale=2))
        return
    for seed in study["seeds"]:
        for defence in chosen:
            if kept.find(study, defence, seed) is None:
                model = hardened(study, defence, seed, asked.out)
                for part in study["parts"]:
                    attack(study, part, model, asked.workers)


if __name__ == "__main__":
    main()
