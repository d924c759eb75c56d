"""AntiDote: prefer the safe answer under the worst patch that a network, trained against the model, can write.

adversary:  minimise over φ  −log σ(π̃(y_h|x) − π̃(y_s|x))
defender:   minimise over θ  −log σ(π̃(y_s|x) − π̃(y_h|x)) + λ ℓ(θ; D_align) + β KL(p_θ ‖ p_base; D_align)

π̃ is the log-probability per token under W + ΔW, ΔW = V U of low rank, written by a hypernetwork φ from what each linear
layer sees of the prompt x, with ‖ΔW‖ ≤ ρ ‖W‖; y_s is a safe answer and y_h a harmful one; what follows λ and β is of
the model without ΔW.

arXiv 2509.08000, from its equations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from immunity.batch import Batch
from immunity.errors import ModelError, SettingsError
from immunity.fit import Batches
from immunity.hypernetwork import Hypernetwork, Per, apart, hypernetwork, preferred_under
from immunity.losses import nll
from immunity.mechanisms import Mechanism, Patches
from immunity.method import Card, Problem, StatefulMethod
from immunity.models import LanguageModel
from immunity.optimizers import Descent
from immunity.patches import Targets, sizes
from immunity.reference import Reference, kl
from immunity.theta import Theta, Vector

WEIGHT_DECAY = 0.01
"""Of the adversary's AdamW: torch's own."""


@dataclass(frozen=True, kw_only=True)
class AntiDote(StatefulMethod):
    """A few steps of the adversary, then the gradient of the defender's objective under its patches.

    Attributes:
        rank: r of ΔW.
        width: Of the hypernetwork. The released code's 1024 makes 124 million parameters beside a 3B model.
        rho: ρ, the cap of ‖ΔW‖/‖W‖, layer by layer. 0 patches nothing: a preference for safe answers, no attacker.
        lam: λ, the weight of the loss on alignment data.
        beta: β, the weight of the divergence from the model as it was.
        adversary_lr: The learning rate of φ.
        adversary_steps: Steps of φ before each step of the defender, each on rows of its own.
        per: A patch for each "example", or one for a "batch"; then the rows of a batch are coupled.
        targets: Which linear layers are patched: "attention" (the released code), or "all-linear".
        grad_through_activations: Whether the defender's gradient counts that ΔW depends on θ, through what the layers
            see. False takes the patches as constants, which saves a backward pass over the prompts.

    Raises:
        SettingsError: A setting is out of range.

    Source:
        The equations of arXiv 2509.08000 in public transcriptions (λ, β and the rate of φ are theirs), not checked
        against the PDF; rank, targets and the wide hypernetwork are the released code's.

    Departures from the paper:
        * There is no preset for the released code, which cannot have given the paper's results: its hypernetwork runs
          without gradients when it should learn, what accumulates there on the defender is spent in its first step,
          batches of the defender are never tokenised, chosen and rejected answers are swapped, hooks pile up.
        * Blocks are short: each step of the defender follows ``adversary_steps`` of φ, in one step of a run. The
          paper takes k and k in turn, the released code with k = 2000.
        * ‖ΔW‖ is capped, without which the adversary wins by breaking the model. V starts at 0 and is in units of the
          cap, against ‖W‖ as it was before the first step, without adapters.
        * The adversary maximises log σ(π̃(y_h) − π̃(y_s)), which is bounded; the paper's second equation, as it is
          transcribed, has −log σ(π̃(y_s) − π̃(y_h)), which is not.
        * ΔW = V U; the paper's V^⊤ U has no fitting shapes. Only tokens of the prompt are looked at, and pads never.
        * The divergence is taken on the alignment data; where the paper takes it is not known to us.
        * The default is small, a hypernetwork of width 64 with a rate of its own. The paper trains a LoRA defender of
          rank 16 (lr 3e-5) for eight epochs; here what is trained is free.
    """

    card: ClassVar[Card] = Card(
        name="AntiDote",
        paper="AntiDote: Bi-level Adversarial Training for Tamper-Resistant LLMs",
        arxiv="2509.08000",
        year=2025,
        block="raises the cost of harmful convergence",
        family="learnt adversary",
        gradients="4 and 2 for each step of the adversary (6 in all), and forward passes over prompts and the original",
        says="Trains a network that writes harmful patches for the weights, and a model that stays safe under them.",
    )
    strength: ClassVar[str] = ""
    rank: int = 8
    width: int = 64
    rho: float = 0.1
    lam: float = 0.8
    beta: float = 0.3
    adversary_lr: float = 1e-3
    adversary_steps: int = 1
    per: Per = "example"
    targets: Targets = "attention"
    grad_through_activations: bool = True

    def __post_init__(self) -> None:
        if self.rho < 0 or self.lam < 0 or self.beta < 0:
            raise SettingsError(f"rho = {self.rho}, lam = {self.lam}, beta = {self.beta}: none may be negative")
        if self.adversary_lr <= 0 or self.adversary_steps < 1 or self.rank < 1 or self.width < 1:
            raise SettingsError(
                f"adversary_lr = {self.adversary_lr}, adversary_steps = {self.adversary_steps}, rank = {self.rank}, "
                f"width = {self.width}: all must be positive"
            )

    @classmethod
    def paper(cls) -> AntiDote:
        """A hypernetwork as wide as the released one. λ = 0.8, β = 0.3, the adversary's rate 2e-4."""
        return cls(width=1024, adversary_lr=2e-4)

    @property
    def reads(self) -> Mapping[str, int]:
        """One batch of alignment data; pairs of a harmful and a safe answer, for every step of both sides."""
        return {"alignment": 1, "harmful": self.adversary_steps + 1, "safe": self.adversary_steps + 1}

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """The worst patch, of radius ρ in units of the weights' own length; none with ρ = 0."""
        return (Patches(rank=self.rank, radius=self.rho, targets=self.targets),) if self.rho else ()

    def problems(self, model: LanguageModel) -> list[Problem]:
        """ρ = 0; linear layers that cannot be found, or are quantised."""
        found = [] if self.rho else [Problem("rho", "rho = 0 patches nothing: safe answers are preferred, unattacked")]
        try:
            sizes(model.network, self.targets)
        except ModelError as error:
            found.append(Problem("model", str(error)))
        return found

    def start(self, model: LanguageModel) -> _Duel:
        """A fresh adversary; the original model is kept, as the adapter switched off or as a frozen copy."""
        adversary = hypernetwork(
            model.network, rank=self.rank, width=self.width, rho=self.rho, targets=self.targets, per=self.per
        )
        return _Duel(self, adversary, Reference(model.network) if self.beta else None)


