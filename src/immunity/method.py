"""Method and its shapes: a defence is its settings, a frozen dataclass with one open verb."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, final

from immunity.batch import Batch
from immunity.data.corpus import Corpora, Corpus
from immunity.data.dealt import dealt, partner
from immunity.data.written import kept
from immunity.errors import DataError, SettingsError
from immunity.feeding import parts, stream, token_sets
from immunity.fit import Batches, Direction, Fit, Observe, fit
from immunity.losses import nll
from immunity.mechanisms import Mechanism
from immunity.models import LanguageModel
from immunity.theta import Theta, Vector

__all__ = [
    "Block", "Card", "DataEdit", "Descending", "GradientMethod", "Method", "Problem", "Run", "StatefulMethod",
    "identity", "parts", "problems", "refuse", "started", "stream", "streams", "token_sets",
]  # fmt: skip

Block = Literal["baseline", "raises the cost of harmful convergence", "conditional collapse"]


@dataclass(frozen=True)
class Card:
    """What a method is, for people: shown by ``immunity list`` and in reports.

    Attributes:
        name: The paper's own name.
        paper: Title.
        arxiv: Identifier, or "" if there is none.
        year: Of the first version.
        block: The taxonomy's block.
        family: The approach inside the block.
        gradients: Gradient evaluations per step, in words.
        says: One sentence.
        elsewhere: Where the paper is if not on arXiv, with its number there.
    """

    name: str
    paper: str
    arxiv: str
    year: int
    block: Block
    family: str
    gradients: str
    says: str
    elsewhere: str = ""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What surrounds a method: everything that is not the paper's.

    Attributes:
        fit: How to descend.
        batch_size: Rows per batch, for each role; a role that is not named gets ``default_batch_size``.
        default_batch_size: See ``batch_size``.
        folder: Checkpoints and metrics; None keeps nothing.
        observe: Told of every step.
    """

    fit: Fit
    batch_size: Mapping[str, int] = field(default_factory=dict)
    default_batch_size: int = 8
    folder: Path | None = None
    observe: Observe | None = None

    def rows(self, role: str) -> int:
        """Rows per batch of ``role``."""
        return self.batch_size.get(role, self.default_batch_size)


