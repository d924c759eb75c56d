"""What a battery leaves behind: ``result.json`` from its outcomes, crashed and skipped attacks included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from immunity.attacks.recipe import Recipe
from immunity.bench import probes, store
from immunity.bench.assault import Assault, origin
from immunity.bench.hardened import hardened
from immunity.bench.hardened import origin as made_from
from immunity.bench.worker import Outcome
from immunity.data.corpus import Corpora
from immunity.errors import INAPPLICABLE, ResumeError
from immunity.measure.suite import Suite
from immunity.metrics.battery import summary
from immunity.metrics.counted import counted, verb
from immunity.metrics.trap import verdict_rows
from immunity.pretrained import EMBEDDED

TRACEBACK: Final = 4000
"""Characters of a traceback that are kept."""


def written(
    folder: Path,
    card: Mapping[str, Any],
    outcomes: Mapping[str, Outcome],
    skipped: Sequence[Mapping[str, Any]],
    trials: Sequence[Mapping[str, Any]],
    *,
    suite: Suite,
    data: Corpora,
    seconds: float,
) -> dict[str, Any]:
    """Write the result of a battery, and return what it says.

    Args:
        folder: Where it goes.
        card: What was run: "name", "models" (under attack first) and the settings.
        outcomes: Of every attack.
        skipped: Rows of :func:`skipped_row`.
        trials: Of searches.
        suite: What was measured.
        data: What the attacker has.
        seconds: From the first attack to the last.
    """
    records = [outcome.record for outcome in outcomes.values() if outcome.record is not None]
    names = [str(row["model"]) for row in card["models"]]
    known = [hardened(name) for name in names]
    first = made_from(names[0])
    result = store.result(
        title=f"{names[0]} under the battery {card['name']}",
        command=store.command(),
        seconds=seconds,
        model={
            "name": first,
            "parameters": records[0]["parameters"] if records else None,
            "licence": "Apache-2.0" if first in EMBEDDED else "see its card",
        },
        hardened=[one.record for one in known if one.record is not None],
        attacked=records,
    )
    lost = [outcome for outcome in outcomes.values() if outcome.record is None]
    result["failures"] = [_failure(outcome) for outcome in lost if not outcome.inapplicable]
    result["skipped"] = [*skipped, *(_passed_over(outcome) for outcome in lost if outcome.inapplicable)]
    result["battery"] = {**card, **probes.evidence(records, known, suite, data), "trials": list(trials)}
    plain = store.plain(store.same_run(folder / store.RESULT, result))
    plain["verdicts"] = verdict_rows(plain)
    plain["battery"]["summary"] = summary(plain)
    store.write(folder / store.RESULT, plain)
    return store.read(folder / store.RESULT)


def refuse_other(folder: Path, card: Mapping[str, Any]) -> None:
    """A result is not replaced by that of another battery; one that goes on past a break may be.

    Raises:
        ResumeError: The folder holds another result.
    """
    path = folder / store.RESULT
    if not path.exists():
        return
    known = store.read(path).get("battery") or {}
    mine = {name: value for name, value in store.plain(card).items() if name != "exhaustive"}
    if found := store.differences({name: known[name] for name in mine if name in known}, mine):
        raise ResumeError(f"{path} holds another result: {found[0]}. Choose another --out")


def skipped_row(recipe: Recipe, model: str, why: str) -> dict[str, Any]:
    """An attack that was not run."""
    return {"defence": model, "attack": recipe.id, "why": why, "recipe": origin(recipe)}


def inapplicable(skipped: Sequence[Mapping[str, Any]], model: str) -> list[str]:
    """What to say of the attacks that there is no way to make on a model: one line for all of them, or none."""
    names = [
        str(row["attack"]) for row in skipped if row["defence"] == model and str(row["why"]).startswith(INAPPLICABLE)
    ]
    n = len(names)
    told = f"{counted(n, 'attack')} {verb(n, 'does', 'do')} not apply to this model: {', '.join(names)}"
    return [f"what cannot be tried: {told}"] if n else []


def _passed_over(outcome: Outcome) -> dict[str, Any]:
    row = _failure(outcome)
    return {"defence": row["defence"], "attack": row["attack"], "why": row["error"], "recipe": row["recipe"]}


def _failure(outcome: Outcome) -> dict[str, Any]:
    job, why = outcome.job, {"error": outcome.error, "details": _tail(outcome.details)}
    if not isinstance(job, Assault):
        return {"defence": "", "attack": job.title, "seed": 0, **why, "recipe": None}
    return {
        "defence": job.defence,
        "attack": job.name,
        "seed": job.attack.seed,
        **why,
        "recipe": None if job.recipe is None else origin(job.recipe),
    }


def _tail(details: str) -> str:
    """The end of a traceback, which says where it was and what."""
    return details if len(details) <= TRACEBACK else f"…{details[-TRACEBACK:]}"
