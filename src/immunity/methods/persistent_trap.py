"""PersistentTrap: a collapse trap for attackers who go on, planted along simulated fine-tunes that outlive a step.

descend  ∇ℓ(θ; D_align) + λ { ∇F(θ+δ; D_general) + μ ∇R(θ+δ; D_harm)       if δ is an attacker's
                            { κ ∇ℓ(θ+δ; D_general ∪ D_benign)              if δ is an honest user's
         + λ β ∇cos(∇ℓ(·; D_harm), ∇ℓ(·; D_general)), at θ, at an attacker's θ+δ, or at both

One δ out of a pool has its turn in each step. Before anything is asked there it goes on, m times, by a step of its own
optimiser along ∇ℓ(θ+δ; its data); after T ~ U(horizon) steps it starts anew from 0. F is least where the model has
collapsed (ℓ_collapse, as in CTRAP, arXiv 2505.16559, eq. 1), R where it says nothing about restricted prompts. The
cosine is SEAM's (arXiv 2505.12186): where it is -1, what an attacker learns on is what general ability is lost by.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, ClassVar, Final, Literal, TypeAlias, final

from immunity.attackers import Pool
from immunity.attractors import attractor, spread
from immunity.batch import Batch
from immunity.coupling import SURVIVES, cosine, cosine_gradient, expected_survival, lost
from immunity.errors import ModelError, SettingsError
from immunity.fit import Batches
from immunity.hidden import n_layers
from immunity.losses import Loss, nll
from immunity.mechanisms import Collapse, GradientCoupling, LookAhead, Mechanism
from immunity.method import Card, Problem, StatefulMethod
from immunity.models import LanguageModel
from immunity.profiles import Profile
from immunity.theta import Theta, Vector

Parts: TypeAlias = tuple[Batch, ...]


EPS: Final = 5e-3
"""How far away gradients are taken again for the cosine: SEAM's ε, as found on the tiny model (its own is .001)."""
_NO_WORDS: Final = frozenset({"uniform", "random", "none"})