class Problem(NamedTuple):
    """Something that would stop a run, or make it worthless, with what to do about it."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class Method(ABC):
    """A defence. Subclasses are frozen, keyword-only dataclasses: settings and nothing else.

    Attributes:
        card: What it is, for people.
        trains: Whether it trains, and so needs weights that are trainable (:mod:`immunity.weight_edit` does not).
    """

    card: ClassVar[Card]
    trains: ClassVar[bool] = True

    @property
    @abstractmethod
    def reads(self) -> Mapping[str, int]:
        """Role -> how many batches of it a step reads. Nothing else is handed to the method."""

    @property
    @abstractmethod
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """What this defence, with these settings, does to a model; the adaptive attacks are derived from it.

        () for a baseline, and for settings with which nothing is done.
        """

    @abstractmethod
    def problems(self, model: LanguageModel) -> list[Problem]:
        """What this method cannot do with this model or these settings (an inert setting counts)."""

    @abstractmethod
    def immunise(self, model: LanguageModel, data: Corpora, run: Run) -> None:
        """Harden ``model`` in place."""


class GradientMethod(Method):
    """A method that is fully described by the direction it steps in."""

    @abstractmethod
    def gradient(self, theta: Theta, batch: Batches) -> Vector:
        """The direction to descend along, at ``theta``. Leaves ``theta`` where it found it."""

    @final
    def immunise(self, model: LanguageModel, data: Corpora, run: Run) -> None:
        """Descend along :meth:`gradient`.

        Raises:
            SettingsError: :func:`problems` found something; the message lists all of it.
        """
        _descend(self, model, data, run)


class StatefulMethod(Method):
    """A method whose direction carries something from step to step, or needs the model as it was before the first."""

    @abstractmethod
    def start(self, model: LanguageModel) -> Direction:
        """A fresh direction, made before the first step, and again before a killed run goes on.

        One that carries something from step to step is :class:`~immunity.keeper.Stateful`: what it carries is saved
        with the run. Like :meth:`GradientMethod.gradient` it leaves the point that it is given where it found it.
        """

    @final
    def immunise(self, model: LanguageModel, data: Corpora, run: Run) -> None:
        """Descend along the direction that :meth:`start` makes.

        Raises:
            SettingsError: :func:`problems` found something; the message lists all of it.
        """
        _descend(self, model, data, run)


class DataEdit(Method):
    """A method that trains on other data than it was given, and otherwise is plain SFT.

    Attributes:
        mean: A setting of each: "example" averages tokens within a row and then rows, "token" over a batch's tokens.
    """

    mean: Literal["example", "token"]

    @abstractmethod
    def rewrite(self, model: LanguageModel, data: Corpora, run: Run) -> tuple[Corpus, ...]:
        """What is trained on instead of ``data``: corpora of the role "alignment", which share each batch evenly.

        The same for the same settings, model, data and ``run.fit.seed``. Leaves the model, and torch's random numbers,
        as found. What it wrote is kept in ``run.folder``, where a long rewriting may keep its own state as well.
        """

    @final
    def immunise(self, model: LanguageModel, data: Corpora, run: Run) -> None:
        """Train on what :meth:`rewrite` writes.

        Raises:
            SettingsError: :func:`problems` found something; the message lists all of it.
        """
        refuse(problems(self, model, data))
        dealt_out = dealt(self.reads, data)
        mine = {role: dealt_out[role] for role in self.reads}
        who = identity(self, model, mine, run)
        corpora = kept(run.folder, who | {"seed": run.fit.seed}, lambda: self.rewrite(model, mine, run))
        rows = run.rows("alignment")
        fit(
            model.network,
            partial(_plainly, self.mean),
            {"alignment": stream(token_sets(corpora, model), rows, run.fit.seed)},
            run.fit,
            folder=run.folder,
            observe=run.observe,
            identity=who | {"written": [corpus.fingerprint for corpus in corpora], "written_rows": rows},
        )


def _plainly(mean: Literal["example", "token"], theta: Theta, batch: Batches) -> Vector:
    rows = batch["alignment"]
    return theta.grad(nll, rows.by_tokens() if mean == "token" else rows)


Descending = GradientMethod | StatefulMethod
"""A method that is a direction to descend along."""


def started(method: Descending, model: LanguageModel) -> Direction:
    """The direction that a method steps along, fresh."""
    return method.start(model) if isinstance(method, StatefulMethod) else method.gradient


def _descend(method: Descending, model: LanguageModel, data: Corpora, run: Run) -> None:
    refuse(problems(method, model, data))
    data = dealt(method.reads, data)
    fit(
        model.network,
        started(method, model),
        streams(method, model, data, run),
        run.fit,
        folder=run.folder,
        observe=run.observe,
        token=model.word_id,
        identity=identity(method, model, {role: data[role] for role in method.reads}, run),
    )


def streams(method: Method, model: LanguageModel, data: Corpora, run: Run) -> dict[str, Callable[[int], Batch]]:
    """Role -> (step -> batch), for every role that a method reads; "safe" walks beside the prompts it answers."""
    tokens = {role: token_sets(data[role], model) for role in method.reads}
    beside = {"safe": partner(method.reads)}
    return {
        role: stream(sets, run.rows(role), run.fit.seed, method.reads[role], beside.get(role, ""))
        for role, sets in tokens.items()
    }


def problems(method: Method, model: LanguageModel, data: Corpora) -> list[Problem]:
    """Everything that would stop ``method`` on this model and data, at once, before any compute is spent."""
    found = []
    try:
        data = dealt(method.reads, data)
    except DataError as error:
        found.append(Problem("data", str(error)))
    found += [
        Problem(role, f"{method.card.name} needs data for the role {role!r}; give --{role} or add it to `data`")
        for role in method.reads
        if role not in data
    ]
    if method.trains and not any(p.requires_grad for p in model.network.parameters()):
        found.append(Problem("model", "nothing is trainable: call attach(model, LoRA()) or all_weights(model)"))
    return found + method.problems(model)


def refuse(found: list[Problem]) -> None:
    """Stop on problems.

    Raises:
        SettingsError: There is one; the message lists them all.
    """
    if found:
        raise SettingsError("\n".join(["cannot start:", *[f"  - {problem}" for problem in found]]))


def identity(method: Method, model: LanguageModel, data: Corpora, run: Run) -> dict[str, object]:
    """What makes a run this run, beside its :class:`Fit`: settings, model, data, batch sizes."""
    return {
        "method": type(method).__name__,
        "settings": asdict(method),  # type: ignore[call-overload]
        "model": model.source,
        "max_length": model.max_length,
        "data": {role: [part.fingerprint for part in parts(corpus)] for role, corpus in data.items()},
        "rows": {role: run.rows(role) for role in data},
    }
