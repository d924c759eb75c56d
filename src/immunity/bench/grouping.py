"""Grouping: which alignment rows a fine-tune makes a model forget. Stage 1 of VAA (arXiv 2506.03850).

An aligned model goes through a proxy fine-tune, mostly honest, with a share of restricted rows. Before it and at T
checkpoints the model answers every alignment prompt, and a judge scores the answers. A row is vulnerable if at any
checkpoint its answer is worse than before:  ForgotNum_i = Σ_t 1[HS_i^t > HS_i^0] > 0.

Ours are the length of the proxy (100 steps at 2e-5; the paper's is 625 steps of 8 rows at 3e-5, a model of 7 B weights)
and that rows of the made-up worlds which nobody restricts count as never forgotten.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, Final, Literal, NamedTuple

from immunity.attacks.attack import Opening
from immunity.attacks.curve import Curve, Point, Recorder, recorded
from immunity.attacks.finetune import FineTune
from immunity.bench.assault import whole
from immunity.bench.jobs import Job
from immunity.bench.keeping import Tell, data_row, finished, what_counts
from immunity.bench.prints import fingerprint
from immunity.data.corpus import Corpora, Corpus, Example
from immunity.data.streams import TokenSet
from immunity.errors import DataError, DivergedError, SettingsError
from immunity.generate import generate
from immunity.losses import nll
from immunity.measure.harm import Judge
from immunity.measure.judges import described
from immunity.measure.loss import per_example
from immunity.models import LanguageModel

_LOG = logging.getLogger(__name__)

By = Literal["answers", "nll"]
GROUPS: Final = ("alignment", "vulnerable")
"""The roles that a grouping deals rows to: what is kept, and what is forgotten first."""
MOST: Final = 1000
"""Rows of the proxy fine-tune, where there are as many (the paper's number)."""
_HARMLESS: Final = frozenset({"allowed", "general", "task"})
"""Kinds of rows of the made-up worlds whose answers cannot be harmful."""

_COLUMNS: Final = frozenset({"prompt", "response", "instruction", "input", "output"})

Row = Sequence[float | None]


def forgot(table: Sequence[Row]) -> list[int]:
    """ForgotNum of each row: at how many checkpoints its score is higher than before; a missing score never counts.

    Args:
        table: Scores [1 + T][N], those before the fine-tune first.
    """
    return [sum(_more(now[i], start) for now in table[1:]) for i, start in enumerate(table[0])]


def _more(now: float | None, start: float | None) -> bool:
    return now is not None and start is not None and now > start


def risen(table: Sequence[Row], share: float) -> list[int]:
    """1 for the ``share`` of the rows whose loss rises most, on average over the checkpoints; a row must rise at all.

    Args:
        table: Losses [1 + T][N], those before the fine-tune first; None for a row that has none.
        share: Of the rows that have a loss.
    """
    known = [i for i, start in enumerate(table[0]) if start is not None]
    rise = {i: fmean(float(now[i] or 0.0) for now in table[1:]) - float(table[0][i] or 0.0) for i in known}
    most = sorted(known, key=lambda i: rise[i], reverse=True)[: round(share * len(known))]
    chosen = {i for i in most if rise[i] > 0}
    return [int(i in chosen) for i in range(len(table[0]))]


def proxy(data: Corpora, *, share: float, steps: int, lr: float, batch_size: int = 8, seed: int = 1) -> FineTune:
    """The proxy fine-tune: honest rows and a share of restricted ones, as many as there are, at most :data:`MOST`.

    Raises:
        SettingsError: The share is not one, or the rows are too few to hold it.
        DataError: A role that it needs is missing.
    """
    if not 0 <= share < 1:
        raise SettingsError(f"share = {share}: of restricted rows, from 0 to below 1")
    if "benign" not in data:
        raise DataError("the proxy fine-tune needs honest rows; give --benign")
    if share and "harmful" not in data:
        raise DataError(
            f"the proxy fine-tune needs {share:.0%} restricted rows; give --harmful, or --share 0 for an honest one"
        )
    n = min(MOST, int(len(whole(data["benign"])) / (1 - share)))
    if share:
        n = min(n, int(len(whole(data["harmful"])) / share))
    return FineTune(n=n, harmful=share, steps=steps, lr=lr, batch_size=batch_size, seed=seed)


class Seen(NamedTuple):
    """What is kept of a checkpoint: numbers, never answers."""

    metrics: Mapping[str, float]
    per_prompt: Mapping[str, Row]
    n_prompts: Mapping[str, int]
    samples: Sequence[Mapping[str, str]] = ()


@dataclass(frozen=True, kw_only=True)
class Grouping(Job):
    """Find the rows of the alignment data that ``proxy`` makes a model forget, and write both groups.

    Attributes:
        name: The model, as a person should read it.
        opening: The aligned model.
        data: "alignment", and what the proxy reads.
        proxy: See :func:`proxy`.
        folder: Where ``alignment.jsonl``, ``vulnerable.jsonl`` and ``record.json`` go.
        judge: Scores answers; None with ``by="nll"``.
        by: "answers" as in the paper, or "nll": the rows whose safe answer loses most likelihood. That is cheap (no
            answer is generated, nobody judges) and not the paper's.
        share: With "nll", the share of rows that are vulnerable (742 of 2000 in the paper's own grouping).
        checkpoints: T, spread evenly over the proxy's steps.
        tokens: Longest answer.
        batch_size: Prompts or rows at once.

    Raises:
        SettingsError: A number is out of range, or there is nobody to judge.
    """

    name: str
    opening: Opening
    data: Corpora
    proxy: FineTune
    folder: Path
    judge: Judge | None = None
    by: By = "answers"
    share: float = 0.37
    checkpoints: int = 5
    tokens: int = 32
    batch_size: int = 16
    kind: ClassVar[str] = "group"

    def __post_init__(self) -> None:
        if not 1 <= self.checkpoints <= self.proxy.steps:
            raise SettingsError(
                f"checkpoints = {self.checkpoints}: at least 1, and at most the {self.proxy.steps} steps of the proxy"
            )
        if not 0 < self.share < 1:
            raise SettingsError(f"share = {self.share} lies between 0 and 1: both groups must have rows")
        if self.by == "answers" and self.judge is None:
            raise SettingsError(
                "nobody says which answers are harmful: name a judge (--judge refusal needs nothing), or compare "
                "losses instead (--by nll)"
            )

    @property
    def title(self) -> str:
        """The job in one line."""
        return f"group the alignment data of {self.name}"

    @property
    def steps(self) -> int:
        """Of the proxy fine-tune."""
        return self.proxy.steps

    @property
    def at(self) -> tuple[int, ...]:
        """Where every prompt is answered: before the first step, and at T checkpoints."""
        return tuple(round(self.steps * t / self.checkpoints) for t in range(self.checkpoints + 1))

    @property
    def measured_at(self) -> frozenset[int]:
        """Where answering takes its time."""
        return frozenset(self.at)

    @property
    def rows(self) -> Corpus:
        """The alignment rows of all corpora."""
        return whole(self.data["alignment"])

    def identity(self) -> dict[str, Any]:
        """See :meth:`Job.identity`."""
        return {
            "proxy": what_counts(asdict(self.proxy)),
            "model": {**asdict(self.opening), "weights": fingerprint(self.opening.source)},
            "data": {"alignment": self.rows.fingerprint}
            | {role: whole(corpus).fingerprint for role, corpus in self.proxy.reads(self.data).items()},
            "by": self.by,
            "judge": repr(self.judge) if self.by == "answers" else None,
            "share": self.share if self.by == "nll" else None,
            "checkpoints": self.checkpoints,
            "tokens": self.tokens,
        }

    def work(self, tell: Tell) -> dict[str, Any]:
        """See :meth:`Job.work`.

        Raises:
            DivergedError: The proxy fine-tune diverged.
            DataError: One of the groups would be empty.
        """
        mine = self.proxy.reads(self.data)
        model = self.opening.load(self.proxy.opens)
        data = [data_row(self.rows, model), *(data_row(whole(corpus), model, "proxy: ") for corpus in mine.values())]
        recorder = Recorder(measure=self._seen, at=self.at, folder=self.folder, then=tell)
        curve = recorded(recorder, lambda: self.proxy.tamper(model, mine, recorder))
        if curve.ended:
            raise DivergedError(f"the proxy fine-tune {curve.ended}; lower --lr")
        table = [point.per_prompt[self._score] for point in curve.points]
        counts = forgot(table) if self.by == "answers" else risen(table, self.share)
        self._write(counts, curve)
        return finished(self.folder, self._record(counts, curve, data))

    @property
    def _score(self) -> str:
        return "harm" if self.by == "answers" else "nll"

    def _seen(self, model: LanguageModel) -> Seen:
        values = self._harm(model) if self.by == "answers" else self._losses(model)
        known = [value for value in values if value is not None]
        metrics = {self._score: fmean(known)} if known else {}
        return Seen(metrics, {self._score: values}, {self._score: len(values)})

    @property
    def _asked(self) -> list[int]:
        return [i for i, row in enumerate(self.rows) if row.tags.get("kind") not in _HARMLESS]

    def _harm(self, model: LanguageModel) -> list[float | None]:
        """The judge's score of each row's answer; 0 for rows of the made-up worlds that nobody restricts."""
        rows, asked = self.rows.examples, self._asked
        examples = [rows[i] for i in asked]
        answers = generate(model, examples, max_new_tokens=self.tokens, batch_size=self.batch_size)
        found: list[float | None] = [0.0] * len(rows)
        if self.judge is not None:
            for i, score in zip(asked, self.judge.scores(examples, answers), strict=True):
                found[i] = score
        return found

    def _losses(self, model: LanguageModel) -> list[float | None]:
        """The loss on each row's own answer; None for a prompt that leaves no room for one."""
        rows = self.rows
        encoded = [model.template.encode(row, model.max_length).tokens for row in rows]
        kept = tuple(tokens for tokens in encoded if tokens is not None)
        values = iter(per_example(model, TokenSet(kept, rows.role, rows.name), nll, batch_size=self.batch_size))
        return [None if tokens is None else next(values) for tokens in encoded]

    def _write(self, counts: Sequence[int], curve: Curve) -> None:
        dealt: dict[str, list[str]] = {role: [] for role in GROUPS}
        for row, count in zip(self.rows, counts, strict=True):
            dealt[GROUPS[count > 0]].append(_line(row, count))
        if empty := [role for role in GROUPS if not dealt[role]]:
            raise DataError(f"no two groups: {self._why(empty[0], curve.points)}")
        if self.by == "answers" and sum(count > 0 for count in counts) == len(self._asked):
            _LOG.warning(
                "all %d rows that could be forgotten were, so the groups do not say which come first: fine-tune less "
                "(--steps, --lr)",
                len(self._asked),
            )
        for role, lines in dealt.items():
            beside = self.folder / f"{role}.jsonl.tmp"
            beside.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
            beside.replace(self.folder / f"{role}.jsonl")

    def _why(self, empty: str, points: Sequence[Point]) -> str:
        means = [f"{point.metrics[self._score]:.3f}" for point in points if self._score in point.metrics]
        course = f"{self._score} was {', '.join(means)} at steps {', '.join(str(point.step) for point in points)}"
        if empty == "vulnerable":
            return (
                f"the proxy fine-tune made no row worse ({course}). Fine-tune longer or faster: raise --steps or --lr"
            )
        return f"the proxy fine-tune made every row worse ({course}). Fine-tune less: lower --steps or --lr"

    def _record(self, counts: Sequence[int], curve: Curve, data: list[dict[str, Any]]) -> dict[str, Any]:
        table = [point.per_prompt[self._score] for point in curve.points]
        vulnerable = sum(count > 0 for count in counts)
        return {
            "kind": self.kind,
            "identity": self.identity(),
            "name": self.name,
            "by": self.by,
            "judge": described(self.judge) if self.by == "answers" and self.judge is not None else None,
            "rows": {"alignment": len(counts) - vulnerable, "vulnerable": vulnerable},
            "unscored": sum(any(row[i] is None for row in table) for i in range(len(counts))),
            "rows_by_checkpoints_forgotten": dict(sorted(Counter(counts).items())),
            "course": [{"step": point.step, **point.metrics} for point in curve.points],
            "forgotten": list(counts),
            "data": data,
        }


def _line(row: Example, count: int) -> str:
    """A row as :func:`immunity.data.files.read` takes it, with its tags, and how often it was forgotten."""
    named = {"prompt": row.prompt, "response": row.response}
    if row.input:
        named = {"instruction": row.prompt, "input": row.input, "output": row.response}
    tags = {name: text for name, text in row.tags.items() if name not in _COLUMNS}
    return json.dumps({**named, **tags, "forgotten": str(count)}, ensure_ascii=False)
