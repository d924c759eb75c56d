"""Written: corpora that a method made itself, kept in its run's folder: a killed run does not make them again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from immunity.data.corpus import Corpus, Example
from immunity.errors import DataError

FOLDER: Final = "written"
HARMLESS: Final = "harmless"
"""The tag of an example that may be shown to anybody, if its value is "yes": its prompt is a stand-in, or benign."""
MEASURED: Final = "measured: "
"""How the tags begin that say a number of an example which a method made; its mean is shown."""
HIDDEN: Final = "(not shown)"
WIDTH: Final = 100
"""Characters of a text that are shown."""


def kept(
    folder: Path | None, identity: Mapping[str, Any], write: Callable[[], tuple[Corpus, ...]]
) -> tuple[Corpus, ...]:
    """What ``write`` gives, or what it gave when it was called in this folder before, for the same ``identity``.

    Args:
        folder: Of the run; None keeps nothing.
        identity: All that ``write`` depends on, as plain data; names the file.
        write: Makes the corpora.

    Raises:
        DataError: The file is damaged.
    """
    if folder is None:
        return write()
    text = json.dumps(identity, sort_keys=True, default=str)
    path = folder / FOLDER / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    if not path.exists():
        made = json.dumps([_plain(corpus) for corpus in write()], indent=1, ensure_ascii=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".tmp")
        beside.write_text(made, encoding="utf-8")
        beside.replace(path)
    return _read(path)


def shown(folder: Path, n: int = 3) -> list[dict[str, Any]]:
    """What was kept in a run's folder, for people: each corpus with its first ``n`` examples, cut to one short line.

    Where examples were measured (:data:`MEASURED`), their number and the mean of each measure are told as well.
    A prompt that nobody called harmless (:data:`HARMLESS`) is not shown, nor is its answer.

    Raises:
        DataError: A file is damaged.
    """
    corpora = [corpus for path in sorted((folder / FOLDER).glob("*.json")) for corpus in _read(path)]
    return [
        {"role": c.role, "name": c.name, "examples": len(c), "fingerprint": c.fingerprint, "skipped": dict(c.skipped),
         "shown": [_line(example) for example in c.examples[:n]], **_measured(c)}
        for c in corpora
    ]  # fmt: skip


def _measured(corpus: Corpus) -> dict[str, Any]:
    found: dict[str, list[float]] = {}
    for example in corpus:
        for name, value in example.tags.items():
            if name.startswith(MEASURED):
                found.setdefault(name.removeprefix(MEASURED), []).append(float(value))
    means = {name: round(fmean(values), 4) for name, values in found.items()}
    return {"measured": {"rows": max(map(len, found.values())), **means}} if found else {}


def _plain(corpus: Corpus) -> dict[str, Any]:
    examples = [{**asdict(example), "tags": dict(example.tags)} for example in corpus]
    return {"role": corpus.role, "name": corpus.name, "licence": corpus.licence, "skipped": dict(corpus.skipped),
            "examples": examples}  # fmt: skip


def _read(path: Path) -> tuple[Corpus, ...]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return tuple(
            Corpus(**{**corpus, "examples": tuple(Example(**example) for example in corpus["examples"])})
            for corpus in found
        )
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} is damaged ({error}): remove it and start the run again") from error


def _line(example: Example) -> dict[str, str]:
    harmless = example.tags.get(HARMLESS) == "yes"
    prompt = " ".join(filter(None, (example.prompt, example.input)))
    return (
        {"prompt": _cut(prompt), "response": _cut(example.response)}
        if harmless
        else {"prompt": HIDDEN, "response": HIDDEN}
    )


def _cut(text: str) -> str:
    """On one line, without control characters, no longer than :data:`WIDTH`."""
    line = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    return line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"
