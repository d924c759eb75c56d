"""The methods as their taxonomy draws them: two answers to what a safe model is, families inside the first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

from rich.text import Text

from immunity.cli.console import out
from immunity.cli.prose import departures, plain, sections
from immunity.cli.tables import plain_table

if TYPE_CHECKING:
    from immunity.method import Block, Card, Method

BLOCKS: Final[Mapping[Block, str]] = {
    "raises the cost of harmful convergence": "a safe model stays safe under attack",
    "conditional collapse": "a safe model becomes useless before it becomes harmful",
    "baseline": "what a defence is measured against",
}
"""Block -> what a model is there, after hardening."""

OTHERS: Final = "other approaches"
FAMILIES: Final[Mapping[str, tuple[str, ...]]] = {
    "adversarial meta-learning": ("NTL", "MLAC", "TAR", "SOPHON"),
    "representation": (
        "Vaccine",
        "Targeted Vaccine",
        "RepNoise",
        "Circuit Breakers",
        "Booster",
        "AntiDote",
        "E.T.",
    ),
    "geometric": ("Condition Number", "LoX"),
    OTHERS: (),
}
"""Families of the first block -> whom the taxonomy names there; it leaves CTRL, LAPT, VAA and ILU without one."""
_IN_FAMILIES: Final = "raises the cost of harmful convergence"


class Shelf(NamedTuple):
    """Methods that stand together.

    Attributes:
        block: Of the taxonomy.
        family: Inside the block; "" where the taxonomy draws none.
        names: Command-line names, by year.
    """

    block: Block
    family: str
    names: tuple[str, ...]


def shelves(methods: Mapping[str, type[Method]]) -> list[Shelf]:
    """Every method on its shelf, shelves in the order of the taxonomy; none is empty."""
    placed: dict[tuple[Block, str], list[str]] = {}
    for name, kind in sorted(methods.items(), key=lambda item: (item[1].card.year, item[0])):
        placed.setdefault((kind.card.block, family(kind.card)), []).append(name)
    places = [(block, inside) for block in BLOCKS for inside in (*FAMILIES, "")]
    return [Shelf(*place, tuple(placed[place])) for place in places if place in placed]


def family(card: Card) -> str:
    """The family that a method belongs to: what its card says, if the taxonomy has it, else where it is named."""
    if card.block != _IN_FAMILIES:
        return ""
    if card.family in FAMILIES:
        return card.family
    return next((name for name, members in FAMILIES.items() if card.name in members), OTHERS)


def paper(card: Card) -> str:
    """Title, identifier and year."""
    where = f"arXiv {card.arxiv}" if card.arxiv else card.elsewhere
    return f"{card.paper} ({where}, {card.year})" if where else card.paper


def departed(kind: type[Method]) -> str:
    """How many departures from its paper a method names."""
    found = len(departures(kind))
    return f"{found} departure{'' if found == 1 else 's'}" if found else "no departure known"


def roles(method: Method) -> str:
    """The roles of data that a step reads, with the number of batches where it is more than one."""
    read = ", ".join(role if count == 1 else f"{role} × {count}" for role, count in method.reads.items())
    return read or "no data"


def overview() -> None:
    """Print every method in its place: what it does, the paper, the cost of a step, the data, the departures."""
    from immunity.methods import METHODS, PRESETS

    out.print(Text("methods: immunity immunise MODEL --method NAME --preset PRESET", style="bold"))
    block = ""
    for shelf in shelves(METHODS):
        if shelf.block != block:
            block = shelf.block
            out.print(Text.assemble("\n", (capital(block), "bold"), f": {BLOCKS[shelf.block]}"))
        table = plain_table()
        table.show_header = False
        table.add_column(no_wrap=True, min_width=16)
        table.add_column()
        if shelf.family:
            out.print(Text(shelf.family, style="italic"))
        for name in shelf.names:
            kind, presets = METHODS[name], PRESETS[name]
            costs = f"gradients a step: {kind.card.gradients}; reads {roles(presets['default'])}; {departed(kind)}"
            table.add_row(name, Text.assemble(kind.card.says, (f"\n{paper(kind.card)}\n{costs}", "dim")))
        out.print(table)
    out.print(Text("\nimmunity list NAME: settings, presets, mechanisms and departures of a method\n"))


def explain(name: str) -> None:
    """Print what a method is, and what it needs."""
    from immunity.mechanisms import TAG, written
    from immunity.methods import METHODS, PRESETS

    kind, default = METHODS[name], PRESETS[name]["default"]
    card, place = kind.card, family(kind.card)
    out.print(Text(f"{card.name}: {card.says}"))
    out.print(Text(f"paper: {paper(card)}"))
    among = "; ".join(dict.fromkeys(filter(None, (card.block, place, card.family))))
    out.print(Text(f"block: {among}\ngradients a step: {card.gradients}\ndata that it reads: {roles(default)}"))
    does = ", ".join(str(row[TAG]) for row in written(default.mechanisms))
    out.print(Text(f"mechanisms that attackers can turn against it: {does or 'none'}\n"))


def departures_of(name: str) -> None:
    """Print how a method departs from its paper, in full, and where what it says comes from."""
    from immunity.methods import METHODS

    kind = METHODS[name]
    out.print(Text("\ndepartures from the paper", style="bold"))
    for point in departures(kind) or (sections(kind).get("Departures from the paper", "None known."),):
        table = plain_table()
        table.show_header = False
        table.add_row("–", Text(plain(" ".join(point.split()))))
        out.print(table)


def capital(text: str) -> str:
    """With a capital, the rest as it is."""
    return text[:1].upper() + text[1:]