class _Duel:
    """The adversary learns, then the defender is told where to go."""

    def __init__(self, how: AntiDote, adversary: Hypernetwork, before: Reference | None) -> None:
        self.how, self.adversary, self.before = how, adversary, before
        phi = [*adversary.parameters()]
        self.descent = Descent(phi, "adamw", lr=how.adversary_lr, momentum=0.0, weight_decay=WEIGHT_DECAY)

    def __call__(self, theta: Theta, batch: Batches) -> Vector:
        rounds = self.how.adversary_steps + 1
        pairs = zip(apart(batch["harmful"]).parts(rounds), apart(batch["safe"]).parts(rounds), strict=True)
        *early, (harmful, safe) = pairs
        for pair in early:
            self.attack(theta, *pair)
        return self.defend(theta, batch["alignment"], harmful, safe)

    def attack(self, theta: Theta, harmful: Batch, safe: Batch) -> None:
        """One step of φ towards harmful answers; θ stays, and gets no gradient."""
        loss = preferred_under(self.adversary, harmful, safe, name="adversary")
        with self.adversary.learning() as phi:
            there = Theta(theta.network, trainable=phi, micro_batch=theta.micro_batch, autocast=theta.autocast)
            g = there.grad(loss, harmful)
        self.descent.step(g.tensors(), self.how.adversary_lr)
        for rows in (harmful, safe):
            theta.record(loss, rows, there.trace[f"{loss.name}/{harmful.role}"])

    def defend(self, theta: Theta, aligned: Batch, harmful: Batch, safe: Batch) -> Vector:
        """The gradient of the defender's objective in θ; φ stays."""
        through = self.how.grad_through_activations
        loss = preferred_under(self.adversary, safe, harmful, name="attacked", through=through)
        g = theta.grad(loss, safe)
        theta.record(loss, harmful, theta.trace[f"{loss.name}/{safe.role}"])
        if self.how.lam:
            g = g + self.how.lam * theta.grad(nll, aligned)
        return g if self.before is None else g + self.how.beta * theta.grad(kl(self.before, "reverse"), aligned)

    def state_dict(self) -> dict[str, Any]:
        """The adversary and its optimiser; the original model is made anew from what is loaded."""
        return {"adversary": self.adversary.state_dict(), "optimizer": self.descent.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.adversary.load_state_dict(state["adversary"])
        self.descent.load_state_dict(state["optimizer"])
