"""Program: attacks one after the other, as a released model goes through many hands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, final

from immunity import adapters
from immunity.attacks.attack import THREATS, Attack, Manner
from immunity.attacks.curve import Point, Recorder, Spent
from immunity.attacks.operations import operation
from immunity.data.corpus import Corpora
from immunity.errors import SettingsError
from immunity.models import LanguageModel

_UNSEEN: Final = Point(step=0, examples=0, seconds=0.0, metrics={}, n_prompts={}, samples=(), per_prompt={})
"""What is measured within an operation: nothing."""


@final
@dataclass(frozen=True, kw_only=True)
class Program(Attack):
    """Each operation attacks what the one before it left; adapters are merged in between.

    Attributes:
        ops: Each is a line of text, the name of an attack followed by its settings: "finetune harmful=0 steps=20",
            "prune shares=50", "ask template=alpaca".
        seed: Of every operation that does not set its own.

    Raises:
        SettingsError: An operation cannot be read, or leaves nothing in the weights that the next one could attack.

    Source:
        Our own: what a model meets after its release. Two-round fine-tuning is its simplest case.

    Departures from the paper:
        There is no paper. Points are measured between operations, not within them.
    """

    name: ClassVar[str] = "program"
    unit: ClassVar[str] = "operations"
    ops: tuple[str, ...] = ("finetune harmful=0 steps=30", "finetune harmful=1 steps=30")
    seed: int = 1

    def __post_init__(self) -> None:
        if not self.ops:
            raise SettingsError('ops is empty: say what is done, as in ops=("finetune harmful=0 steps=20", …)')
        object.__setattr__(self, "ops", tuple(self.ops))
        for op in self.attacks:
            if not op.stays:
                raise SettingsError(f"{op.name} changes no weight, so nothing can follow it: attack with it alone")
            if op.opens != "merged":
                raise SettingsError(f"{op.name}: between operations adapters are merged, so none can be continued")

    @property
    def attacks(self) -> tuple[Attack, ...]:
        """The operations as values.

        Raises:
            SettingsError: One cannot be read; the message names it.
        """
        return tuple(operation(text, self.seed) for text in self.ops)

    @property
    def manner(self) -> Manner:
        """The worst threat of its operations', and the last style that one of them has."""
        found = {op.threat.name for op in self.attacks}
        asks = next((op.asks for op in reversed(self.attacks) if op.asks != "plain"), "plain")
        return Manner(THREATS[next(name for name in THREATS if name in found)], asks)

    @property
    def budgets(self) -> tuple[int, ...]:
        """After each operation."""
        return tuple(range(len(self.ops) + 1))

    def reads(self, data: Corpora) -> Corpora:
        """What each operation reads, under "1 train", "2 train" and so on.

        Raises:
            DataError: A role that one of them needs is missing, or too small.
        """
        return {f"{i} {role}": corpus for i, op in self._numbered() for role, corpus in op.reads(data).items()}

    def tamper(self, model: LanguageModel, data: Corpora, recorder: Recorder) -> LanguageModel:
        """See :meth:`Attack.tamper`."""
        recorder.reached(0, model)
        spent = Spent()
        for i, op in self._numbered():
            own = {role.removeprefix(f"{i} "): part for role, part in data.items() if role.startswith(f"{i} ")}
            inner = Recorder(
                measure=lambda _: _UNSEEN,
                at=op.budgets,
                folder=None if recorder.folder is None else recorder.folder / f"operation-{i}",
            )
            model = adapters.merged(op.tamper(model, own, inner))
            model.network.requires_grad_(False)
            spent += inner.spent
            recorder.reached(i, model, spent)
        return model

    def _numbered(self) -> list[tuple[int, Attack]]:
        return list(enumerate(self.attacks, 1))
