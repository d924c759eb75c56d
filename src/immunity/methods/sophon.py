"""SOPHON: suppress what a fine-tune could reach, reinforce what the model is for, and again; each with its own Adam.

once      descend  1/K Σ_{k=1..K} L_out(θ_k; 10 % of batch k),  θ_k = θ_{k−1} − an attacker's step on the other 90 %
n times   descend  ℓ(θ; D_align) + κ KL(p_before ‖ p_θ)

Deng et al., arXiv 2404.12699. Fine-tuning suppression (FTS) asks that the model says nothing about restricted rows even
after a fine-tune: by default that every token is as likely as any other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Final, Literal, final

import torch
from torch import Tensor

from immunity.batch import Batch
from immunity.bounded import clamped, inverse_ce, uniform
from immunity.data.corpus import Corpora
from immunity.errors import SettingsError
from immunity.fit import Batches, Fit, fit
from immunity.losses import Loss, nll
from immunity.mechanisms import Conditioning, LookAhead, Mechanism, Unlearning
from immunity.method import Card, Method, Problem, Run, identity, problems, refuse, streams
from immunity.models import LanguageModel
from immunity.optimizers import Descent
from immunity.reference import Reference, kl
from immunity.simulated import Walker
from immunity.theta import Theta, Vector
from immunity.trajectories import adamw, lora, sgd, walk

OUTER: Final[Mapping[str, Loss]] = {
    "uniform": uniform,
    "ice": inverse_ce("paper"),
    "ice-released": inverse_ce("released"),
    "ce": clamped(),
}
"""L_out by name."""
_INNER: Final = ("lr", "optimizer", "momentum", "weight_decay", "clip", "schedule", "cycles", "warmup")
"""Settings of a run that are those of the two optimisers; the loop around them only adds up where they went."""


@dataclass(frozen=True, kw_only=True)
class SOPHON(Method):
    """A step of the run is a loop: one step of suppression (FTS), then n of reinforcement (NTR).

    Both have an optimiser of the run's kind, with moments of its own; their rates are multiples of the run's.

    Attributes:
        outer: L_out: "uniform", KL(uniform ‖ p), the paper's KLU, 0 where every token is equally likely; "ice", inverse
            cross-entropy as printed, −log(1 − p_y); "ice-released", as coded, −log softmax(−z)_y; "ce", minus the
            cross-entropy, cut at ln V.
        lookahead: K, steps of the simulated attacker.
        attacker: How he steps: "adamw" or "sgd" (the paper) on what the defence trains, "lora" by AdamW on a fresh
            adapter over a defence that trains all weights.
        lr: His learning rate.
        alpha: Rate of FTS, as a multiple of the run's. 0 is SFT, n steps of it at a time.
        beta: Rate of NTR, as a multiple of the run's.
        reinforce: n, steps of NTR in a loop.
        clip: Largest norm of the gradient of FTS; that of NTR is clipped as the run says.
        kl: κ, the weight of the divergence from the model as it was.
        rollback: A loop that leaves the loss on some alignment rows (those of the first loop) higher than it was before
            the run by more than this share is undone, and both optimisers start anew. none: nothing is undone.

    Raises:
        SettingsError: A setting is out of range.

    Source:
        arXiv 2404.12699 and its released code, ChiangE/Sophon; K = 50, 90 %, 0.5 and the multiples are the authors'.

    Departures from the paper:
        * The port to language models is ours: L_out is over response tokens, NTR has κ, the attacker is AdamW with
          K = 8. :meth:`paper` and :meth:`ice` have κ = 0 and 50 steps of SGD.
        * The paper's attackers come from several domains, here they share one role. No classification head is reset,
          and the losses for diffusion models are left out.
        * Gradients are added up while the attacker walks: the same numbers as one backward pass over K kept graphs,
          with memory that does not depend on K.
        * The attacker's 90 % are drawn anew in each step; of fewer than 20 rows, one is held out.
        * A rollback goes back by one loop and goes on; the released code goes back and stops, at 80 % of accuracy.
        * No preset for the released code: its ICE script does not parse, and both scripts need a learn2learn that
          returns gradients, which no public one does.
        * TAR's authors (arXiv 2408.00761) are said to have seen their port of it not converge: watch the log.
    """

    card: ClassVar[Card] = Card(
        name="SOPHON",
        paper="SOPHON: Non-Fine-Tunable Learning to Restrain Task Transferability For Pre-trained Models",
        arxiv="2404.12699",
        year=2024,
        block="raises the cost of harmful convergence",
        family="adversarial meta-learning",
        gradients="2K + n, twice n with κ (26 with K = 8, n = 5; the paper's K = 50 takes 105)",
        says="Takes turns: suppress what simulated fine-tunes reach, reinforce what the model is for.",
    )
    strength: ClassVar[str] = ""
    outer: Literal["uniform", "ice", "ice-released", "ce"] = "uniform"
    lookahead: int = 8
    attacker: Literal["adamw", "sgd", "lora"] = "adamw"
    lr: float = 1e-4
    alpha: float = 1.0
    beta: float = 1.0
    reinforce: int = 5
    clip: float = 0.5
    kl: float = 1.0
    rollback: float | None = 0.5

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.kl < 0 or (self.rollback is not None and self.rollback < 0):
            raise SettingsError(f"alpha ({self.alpha}), kl ({self.kl}) and rollback must not be negative")
        if self.lookahead < 1 or self.reinforce < 1:
            raise SettingsError(f"lookahead ({self.lookahead}) and reinforce ({self.reinforce}) are at least 1")
        if self.lr <= 0 or self.beta <= 0 or self.clip <= 0:
            raise SettingsError(f"lr ({self.lr}), beta ({self.beta}) and clip ({self.clip}) must be positive")

    @classmethod
    def paper(cls) -> SOPHON:
        """KLU: K = 50 steps of SGD, five steps of NTR to one of FTS, at one rate (1e-4 there)."""
        return cls(lookahead=50, attacker="sgd", kl=0.0, rollback=None)

    @classmethod
    def ice(cls) -> SOPHON:
        """The paper's other loss, as printed: K = 50 steps of SGD, one of NTR to one of FTS, at 5 and 3 times 1e-4."""
        return cls(outer="ice", lookahead=50, attacker="sgd", alpha=3.0, beta=5.0, reinforce=1, kl=0.0, rollback=None)

    @property
    def reads(self) -> Mapping[str, int]:
        """A batch of alignment data for each step of NTR, one of restricted data for each step of the attacker."""
        return {"alignment": self.reinforce, "harmful": self.lookahead}

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """Attackers of K steps, behind whom answers are unlearnt, and a bad start for learning; none with α = 0."""
        rule: Literal["plain", "adamw"] = "plain" if self.attacker == "sgd" else "adamw"
        ahead = LookAhead(steps=self.lookahead, radius=self.lr, rule=rule)
        return (ahead, Unlearning(), Conditioning()) if self.alpha else ()

    def problems(self, model: LanguageModel) -> list[Problem]:
        """α = 0; a LoRA attacker over a LoRA defence."""
        found = [] if self.alpha else [Problem("alpha", "alpha = 0 suppresses nothing; use --method sft instead")]
        if self.attacker == "lora" and hasattr(model.network, "disable_adapter"):
            found.append(
                Problem("attacker", "a fresh LoRA attacker needs a defence of all weights; say attacker=adamw")
            )
        return found

    def immunise(self, model: LanguageModel, data: Corpora, run: Run) -> None:
        """Take ``run.fit.steps`` loops. A loop is one step of the run: killed inside of it, it is taken again.

        Raises:
            SettingsError: :func:`problems` found something, batches cannot be split, or the optimiser is one whose
                weights are not where it steps.
        """
        refuse(problems(self, model, data))
        if run.rows("harmful") < 2:
            raise SettingsError("a batch of 1 harmful row cannot be split between attacker and held-out rows; use 2")
        if run.fit.optimizer == "schedulefree":
            raise SettingsError("two schedule-free optimisers cannot share one model; use optimizer='adamw'")
        found = streams(self, model, data, run)
        # The loop's two optimisers have made the steps: what is left is to add up where they went, at a rate of 1.
        around = replace(run.fit, optimizer="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, clip=None,
                         schedule="constant", warmup=0.0)  # fmt: skip
        inner = {name: value for name, value in asdict(run.fit).items() if name in _INNER}
        fit(
            model.network,
            Loop(self, run.fit, model, probe=found["alignment"](0).as_role("probe")),
            found,
            around,
            folder=run.folder,
            observe=run.observe,
            token=model.word_id,
            identity={**identity(self, model, data, run), "loop": inner},
        )

    def suppression(self, theta: Theta, harmful: Sequence[Batch]) -> Vector:
        """The gradient of FTS: the mean over K of ∇L_out where the attacker stands, on rows that he has not seen."""
        pairs = [split(rows) for rows in harmful]
        return walk(
            theta,
            self._attacker(theta),
            [seen for seen, _ in pairs],
            lambda k: theta.grad(OUTER[self.outer], pairs[k - 1][1]),
            dict.fromkeys(range(1, len(pairs) + 1), 1.0 / len(pairs)),
        )

    def _attacker(self, theta: Theta) -> Walker:
        if self.attacker == "sgd":
            return sgd(self.lr)
        return lora(theta, self.lr) if self.attacker == "lora" else adamw(theta, self.lr)


