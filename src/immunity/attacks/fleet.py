"""Many fine-tuning attackers at once: LoRA attackers of one released model train side by side (``immunity.fleet``)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from pathlib import Path

from immunity.attacks.attack import Attack, Opening
from immunity.attacks.curve import Curve, Enough, EnoughSeenError, Measure, Recorder, Spent, recorded
from immunity.attacks.finetune import FineTune
from immunity.data.corpus import Corpora
from immunity.errors import DivergedError, SettingsError
from immunity.fit import Observe, Streams, Training, compute
from immunity.fleet import Fleet, train
from immunity.models import LanguageModel


def groups(attacks: Sequence[Attack], most: int | None = None) -> list[list[int]]:
    """Which attacks may run as one fleet: their places in ``attacks``, each once.

    Together go fine-tunes that train a fresh LoRA on the same blocks, in the same precision, without a guard. Any other
    attack is a group of its own.

    Args:
        attacks: Of one released model.
        most: Members of a fleet; None for no limit.

    Raises:
        SettingsError: ``most`` is below 1.
    """
    if most is not None and most < 1:
        raise SettingsError(f"most = {most}: a fleet has at least one member")
    found: dict[Hashable, list[int]] = {}
    for i, attack in enumerate(attacks):
        kind = _kind(attack)
        found.setdefault(("alone", i) if kind is None else kind, []).append(i)
    size = most or max(1, len(attacks))
    return [members[i : i + size] for members in found.values() for i in range(0, len(members), size)]


def fits(attack: Attack) -> bool:
    """Whether an attack can be in a fleet at all; with which others, :func:`groups` says."""
    return _kind(attack) is not None


def fits_together(attacks: Sequence[Attack]) -> bool:
    """Whether :func:`run_fleet` takes these attacks."""
    return len(groups(attacks)) == 1 and fits(attacks[0])


def run_fleet(
    attacks: Sequence[FineTune],
    opening: Opening,
    data: Sequence[Corpora],
    measures: Sequence[Measure],
    *,
    folders: Sequence[Path | None] | None = None,
    observes: Sequence[Observe | None] | None = None,
    enough: Sequence[Enough | None] | None = None,
    at: Sequence[tuple[int, ...]] | None = None,
) -> list[Curve]:
    """:meth:`Attack.run` for every one of ``attacks``, side by side: the same points, up to rounding.

    A folder is that of the attack by itself: what was begun alone is finished here, and the other way round. The
    seconds of a point are the attack's share of the fleet's.

    Args:
        attacks: Such as :func:`fits_together`.
        opening: What they all attack, as files.
        data: For each what its ``reads`` gave.
        measures: One each.
        folders: One each; None keeps nothing.
        observes: One each, told of every step.
        enough: One each, asked at every point; that attack ends there if it says so.
        at: Budgets to measure each at; all of its own if None.

    Returns:
        A curve for each; one that diverged, or showed enough, ends early and says why.

    Raises:
        SettingsError: The attacks cannot train side by side, or something is not one each.
        ResumeError: A folder holds another run.
    """
    if not fits_together(attacks):
        raise SettingsError("these attacks cannot be one fleet: part them with groups(…)")
    k = len(attacks)
    places, watchers, stops = folders or [None] * k, observes or [None] * k, enough or [None] * k
    looks = [attack.budgets for attack in attacks] if at is None else at
    if {k} != {len(data), len(measures), len(places), len(watchers), len(stops), len(looks)}:
        raise SettingsError(f"{k} attacks need as many data, measures, folders, observers, stops and looks: one each")
    recorders = [
        Recorder(measure=measures[i], at=looks[i], folder=places[i], then=watchers[i], enough=stops[i])
        for i in range(k)
    ]
    seats = [_Seat(attack, mine) for attack, mine in zip(attacks, data, strict=True)]
    fleet = Fleet(opening.load("merged"), seats)
    runs = [_training(fleet, i, seats[i], recorders[i]) for i in range(k)]
    ended = train(
        fleet,
        runs,
        ends=(DivergedError, EnoughSeenError),
        charge=lambda i, seconds: recorders[i].charge(seconds),
    )
    return [recorded(recorder, partial(_end, error)) for recorder, error in zip(recorders, ended, strict=True)]


class _Seat:
    """Puts an attacker's adapter on the model; keeps what the attacker knows of the model while it is its own."""

    def __init__(self, attack: FineTune, data: Corpora) -> None:
        self.attack = attack
        self.data = data
        self.streams: Streams = {}
        self.spent: Callable[[int], Spent] = lambda _: Spent()

    def __call__(self, model: LanguageModel) -> LanguageModel:
        trained = self.attack.trained(model)
        streams = self.attack.streams(self.data, trained)
        self.streams, self.spent = streams, self.attack.spent(trained, streams["train"])
        return trained


def _training(fleet: Fleet, i: int, seat: _Seat, recorder: Recorder) -> Training:
    how, model = seat.attack.how(), fleet.models[i]
    return Training(
        fleet.point(i, micro_batch=how.micro_batch, autocast=compute(how)),
        seat.streams,
        how,
        folder=recorder.folder,
        observe=recorder.follow(model, seat.spent),
        identity=seat.attack.identity(model, seat.data),
    )


def _kind(attack: Attack) -> Hashable | None:
    """What the members of a fleet have in common; None for an attack that can be in none."""
    if not isinstance(attack, FineTune) or attack.adapter != "lora" or attack.guard != "none":
        return None
    return attack.layers, attack.autocast


def _end(error: Exception | None) -> None:
    if error is not None:
        raise error
