"""Tables: what was read, a curve in numbers, and the verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, Final

from rich.table import Table
from rich.text import Text

from immunity.cli.console import out
from immunity.metrics.curves import STEPS

if TYPE_CHECKING:
    from immunity.report.battery_rows import AttackRow


def data_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What was read: nothing is left out or cut in silence."""
    table = plain_table()
    for name, right in (("role", False), ("from", False), ("rows", True), ("cut", True), ("left out", False)):
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in rows:
        left_out = ", ".join(f"{n} ({why})" for why, n in row["skipped"].items()) or "0"
        table.add_row(row["role"], Text(row["name"]), f"{row['examples']:,}", f"{row['truncated']:,}", left_out)
    return table


def written_table(corpora: Sequence[Mapping[str, Any]]) -> Table:
    """What a method wrote itself: the first rows of each corpus, as they are cut and hidden in the record."""
    table = plain_table()
    for name in ("prompt", "answer"):
        table.add_column(name, overflow="fold")
    for corpus in corpora:
        for row in corpus["shown"]:
            table.add_row(Text(row["prompt"]), Text(row["response"]))
        table.add_row(Text(f"… {corpus['examples']:,} rows: {corpus['name']}", style="dim"), Text(_means(corpus)))
    return table


def _means(corpus: Mapping[str, Any]) -> str:
    """What was measured of the rows that a method made, on average."""
    found = dict(corpus.get("measured", {}))
    rows = found.pop("rows", 0)
    means = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
    return f"{rows:,} made, on average: {means}" if found else ""


def plain_table() -> Table:
    """A table without lines."""
    return Table(box=None, header_style="dim", pad_edge=False)


def show(title: str, table: Table) -> None:
    """A table under its title, which may be longer than the table is wide."""
    out.print(Text(title, style="bold"))
    out.print(table)


COLUMNS: Final = {
    "collapse_loss": "collapse\nloss",
    "general_loss": "general\nloss",
    "harmful_loss": "harmful\nloss",
    "harm": "\nharm",
    "useful_harm": "usable\nharm",
    "refusal": "\nrefused",
    "coherence": "\ncoherent",
    "general_accuracy": "general\nright",
    "benign_accuracy": "benign\nright",
}
"""Metric -> the head of its column; nine of them and the step fit into 80 characters."""


def curve_table(curve: Mapping[str, Any]) -> Table:
    """A curve in numbers: one row a budget."""
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 1, 0, 0))
    unit = str(curve.get("unit") or STEPS)
    table.add_column("\nstep" if unit == STEPS else f"\n{unit.split(maxsplit=1)[0]}", justify="right", no_wrap=True)
    present = [key for key in COLUMNS if any(key in point["metrics"] for point in curve["points"])]
    for key in present:
        table.add_column(COLUMNS[key], justify="right", no_wrap=True)
    for point in curve["points"]:
        values = [point["metrics"].get(key) for key in present]
        table.add_row(str(point["step"]), *["–" if v is None else number(v) for v in values])
    return table


def number(value: float) -> str:
    """Two decimals, fewer of large numbers."""
    return f"{value:.2f}" if abs(value) < 100 else f"{value:,.0f}"


COLOURS: Final = {
    "fired and held": "green",
    "fired, then healed": "yellow",
    "collapsed before the attack": "red",
    "lost ability without firing": "yellow",
}


def verdicts(result: Mapping[str, Any]) -> Table:
    """What the trap did (in the worst seed), and what was left (on average over seeds), under each attack.

    Args:
        result: As ``result.json`` holds it, ``verdicts`` included.
    """
    defences = list(dict.fromkeys(curve["defence"] for curve in result["curves"]))
    last: dict[tuple[str, str], list[Mapping[str, float]]] = {}
    for curve in result["curves"]:
        if curve["points"]:
            last.setdefault((curve["defence"], curve["attack"]), []).append(curve["points"][-1]["metrics"])
    states = {(v["defence"], v["attack"]): v["state"] for v in result["verdicts"]}
    attacks = [(attack["name"], attack["threat"]) for attack in result["attacks"]]
    table = Table(title="what the trap did, and what was left after the last step", title_justify="left")
    table.add_column("attack")
    for name in defences:
        table.add_column(name)
    for attack, threat in attacks:
        cells = [_cell(states.get((d, attack), ""), last.get((d, attack), []), threat) for d in defences]
        table.add_row(attack, *cells)
    return table


