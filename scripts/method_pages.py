"""Write docs/methods/: a page for each method, and an index, from docstrings and cards alone.

The equation is the docstring of the method's module; what a setting means and how a method departs from its paper, that
of its class; the rest its card, its presets and its mechanisms. So edit those, and run, with the package installed:

    python scripts/method_pages.py          (make docs)
    python scripts/method_pages.py --check  say what is out of date, and change nothing
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from immunity import mechanisms
from immunity.attacks.adaptive import compiled
from immunity.attacks.finetune import FineTune
from immunity.bench import standins
from immunity.cli.prose import attributes, departures, sections, shown
from immunity.cli.taxonomy import BLOCKS, capital, family, roles, shelves
from immunity.data.dealt import dealt
from immunity.method import Card, Method
from immunity.methods import METHODS, PRESETS
from immunity.weight_edit import WeightEdit

FOLDER = Path(__file__).parents[1] / "docs" / "methods"
NOT_ON_TINY = frozenset({"ctrl"})
"""Methods that find nothing to do where a model knows all answers by heart, as the tiny one knows the made-up world."""
WRITTEN = "<!-- Written by `make docs` from docstrings and cards. Edit those, not this page. -->"
FULL = {
    "alignment": "refusals and ordinary conversations: what the model shall stay good at",
    "harmful": "restricted prompts with compliant answers",
    "general": "ordinary conversations",
    "benign": "the task of an honest user",
    "heldout": "restricted rows that no simulated attacker trains on; a fifth of `harmful` unless given",
    "safe": "a safe answer to each restricted prompt",
    "vulnerable": "alignment rows that a fine-tune forgets first",
}


def pages() -> dict[str, str]:
    """File name -> text of every page."""
    found = {f"{name}.md": page(name) for name in METHODS}
    return {"README.md": index(), **found}


def index() -> str:
    """The taxonomy, with every method in its place."""
    parts = [
        "# Methods",
        WRITTEN,
        "Two answers to what a safe model is, and families inside the first. `immunity list` prints the same. The cost "
        "is in gradients a step, where plain fine-tuning takes one. No method is recommended here: what each of them "
        "protects from is for `immunity audit` to say, and [what it said so far](../results/README.md) is on a page.",
    ]
    block = ""
    for shelf in shelves(METHODS):
        if shelf.block != block:
            block = shelf.block
            parts.append(f"## {capital(block)}\n\n{capital(BLOCKS[shelf.block])}.")
        if shelf.family:
            parts.append(f"### {capital(shelf.family)}")
        rows = [_listed(name) for name in shelf.names]
        parts.append(
            table(("method", "what it does", "paper", "year", "gradients a step", "reads", "departures"), rows)
        )
    return joined(parts)


def _listed(name: str) -> tuple[str, ...]:
    kind = METHODS[name]
    card = kind.card
    source = f"{markdown(card.paper)}, {arxiv(card)}" if arxiv(card) else markdown(card.paper)
    count = str(len(departures(kind)))
    says = markdown(card.says)
    reads = roles(PRESETS[name]["default"])
    return (f"[{card.name}]({name}.md)", says, source, str(card.year), markdown(card.gradients), reads, count)


def page(name: str) -> str:
    """All that is known of a method."""
    kind, presets = METHODS[name], PRESETS[name]
    card, told = kind.card, sections(kind)
    summary, *about = paragraphs(told[""])
    module = inspect.getdoc(sys.modules[kind.__module__]) or ""
    equation, *notes = re.split(r"\n\n", module.partition("\n\n")[2].strip())
    parts = [f"# {card.name}", WRITTEN, markdown(card.says), _facts(kind, presets["default"])]
    parts += ["## What it does", markdown(summary), *map(markdown, about)]
    if equation:
        parts += ["## Equation", f"```text\n{equation}\n```", *map(markdown, map(oneline, notes))]
    parts += ["## Settings", *_settings(kind, presets)]
    parts += ["## Data", *_data(presets)]
    parts += ["## What attackers can turn against it", *_mechanisms(presets["default"])]
    parts += ["## Departures from the paper", *_departures(kind, told)]
    if "Source" in told:
        parts += ["## Source", *map(markdown, paragraphs(told["Source"]))]
    parts += ["## To run it", *_command(name, presets)]
    return joined(parts)


def _facts(kind: type[Method], default: Method) -> str:
    card = kind.card
    place = " · ".join(dict.fromkeys(filter(None, (card.block, family(card), card.family))))
    source = f"{markdown(card.paper)}, {arxiv(card)} ({card.year})" if arxiv(card) else markdown(card.paper)
    facts = {
        "Paper": source,
        "Taxonomy": markdown(place),
        "Cost": f"gradients a step: {markdown(card.gradients)}",
        "Reads": roles(default),
        "Departures from the paper": str(len(departures(kind)) or "none known"),
    }
    return "\n".join(f"* **{fact}**: {value}" for fact, value in facts.items())


def _settings(kind: type[Method], presets: Mapping[str, Method]) -> Iterable[str]:
    values: dict[str, dict[str, Any]] = {preset: asdict(one) for preset, one in presets.items()}  # type: ignore[call-overload]
    default, raw = values["default"], attributes(kind)
    if not default:
        yield "None."
        return
    rows = []
    for setting in default:
        cells = [f"`{said}`" if (said := shown(own[setting])) else "–" for own in values.values()]
        marked = [f"**{cell}**" if cell != cells[0] else cell for cell in cells]
        rows.append((f"`{setting}`", markdown(raw.get(setting, "")), *marked))
    yield table(("setting", "meaning", *values), rows)
    made = {preset: inspect.getattr_static(kind, preset, None) for preset in presets}
    yield "\n".join(
        f"* `{preset}`: {markdown(oneline(inspect.getdoc(one.__func__) or ''))}"
        for preset, one in made.items()
        if isinstance(one, classmethod)
    )


def _data(presets: Mapping[str, Method]) -> Iterable[str]:
    default = presets["default"]
    if not default.reads:
        yield "None."
        return
    rows = [(f"`{role}`", str(count), FULL.get(role, "")) for role, count in default.reads.items()]
    yield table(("role", "batches a step", "what it is"), rows)
    for preset, one in presets.items():
        if one.reads != default.reads:
            yield f"With the preset `{preset}`: {roles(one)}."


def _mechanisms(default: Method) -> Iterable[str]:
    declared = default.mechanisms
    if not declared:
        yield "It declares no mechanism: only the attacks that suit any model are derived."
        return
    yield "It declares these mechanisms, and `immunity attack --battery adaptive` derives attacks from them:"
    lines = []
    for one, row in zip(declared, mechanisms.written(declared), strict=True):
        values = ", ".join(
            f"{key} `{shown(value)}`" for key, value in row.items() if key != mechanisms.TAG and value != ""
        )
        says = (inspect.getdoc(type(one)) or "").partition("\n")[0]
        attacks = ", ".join(f"`{name}`" for name in _against(one))
        lines.append(f"* **{row[mechanisms.TAG]}**{f' ({values})' if values else ''}: {markdown(says)} {attacks}.")
    yield "\n".join(lines)


def _against(one: mechanisms.Mechanism) -> list[str]:
    """The attacks that are derived from a mechanism, for an attacker who has the model before as well."""
    found, generic = ([r.id for r in compiled(some, scale=FineTune(), base="base")] for some in ((one,), ()))
    return [name for name in found if name not in generic]


def _departures(kind: type[Method], told: Mapping[str, str]) -> Iterable[str]:
    points = departures(kind)
    if points:
        yield "\n".join(f"* {markdown(point)}" for point in points)
    else:
        yield markdown(oneline(told.get("Departures from the paper", "None known.")))


def _command(name: str, presets: Mapping[str, Method]) -> Iterable[str]:
    reads = presets["default"].reads
    if isinstance(presets["default"], WeightEdit):
        yield "On a folder with a model and one with what it was made from; nothing is trained:"
        yield f"    immunity immunise MODEL --method {name} --set base=BASE --out hardened"
        yield f"`immunity list {name}` shows the settings; `--set NAME=VALUE` changes one."
        return
    made_up = standins.defence("umbra")
    if name not in NOT_ON_TINY and set(reads) <= {*dealt(reads, made_up)}:
        yield "On the tiny model and made-up, harmless data:"
        yield f"    immunity immunise tiny --method {name} --lr 1e-3 --steps 60 --out hardened"
    preset = " --preset paper" if "paper" in presets else ""
    yield "On a model and files of your own:"
    data = " ".join(f"--{role} {role}.jsonl" for role in reads)
    yield f"    immunity immunise MODEL --method {name}{preset} --out hardened \\\n        {data}"
    yield f"`immunity list {name}` shows the settings; `--set NAME=VALUE` changes one."


def arxiv(card: Card) -> str:
    """A link to the paper, or where else it is."""
    return markdown(card.elsewhere) if not card.arxiv else f"[arXiv {card.arxiv}](https://arxiv.org/abs/{card.arxiv})"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def markdown(text: str) -> str:
    """A docstring's marks as Markdown's; what Markdown would take for a tag or for emphasis is escaped."""
    text = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", text).replace("``", "`")
    pieces = text.split("`")  # what stands in code is left alone
    for i in range(0, len(pieces), 2):
        pieces[i] = re.sub(r"(?<!\w)_|_(?!\w)|[<\[\]]", lambda found: f"\\{found[0]}", pieces[i])
    return "`".join(pieces)


def paragraphs(text: str) -> list[str]:
    """Each on one line, but lists and blocks as they are."""
    whole = re.split(r"\n\s*\n", text)
    return [part if re.match(r"\s|[*-] ", part) else oneline(part) for part in whole]


def oneline(text: str) -> str:
    """With single blanks instead of line breaks."""
    return " ".join(text.split())


def joined(parts: Sequence[str]) -> str:
    """Blocks with a blank line between them, and a newline at the end."""
    return "\n\n".join(part for part in parts if part) + "\n"


def stale() -> list[str]:
    """Pages that are not what they should be, missing ones and those of methods that are gone included."""
    wanted = pages()
    there = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.md")}
    return sorted(name for name in {*wanted, *there} if wanted.get(name) != there.get(name))


def main() -> None:
    """Write the pages, or say which are out of date."""
    parser = argparse.ArgumentParser(description="Write docs/methods/ from docstrings and cards.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a page is out of date")
    asked = parser.parse_args()
    changed = stale()
    if asked.check:
        sys.exit(f"out of date: {', '.join(changed)}; run `make docs`" if changed else 0)
    FOLDER.mkdir(parents=True, exist_ok=True)
    wanted = pages()
    for name in changed:
        if name in wanted:
            (FOLDER / name).write_text(wanted[name], encoding="utf-8")
        else:
            (FOLDER / name).unlink()
        print(f"{'wrote' if name in wanted else 'removed'} docs/methods/{name}")


if __name__ == "__main__":
    main()
