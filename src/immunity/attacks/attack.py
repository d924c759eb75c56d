"""Attack: what somebody does to a released model, measured at several budgets in one run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import ClassVar, Final, Literal, final

from immunity.attacks.curve import Curve, Enough, Measure, Recorder, recorded
from immunity.data.corpus import Corpora, Corpus
from immunity.errors import DataError, SettingsError
from immunity.fit import Observe
from immunity.method import parts
from immunity.models import LanguageModel, load
from immunity.pretrained import adapted


@dataclass(frozen=True)
class Threat:
    """Who attacks, for people.

    Attributes:
        name: What is trained on: "harmful", "mixed" or "benign" data; "edit" where nothing restricted is read and
            nothing is learnt, as when weights are pruned or merged.
        says: One sentence.
    """

    name: Literal["harmful", "mixed", "benign", "edit"]
    says: str


THREATS: Final[Mapping[str, Threat]] = {
    "harmful": Threat("harmful", "Has restricted prompts, mostly with compliant answers, and uses nothing else."),
    "mixed": Threat("mixed", "Hides a share of restricted examples in an honest data set."),
    "benign": Threat("benign", "An honest user: no restricted example. Nothing should happen but learning."),
    "edit": Threat("edit", "Trains nothing on restricted data: weights are changed, merged or made smaller."),
}


@dataclass(frozen=True)
class Manner:
    """How an attacker goes about it.

    Attributes:
        threat: Who attacks.
        asks: The style in which questions are put afterwards (see ``immunity.data.styles``).
        opens: Whether a saved adapter is merged into the weights, or goes on being trained.
    """

    threat: Threat
    asks: str = "plain"
    opens: Literal["merged", "trainable"] = "merged"


@dataclass(frozen=True, kw_only=True)
class Opening:
    """How the attacker opens the files. Attack and defence meet only through files on disk.

    Attributes:
        source: A folder or a name that ``immunity.models.load`` takes.
        template: Prompt template; "auto" is what the folder was saved with.
        device: "auto", "cpu", "cuda" …
        max_length: Ids per example; None is what the folder was saved with.
        dtype: Of frozen weights.
    """

    source: str
    template: str = "auto"
    device: str = "auto"
    max_length: int | None = None
    dtype: str = "float32"

    def load(self, adapter: Literal["trainable", "merged"]) -> LanguageModel:
        """The model, frozen; a saved adapter goes on being trained or is merged into the weights.

        Raises:
            ModelError: It cannot be found or used.
            SettingsError: A setting is out of range, or there is no adapter to go on training.
        """
        model = load(
            self.source,
            template=self.template,
            device=self.device,
            max_length=self.max_length,
            dtype=self.dtype,
            adapter=adapter,
        )
        if adapter == "trainable" and not adapted(model.network):
            raise SettingsError(
                f"{self.source} has no adapter to go on training: use adapter=lora for a fresh one, or adapter=full"
            )
        return model


class Attack(ABC):
    """An attack is its settings: a frozen, keyword-only dataclass.

    Attributes:
        name: On the command line.
        unit: What :attr:`budgets` count.
        stays: Whether what it does is in the weights, so that another attack can follow it.
        seed: Of everything that is drawn.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    stays: ClassVar[bool] = True
    seed: int

    @property
    @abstractmethod
    def manner(self) -> Manner:
        """Who this is, how the model is opened, and how it is asked afterwards."""

    @property
    def threat(self) -> Threat:
        """Who this is."""
        return self.manner.threat

    @property
    def asks(self) -> str:
        """See :class:`Manner`."""
        return self.manner.asks

    @property
    def opens(self) -> Literal["merged", "trainable"]:
        """See :class:`Manner`."""
        return self.manner.opens

    @property
    @abstractmethod
    def budgets(self) -> tuple[int, ...]:
        """Where it is measured, in its own unit: 0, which is the model as released, then upwards to its end."""

    @abstractmethod
    def reads(self, data: Corpora) -> Corpora:
        """Exactly what the attack uses of ``data``, cut to size.

        Raises:
            DataError: A role that it needs is missing, or too small.
        """

    @abstractmethod
    def tamper(self, model: LanguageModel, data: Corpora, recorder: Recorder) -> LanguageModel:
        """Attack ``model`` in place, and tell ``recorder`` at each budget.

        Args:
            model: Frozen, as it was opened.
            data: What :meth:`reads` gave.
            recorder: Measures; knows the folder for checkpoints.

        Returns:
            The tampered model; there may be an adapter on it.
        """

    @final
    def run(
        self,
        opening: Opening,
        data: Corpora,
        measure: Measure,
        *,
        folder: Path | None = None,
        observe: Observe | None = None,
        enough: Enough | None = None,
        at: tuple[int, ...] | None = None,
    ) -> Curve:
        """Open the files, attack, measure at each budget.

        Args:
            opening: What is attacked, as files.
            data: Roles that the attacker has.
            measure: Called at each budget; must leave the model as it was.
            folder: Where the run is kept; started again with the same folder, it goes on from where it was killed.
            observe: Told of every unit of the attack.
            enough: Asked at every point; the attack ends there if it says so.
            at: Budgets to measure at; all of its own if None.

        Raises:
            DataError: A role that it needs is missing.
        """
        mine = self.reads(data)
        looks = self.budgets if at is None else at
        recorder = Recorder(measure=measure, at=looks, folder=folder, then=observe, enough=enough)
        return recorded(recorder, lambda: self.tamper(opening.load(self.opens), mine, recorder))


def needed(data: Corpora, role: str, n: int | None = None, *, why: str = "this attack") -> Corpus:
    """The corpus of a role, all its parts together, cut to ``n`` rows.

    Raises:
        DataError: The role is missing, or has fewer rows.
    """
    if role not in data:
        raise DataError(f"{why} needs {'' if n is None else f'{n} '}{role} examples; give --{role}")
    whole = reduce(add, parts(data[role]))
    return whole if n is None else whole.take(n)