@dataclass(frozen=True, kw_only=True)
class PersistentTrap(StatefulMethod):
    """CTRAP asked at places far along fine-tunes, which are simulated a few steps at a time and kept between steps.

    "Persistent" as in persistent contrastive divergence, whose chains also go on while the model under them is trained.

    Attributes:
        lam: λ, the weight of all that is asked away from θ. 0 is SFT, bit for bit.
        pool: Who is simulated, one member for each text, as in "adamw lr=3e-5..3e-4 replay=0..0.5"; see
            :class:`~immunity.profiles.Profile`. A member "on=benign" is an honest user. Turns go round.
        horizon: Least and greatest number of steps before a member starts anew. As many as ``moves`` twice is no
            persistence: K = ``moves`` steps from θ each time.
        moves: m, steps that a member takes in his turn.
        general: F, what general text falls to behind an attacker: a word, or several that shall be equally likely, as
            in "error+sorry"; "uniform" (maximum entropy), "random" (a random map of hidden states), or "none".
        restricted: R, the same of restricted text. Apart from F, so that the attacker is not led back to language.
        mu: μ, the weight of R.
        clear: κ, the weight of the ordinary loss behind an honest user: the path that must stay clear.
        couple: β at θ, and β behind an attacker: weights of the cosine between restricted and general gradients, which
            is to become -1. Four more gradients at each place where it is not 0.
        most: Largest norm, before λ, of what is asked away from θ. Behind an attacker it can be a hundred times that of
            ∇ℓ(θ; D_align), which a run that clips their sum would then hardly follow. none: no limit.

    Raises:
        SettingsError: A setting is out of range, or a member of the pool cannot be read.

    Source:
        No paper. CTRAP (arXiv 2505.16559) is what it extends; that chains persist is Tieleman's idea (ICML 2008).

    Departures from the paper:
        * There is none to depart from; from CTRAP it takes ℓ_collapse on general data, and that gradients behind a
          simulated attacker are applied at θ (first order).
        * CTRAP's attacker starts at θ in every step and takes one normalised step. These go on, as fine-tunes do:
          AdamW at a rate of their own, clipped at 1, over all weights or a fresh adapter.
        * Restricted text has a target of its own, and honest users are simulated; CTRAP has neither.
        * SEAM has its cosine at θ alone; here it may also be asked where an attacker has got to. Behind one it counts
          under ``most``.
        * Memory: δ is a copy of the trainable weights and AdamW's moments two, so 3 copies for each member; one with
          an adapter (r > 0) holds 3 of that adapter. In the default's pool these are 6 copies and 3 adapters.
    """

    card: ClassVar[Card] = Card(
        name="Persistent Trap",
        paper="No paper: this library's own extension of CTRAP",
        arxiv="2505.16559",
        year=2026,
        block="conditional collapse",
        family="collapse trap",
        gradients="m + 3 (m + 2 where an honest user has his turn; 4 with m = 1), one forward pass; 4 a coupled place",
        says="Plants a trap along simulated fine-tunes that go on from step to step, and keeps honest ones clear.",
    )
    strength: ClassVar[str] = "lam"
    lam: float = 1.0
    pool: tuple[str, ...] = (
        "adamw lr=3e-5..3e-4",
        "adamw lr=3e-4..3e-3 r=8",
        "adamw lr=1e-4..1e-3 on=benign",
    )
    horizon: tuple[int, int] = (16, 64)
    moves: int = 1
    general: str = "error"
    restricted: str = "uniform"
    mu: float = 0.33
    clear: float = 1.0
    couple: tuple[float, float] = (0.0, 0.0)
    most: float | None = 1.0

    def __post_init__(self) -> None:
        if min(self.lam, self.mu, self.clear, *self.couple) < 0:
            weights = {name: getattr(self, name) for name in ("lam", "mu", "clear", "couple")}
            said = ", ".join(f"{name} = {value}" for name, value in weights.items())
            raise SettingsError(f"{said}: none of them may be negative")
        if self.most is not None and not self.most > 0:
            raise SettingsError(f"most = {self.most}: a norm is positive; say none for no limit")
        if not 1 <= self.moves <= self.horizon[0] <= self.horizon[1]:
            raise SettingsError(
                f"horizon = {self.horizon}: two rising numbers from moves = {self.moves} on, as in 16,64"
            )
        if all(who.on == "benign" for who in self._profiles):
            raise SettingsError(f"pool = {self.pool}: nobody in it is an attacker")

    @property
    def reads(self) -> Mapping[str, int]:
        """Alignment; a batch for each step that is simulated, and one for each target, of what the pool needs."""
        who, m = self._profiles, self.moves
        honest = any(one.on == "benign" for one in who)
        benign = m * (honest or any(one.mix[1] > 0 for one in who)) + honest
        asked, coupled = self.general != "none" or honest, any(self.couple)
        general = m * any(one.replay[1] > 0 for one in who) + (asked or coupled)
        wanted = {"harmful": m + (self.restricted != "none" or coupled), "general": general, "benign": benign}
        return {"alignment": 1, **{role: times for role, times in wanted.items() if times}}

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """Attackers of so many steps at the middle of their rates, and a collapse behind them; none with λ = 0."""
        found: list[Mechanism] = []
        for who in self._profiles:
            rule: Literal["adamw", "plain"] = "adamw" if who.optimizer in {"adamw", "adam"} else "plain"
            if who.on == "harmful":
                found.append(LookAhead(steps=self.horizon[1], radius=math.sqrt(math.prod(who.lr)), rule=rule))
        for on, target in (("general", self.general), ("harmful", self.restricted)):
            words = _words(target)
            word = words[0] if len(words) == 1 else ""
            found += [Collapse(word=word, on=on)] if target != "none" else []
        found += [GradientCoupling()] if any(self.couple) else []
        return tuple(dict.fromkeys(found)) if self.lam else ()

    def problems(self, model: LanguageModel) -> list[Problem]:
        """Weights that are 0; words that the tokenizer does not have; states that cannot be read; an ε that is lost."""
        idle = {
            "lam": self.lam == 0,
            "mu": self.mu == 0 and self.restricted != "none",
            "clear": self.clear == 0 and any(who.on == "benign" for who in self._profiles),
            "general": self.general == self.restricted == "none" and not any(self.couple),
        }
        instead = "use --method sft for the baseline"
        found = [Problem(name, f"with this value nothing is asked; {instead}") for name, bad in idle.items() if bad]
        targets = {name: getattr(self, name) for name in ("general", "restricted")}
        found += [Problem(name, why) for name, target in targets.items() if (why := _unusable(target, model))]
        weights = [p for p in model.network.parameters() if p.requires_grad]
        if any(self.couple) and weights and (kept := expected_survival(weights, EPS)) < SURVIVES:
            found.append(Problem("couple", lost(kept, EPS)))
        return found

    def start(self, model: LanguageModel) -> Trapping:
        """A pool that has not moved yet."""
        return Trapping(self, model)

    @property
    def _profiles(self) -> tuple[Profile, ...]:
        return tuple(map(Profile.read, self.pool))


