"""What the benchmark packages return, as rows: nothing of theirs is imported, so that old results can be read, too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, Final

from immunity.metrics.benchmarks import Row, row


def of_lm_eval(found: Mapping[str, Any]) -> list[Row]:
    """Rows of what ``lm_eval.evaluate`` returns with ``log_samples``.

    Each task has a row for each metric and filter, and each group one for each metric that all of its parts have: over
    all their questions, so that a part counts by its size.

    Args:
        found: With "results", "samples", "configs", "higher_is_better" and "group_subtasks".
    """
    inside = {task: group for group in found.get("group_subtasks", {}) for task in _leaves(found, group)}
    parts = {task: _task_rows(found, task, inside.get(task, "")) for task in found["samples"]}
    groups = [group for group in found.get("group_subtasks", {}) if group not in _nested(found)]
    return [
        *(one for group in groups for one in _group_rows(group, [parts[task] for task in _leaves(found, group)])),
        *(one for of_task in parts.values() for one in of_task),
    ]


def _task_rows(found: Mapping[str, Any], task: str, group: str) -> list[Row]:
    scores, samples, config = found["results"][task], found["samples"][task], found["configs"][task]
    better = found.get("higher_is_better", {}).get(task, {})
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    metrics = list(dict.fromkeys(name for sample in samples for name in sample["metrics"]))
    wanted = [str(one["metric"]) for one in config.get("metric_list") or () if str(one["metric"]) in metrics]
    first = ((wanted or metrics)[:1] or [""])[0], (filters[:1] or [""])[0]
    made = []
    for name in metrics:
        for used in filters:
            key = f"{name},{used}"
            asked = sorted((s for s in samples if s["filter"] == used and name in s), key=lambda s: s["doc_id"])
            if key not in scores:
                continue
            made.append(
                row(
                    task,
                    name if len(filters) == 1 else f"{name}, {used}",
                    scores[key],
                    [sample[name] for sample in asked],
                    stderr=scores.get(f"{name}_stderr,{used}"),
                    more=better.get(name),
                    first=(name, used) == first,
                    items=[(sample["doc_id"], sample["doc_hash"]) for sample in asked],
                    group=group,
                )
            )
    return made


def _group_rows(group: str, parts: Sequence[Sequence[Row]]) -> list[Row]:
    made = []
    for one in parts[0] if parts else ():
        same = [r for part in parts for r in part if r["metric"] == one["metric"] and r["per_item"] is not None]
        if len(same) < len(parts):
            continue
        values = [value for r in same for value in r["per_item"]]
        made.append(
            row(
                group,
                one["metric"],
                sum(values) / len(values),
                values,
                more=one["more"],
                first=one["first"],
                items=[r["items"] for r in same],
            )
        )
    return made


def _leaves(found: Mapping[str, Any], group: str) -> list[str]:
    """The tasks of a group, those of its groups among them."""
    below = found["group_subtasks"]
    return [leaf for name in below[group] for leaf in (_leaves(found, name) if name in below else [name])]


def _nested(found: Mapping[str, Any]) -> set[str]:
    return {name for names in found["group_subtasks"].values() for name in names}


_GRADES: Final = {"C": 1.0, "I": 0.0, "P": 0.5, "N": 0.0}
"""Inspect's letters: correct, incorrect, partly, no answer."""
_ERRORS: Final = ("stderr", "bootstrap_stderr")
_SPREADS: Final = (*_ERRORS, "std", "var")
"""Metrics of Inspect's that say how sure another one is."""


def of_inspect(logs: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Rows of Inspect's logs, as JSON has them.

    A question that was asked in several epochs counts once, with its mean. Inspect does not say of a score whether more
    is better; its graders' letters and metrics mean that, so it is taken to be.

    Args:
        logs: Each with "eval", "results" and "samples".
    """
    return [
        one
        for log in logs
        for i, score in enumerate(log["results"]["scores"])
        for one in _score_rows(str(log["eval"]["task"]).rpartition("/")[2], score, log["samples"], first=i == 0)
    ]


def _score_rows(
    task: str, score: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], *, first: bool
) -> Iterator[Row]:
    samples = sorted(samples, key=lambda sample: (len(str(sample["id"])), str(sample["id"]), sample["epoch"]))
    values: dict[str, list[float | None]] = {}
    for sample in samples:
        value = (sample["scores"] or {}).get(score["scorer"], {}).get("value")
        value = value.get(score["name"]) if isinstance(value, Mapping) else value
        values.setdefault(str(sample["id"]), []).append(_graded(value))
    means = [None if None in found else fmean(found) for found in values.values()]  # type: ignore[arg-type]
    asked = [(sample["id"], _text(sample["input"]), sample["target"]) for sample in samples]
    stderr = next((m["value"] for name, m in score["metrics"].items() if name in _ERRORS), None)
    for name, metric in score["metrics"].items():
        if name not in _SPREADS:
            shown = name if name == score["name"] else f"{name}, {score['name']}"
            yield row(task, shown, metric["value"], means, stderr=stderr, first=first, items=asked)
            first = False


def _text(asked: object) -> object:
    """What was asked, without the ids that every run draws anew."""
    return [(turn["role"], turn["content"]) for turn in asked] if isinstance(asked, list) else asked


def _graded(value: object) -> float | None:
    """A score as a number, letters by Inspect's own rule; None if it is neither."""
    if isinstance(value, str):
        return _GRADES.get(value)
    return float(value) if isinstance(value, bool | int | float) else None
