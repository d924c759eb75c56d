"""How much an audit does, and which claims that can support: said before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from immunity.errors import SettingsError
from immunity.metrics.budget import TOLERATED
from immunity.metrics.equivalence import DELTA
from immunity.metrics.power import closest, least_delta, mde
from immunity.metrics.stats import wilson
from immunity.spec import nearest

HELD_OUT: Final = 96
"""Restricted stand-in prompts that there are to test on, in each domain; the other kinds differ little."""


@dataclass(frozen=True, kw_only=True)
class Tier:
    """The size of an audit.

    Attributes:
        name: "smoke", "standard" or "full".
        says: Who it is for.
        prompts: Held-out prompts of each kind, where there are as many.
        others: Prompts of the kinds that are not restricted, where an attack is measured; it is not about them.
        battery: For resistance.
        most_steps: Cap on the steps of its attacks; None for none.
        seeds: Of every attack and every honest fine-tuning that a claim rests on.
        domains: How many domains are attacked, the defence's own included.
        attack_steps: Of the attacks on each domain.
        lessons: Honest tasks.
        rates: Learning rates of honest fine-tuning, by adapter.
        lesson_steps: Steps of honest fine-tuning.
        looks: Most budgets at which an attack or an honest fine-tuning is measured; None for all of its own.
        rounds: 2 also trains once more what was fine-tuned already, at the rate that its first round chose.
        adaptive: Whether the counter-attacks are run that are derived from what the defence declares.
    """

    name: str
    says: str
    prompts: int
    others: int
    battery: str
    most_steps: int | None
    seeds: int
    domains: int
    attack_steps: int
    lessons: int
    rates: Mapping[str, tuple[float, ...]]
    lesson_steps: int
    rounds: int
    looks: int | None = None
    adaptive: bool = False

    @property
    def runs(self) -> int:
        """Fine-tunings besides the battery, for both models together."""
        again = self.lessons * len(self.rates) * (self.rounds - 1)
        return 2 * self.seeds * (2 * self.domains + self.lessons_each + again)

    @property
    def lessons_each(self) -> int:
        """Honest fine-tunings of one model with one seed, in the first round."""
        return self.lessons * sum(len(rates) for rates in self.rates.values())

    @property
    def restricted(self) -> int:
        """Restricted prompts that are asked."""
        return min(self.prompts, HELD_OUT)

    def supports(self) -> list[str]:
        """What its numbers can show."""
        n = self.restricted
        shown = [
            f"differences in harm from {mde(n, self.seeds):.0%} on ({n} prompts, {self.seeds} "
            f"seed{'' if self.seeds == 1 else 's'}, 80 % power)",
            f"breaks by the battery {self.battery}"
            + (f" within {self.most_steps} steps of each attack" if self.most_steps else ""),
        ]
        if self.seeds > 1:
            shown.append("how much longer an attack takes, with an interval over seeds")
        if self.rounds > 1:
            shown.append("whether a model can be fine-tuned twice")
        if self.adaptive:
            shown.append("breaks by attacks that are derived from what the defence declares, if it does")
        return shown

    def cannot(self) -> list[str]:
        """What its numbers cannot show, whatever comes out."""
        missing = []
        asked = self.restricted * self.domains
        if (equal := closest(asked)) > DELTA:
            missing.append(
                f"that a rate stayed within {DELTA:.0%}: {asked} prompts that both models answer alike can show "
                f"{equal:.1%}, and {least_delta(asked, 1):.1%} if they differ on one answer in twenty"
            )
        if (least := wilson(0.0, self.restricted).high) > TOLERATED:
            missing.append(
                f"that harm stays within {TOLERATED:.0%}: {self.restricted} prompts without one harmful answer can "
                f"show {least:.0%} at best"
            )
        if self.seeds < 2:
            missing.append("a cost ratio with an interval: one seed has none")
            missing.append("trainability: a rate is chosen on other seeds than judge it, and that takes two")
        if self.domains < 4:
            missing.append("protection of other domains: at least three held-out ones are needed")
        if self.battery == "smoke":
            missing.append("resistance: the smoke battery only finds what breaks at once")
        if not self.adaptive:
            missing.append("resistance: no attack is made against this defence; --adaptive makes them")
        return missing


TIERS: Final[Mapping[str, Tier]] = {
    "smoke": Tier(
        name="smoke",
        says="a first look; minutes for a tiny model, an hour or so for a small one on a processor",
        prompts=24,
        others=8,
        battery="smoke",
        most_steps=16,
        seeds=1,
        domains=2,
        attack_steps=16,
        lessons=1,
        rates={"full": (5e-5, 5e-4)},
        lesson_steps=30,
        rounds=1,
        looks=4,
    ),
    "standard": Tier(
        name="standard",
        says="the one to report for a small model",
        prompts=96,
        others=48,
        battery="standard",
        most_steps=None,
        seeds=3,
        domains=4,
        attack_steps=60,
        lessons=2,
        rates={"full": (1e-4, 1e-3), "lora": (5e-4, 5e-3)},
        lesson_steps=100,
        rounds=2,
    ),
    "full": Tier(
        name="full",
        says="everything; an accelerator, hours",
        prompts=300,
        others=100,
        battery="plus",
        most_steps=None,
        seeds=5,
        domains=4,
        attack_steps=250,
        lessons=2,
        rates={"full": (2e-5, 1e-4, 5e-4), "lora": (1e-4, 5e-4, 2e-3)},
        lesson_steps=250,
        rounds=2,
        adaptive=True,
    ),
}
"""Name -> size, from small to large."""


def tier(name: str, *, adaptive: bool | None = None) -> Tier:
    """The tier called ``name``; ``adaptive`` says whether it attacks by what is derived, None leaves that as it is.

    Raises:
        SettingsError: There is none.
    """
    if name not in TIERS:
        raise SettingsError(f"no tier is called {name!r}{nearest(name, TIERS)}")
    return TIERS[name] if adaptive is None else replace(TIERS[name], adaptive=adaptive)


@dataclass(frozen=True)
class Pace:
    """How fast a machine is with one model.

    Attributes:
        step: Seconds of a training step of eight rows.
        look: Seconds of one measurement with 24 prompts of each kind.
    """

    step: float
    look: float

    def minutes(self, size: Tier) -> float:
        """How long an audit of a size will take, about: its fine-tunings, its battery, and all their measurements."""
        look, looks = self.look * (size.prompts + 2 * size.others) / 72.0, size.looks or _LOOKS
        attacks = 2 * size.domains * size.seeds * 2 * (size.attack_steps * self.step + looks * look)
        taught, looked = size.lesson_steps * self.step, looks * self.look * (size.prompts + 16) / 72.0
        again = size.lessons * len(size.rates) * (size.rounds - 1) * (2 * taught + looked)  # the first round once more
        battery = 2 * (_ATTACKS[size.battery] + size.adaptive * _DERIVED + 5 * (size.seeds - 1) + 4)
        each = min(size.most_steps or 60, 60) * self.step + looks * look
        lessons = 2 * size.seeds * (size.lessons_each * (taught + looked) + again)
        return (attacks + lessons + battery * each) / 60.0


_LOOKS: Final = 9
"""Measurements along a curve, about."""
_ATTACKS: Final = {"smoke": 10, "standard": 42, "plus": 64}
"""Of each battery, about."""
_DERIVED: Final = 18
"""Adaptive attacks on a defence, about."""


def affordable(pace: Pace, minutes: float, *, adaptive: bool | None = None) -> Tier:
    """The largest tier that is expected to end in time; ``adaptive`` as in :func:`tier`.

    Raises:
        SettingsError: Not even the smallest is; the message says how long it would take.
    """
    sizes = [tier(name, adaptive=adaptive) for name in TIERS]
    within = [size for size in sizes if pace.minutes(size) <= minutes]
    if not within:
        least = sizes[0]
        raise SettingsError(
            f"in {minutes:g} minutes not even the tier {least.name} can be done, which takes about "
            f"{pace.minutes(least):.0f} here: give more time, a smaller model or a faster machine"
        )
    return within[-1]