@final
class Trapping:
    """The direction: one member of the pool after the other has his turn, and is asked where he stands then.

    Attributes:
        pool: Everyone's state.
    """

    def __init__(self, how: PersistentTrap, model: LanguageModel) -> None:
        self._how, self._reads = how, how.reads
        self.pool = Pool(model.network, how._profiles, how.horizon)
        self._general, self._restricted = (_loss(target, model) for target in (how.general, how.restricted))

    def __call__(self, theta: Theta, batch: Batches) -> Vector:
        """∇ℓ(θ; D_align) + λ times what is asked of the member whose turn it is."""
        g = theta.grad(nll, batch["alignment"])
        if self._how.lam == 0:
            return g
        harmful, general, benign = (self._parts(batch, role) for role in ("harmful", "general", "benign"))
        if self._general is not None:
            theta.value(self._general, general[-1])  # the trap must not show at θ: logged at every step
        if here := self._how.couple[0]:
            g = g + self._how.lam * here * self._coupled(theta, general, harmful, "theta")
        number, member = self.pool.turn()
        member.walk(theta, [member.fed(*rows) for rows in self._meals(harmful, general, benign)])
        delta = member.displacement()
        theta.trace[f"distance/{number}"] = delta.norm()
        with theta.moved(delta):
            asked = self._clear(theta, general, benign) if member.honest else self._fallen(theta, general, harmful)
        return g if asked is None else g + self._how.lam * self._bounded(asked)

    def _bounded(self, asked: Vector) -> Vector:
        most, length = self._how.most, asked.norm()
        return asked if most is None or length <= most else asked * (most / length)

    def _fallen(self, theta: Theta, general: Parts, harmful: Parts) -> Vector | None:
        """∇F + μ ∇R + β ∇cos; None where nothing is asked."""
        asked = []
        if self._general is not None:
            asked.append(theta.grad(self._general, general[-1]))
        if self._restricted is not None:
            asked.append(self._how.mu * theta.grad(self._restricted, harmful[-1]))
        if behind := self._how.couple[1]:
            asked.append(behind * self._coupled(theta, general, harmful, "behind"))
        return reduce(add, asked) if asked else None

    def _coupled(self, theta: Theta, general: Parts, harmful: Parts, where: str) -> Vector:
        """∇cos(∇ℓ(D_harm), ∇ℓ(D_general)), from where ``theta`` stands."""
        rows = harmful[-1], general[-1]
        at = theta.grad(nll, rows[0]), theta.grad(nll, rows[1])
        theta.trace[f"cosine/{where}"] = cosine(*at)
        return cosine_gradient(theta, nll, rows, at, eps=EPS)

    def _clear(self, theta: Theta, general: Parts, benign: Parts) -> Vector:
        """κ ∇ℓ: behind an honest user the model is what he made of it, and good at everything else."""
        return self._how.clear * theta.grad(nll, (general[-1] + benign[-1]).as_role("clear"))

    def _meals(self, harmful: Parts, general: Parts, benign: Parts) -> list[tuple[Batch, Batch | None, Batch | None]]:
        """For each step of a turn a batch of (restricted, benign, general) rows, None where the pool needs none."""
        replayed = general if any(who.replay[1] > 0 for who in self._how._profiles) else ()
        return [
            (harmful[k], benign[k] if benign else None, replayed[k] if replayed else None)
            for k in range(self._how.moves)
        ]

    def _parts(self, batch: Batches, role: str) -> Parts:
        return batch[role].parts(self._reads[role]) if role in self._reads else ()

    def state_dict(self) -> dict[str, Any]:
        """The pool's."""
        return self.pool.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.pool.load_state_dict(state)


def _words(target: str) -> tuple[str, ...]:
    """The words that a target names; none if it is another attractor."""
    return () if target in _NO_WORDS else tuple(target.split("+"))


def _loss(target: str, model: LanguageModel) -> Loss | None:
    """What is least where text has fallen to a target; None for none."""
    if target == "none":
        return None
    words = _words(target)
    return attractor("words" if words else target, model.network, [model.word_id(word) for word in words])


def _unusable(target: str, model: LanguageModel) -> str:
    """What stands against a target: words that the tokenizer lacks, hidden states that cannot be read; or ""."""
    try:
        if words := _words(target):
            spread([model.word_id(word) for word in words])
        _ = n_layers(model.network) if target == "random" else 0
    except (ModelError, SettingsError) as error:
        return str(error)
    return ""