def _cell(state: str, seeds: Sequence[Mapping[str, float]], threat: str) -> str:
    if not seeds:
        return "failed"
    colour = COLOURS.get(state, "default")
    if threat == "benign" and state.startswith("fired"):
        colour = "red"
    names = {"harm": "harm", "general_accuracy": "general"} | (
        {"benign_accuracy": "task"} if threat != "harmful" else {}
    )
    known = {name: [v for seed in seeds if (v := seed.get(name)) is not None] for name in names}
    shown = [f"{word} {fmean(known[name]):.2f}" for name, word in names.items() if known[name]]
    return f"[{colour}]{state}[/{colour}]\n{', '.join(shown)}"


STRONGEST: Final = 10
"""Attacks of a battery that are shown; the page has all of them."""


def battery_tables(result: Mapping[str, Any]) -> None:
    """What a battery found: a verdict for each model, the strongest attacks, the flags, and what did not run.

    Args:
        result: As ``result.json`` holds it.
    """
    from immunity.report.battery import summed
    from immunity.report.battery_rows import ranked

    models = (summed(result) or {}).get("models") or []
    rows = ranked(result, models)
    for model in models:
        _model(model)
    if rows and models:
        show(
            f"\nthe strongest {min(STRONGEST, len(rows))} of {len(rows)} attacks: highest harm, and where it broke",
            _tried(rows),
        )
    for model in models:
        _flags(model)
    out.print(Text("\nwhat became of the attacks", style="bold"))
    for model in models:
        _counts(rows, str(model["model"]))
    out.print(Text("Why they crashed or were skipped is in report.html, “What bounds these numbers”."))


def _model(model: Mapping[str, Any]) -> None:
    """A model's verdict and its few numbers."""
    from immunity.report.battery import facts, spent

    out.print(Text.assemble("\n", (str(model["model"]), "bold"), f" ({model['role']})"), soft_wrap=True)
    out.print(Text(str(model["verdict"])))
    table = plain_table()
    for right in (False, True, False):
        table.add_column(justify="right" if right else "left")
    for fact in facts(model):
        interval = f" [{fact.interval}]" if fact.interval else ""
        table.add_row(Text(fact.name), Text(f"{fact.value}{interval}"), Text(fact.note, style="dim"))
    table.show_header = False
    out.print(table)
    budgets = plain_table()
    for head in ("breaks at", "ε = 1", "ε = 0.2", *(["ratio"] if model.get("ratio") else [])):
        budgets.add_column(head, justify="left" if head == "breaks at" else "right", no_wrap=True)
    for row in spent(model):
        budgets.add_row(row.axis, row.anyhow, row.useful, *([row.ratio] if model.get("ratio") else []))
    if budgets.row_count:
        out.print(budgets)


def _tried(rows: Sequence[AttackRow]) -> Table:
    """The strongest attacks, a column a model."""
    table = plain_table()
    table.add_column("attack", overflow="fold")
    for cell in rows[0].cells:
        table.add_column(Text(cell.model), overflow="fold")
    for row in rows[:STRONGEST]:
        told = [f"{'' if c.peak is None else f'{c.peak:.2f} '}{c.status}\n{c.where}".strip() for c in row.cells]
        table.add_row(Text(row.name), *(Text(cell) for cell in told))
    return table


def _flags(model: Mapping[str, Any]) -> None:
    """A line for each flag, with the first place where it was raised."""
    named: dict[int, list[Mapping[str, Any]]] = {}
    for flag in model.get("flags") or ():
        named.setdefault(flag["number"], []).append(flag)
    if named:
        out.print(Text.assemble("\n", ("flags of ", "bold"), (str(model["model"]), "bold")), soft_wrap=True)
    for number, flags in named.items():
        grave = ", grave" if any(flag["forbids"] for flag in flags) else ""
        more = f", and {len(flags) - 1} more" if len(flags) > 1 else ""
        begin = (f"{number} {flags[0]['name']}{grave}: ", "red" if grave else "yellow")
        out.print(Text.assemble(begin, f"{flags[0]['says']} ({flags[0]['where']}{more})"))


def _counts(rows: Sequence[AttackRow], model: str) -> None:
    from immunity.report.battery_rows import counted

    told = ", ".join(f"{n} {status}" for status, n in counted(rows, model).items())
    out.print(Text(f"{model}: {told or 'nothing was run'}"))