def split(rows: Batch) -> tuple[Batch, Batch]:
    """The attacker's 90 % of a batch, and the rest, at least a row; drawn from torch's generator."""
    order, n = torch.randperm(len(rows)).tolist(), max(1, len(rows) // 10)

    def those(chosen: Sequence[int], role: str) -> Batch:
        return Batch(tuple(rows.rows[i] for i in chosen), role, tuple(rows.weights[i] for i in chosen))

    return those(order[n:], rows.role), those(order[:n], "heldout")


@final
class Loop:
    """A loop as a direction for :func:`~immunity.fit.fit`: minus the way from θ to where the loop ends.

    Args:
        how: The method.
        inner: What both optimisers are, and their rate, before α and β.
        model: Before the first step.
        probe: Alignment rows that the rollback looks at.

    Attributes:
        suppression: Optimiser of FTS.
        reinforcement: Optimiser of NTR.
    """

    def __init__(self, how: SOPHON, inner: Fit, model: LanguageModel, probe: Batch) -> None:
        self._how, self._inner, self._probe = how, inner, probe
        self._parameters: list[Tensor] = [p for p in model.network.parameters() if p.requires_grad]
        self._kept = kl(Reference(model.network)) if how.kl else None
        self._done, self._rollbacks, self._sound = 0, 0, math.nan
        self._renew()

    def _renew(self) -> None:
        self.suppression, self.reinforcement = (self._descent() for _ in range(2))

    def _descent(self) -> Descent:
        how = self._inner
        return Descent(self._parameters, how.optimizer, lr=how.lr, momentum=how.momentum, weight_decay=how.weight_decay)

    def __call__(self, theta: Theta, batch: Batches) -> Vector:
        """θ minus the end of the loop; theta is where it was. Zero if the loop is undone."""
        if self._how.rollback is not None and self._done == 0:
            self._sound = theta.value(nll, self._probe)
        rate = self._inner.rate(self._done)
        with theta.excursion():
            if self._how.alpha:
                g = self._how.suppression(theta, batch["harmful"].parts(self._how.lookahead))
                self.suppression.step(_clipped(g, self._how.clip).tensors(), self._how.alpha * rate)
            for rows in batch["alignment"].parts(self._how.reinforce):
                g = self._reinforced(theta, rows)
                self.reinforcement.step(_clipped(g, self._inner.clip).tensors(), self._how.beta * rate)
            undone = self._spoilt(theta)
            end = theta.parameters if undone else [p.detach().clone() for p in theta.parameters]
        if undone:
            self._rollbacks += 1
            self._renew()
        self._done += 1
        theta.trace.update({"lr/loop": rate, "rollbacks": float(self._rollbacks)})
        with torch.no_grad():
            return Vector(list(torch._foreach_sub(theta.parameters, end)))

    def _reinforced(self, theta: Theta, rows: Batch) -> Vector:
        g = theta.grad(nll, rows)
        return g if self._kept is None else g + self._how.kl * theta.grad(self._kept, rows)

    def _spoilt(self, theta: Theta) -> bool:
        share = self._how.rollback
        return share is not None and theta.value(nll, self._probe) > (1.0 + share) * self._sound

    def state_dict(self) -> dict[str, Any]:
        """Both optimisers', how many loops are done and undone, and the loss that rollbacks compare with."""
        return {
            "suppression": self.suppression.state_dict(),
            "reinforcement": self.reinforcement.state_dict(),
            "done": self._done,
            "rollbacks": self._rollbacks,
            "sound": self._sound,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.suppression.load_state_dict(state["suppression"])
        self.reinforcement.load_state_dict(state["reinforcement"])
        self._done, self._rollbacks, self._sound = int(state["done"]), int(state["rollbacks"]), float(state["sound"])


def _clipped(g: Vector, most: float | None) -> Vector:
    length = g.norm()
    return g if most is None or length <= most else g * (most / length)
