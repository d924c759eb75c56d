"""CTRAP: a collapse trap that a harmful fine-tune falls into, planted while the model is aligned.

minimise  ℓ(θ; D_align) + λ · ℓ_collapse(θ′; D_general)        with  θ′ = θ − α ∇ℓ(θ; D_harm)

Yi et al., arXiv 2505.16559, eq. 2. ℓ_collapse = E[−1/|y| Σ_t log p(e | x ∘ y_<t)] (eq. 1) *falls* when the trap fires.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

from immunity.batch import Batch
from immunity.errors import ModelError, SettingsError
from immunity.fit import Batches
from immunity.losses import collapse, nll
from immunity.mechanisms import Collapse, LookAhead, Mechanism
from immunity.method import Card, GradientMethod, Problem
from immunity.models import LanguageModel
from immunity.simulated import Curvature, Rule, pulled_back, walker
from immunity.theta import Theta, Vector


@dataclass(frozen=True, kw_only=True)
class CTRAP(GradientMethod):
    """∇ℓ_align(θ) + λ ∇ℓ_collapse at the point where a simulated attacker would be after ``lookahead`` steps.

    Attributes:
        alpha: α, the simulated step: a rate if ``step`` is "plain", else a distance in weight space.
        lam: λ, the weight of the trap. 0 is SFT, bit for bit.
        word: The word e that a collapsed model repeats; resolved for each tokenizer to the last id of "an <word>".
        step: "plain" −αg (the paper's equation), "normalised" −αg/‖g‖ (the released code), "adam" of length α.
        lookahead: K, steps of the simulated attacker, each on a fresh harmful batch. 1 is the paper.
        curvature: How ∂θ′/∂θ enters the gradient: "none" drops it (the released code), "forward" and "central" compute
            it by differences of gradients, at one and two further gradients. K = 1 only.
        collapse_on: The data asked to collapse: "general" (the paper) or the "alignment" batch (the released code).
        mean: "example" as in eq. 1, or "token" (the released code): the mean over all response tokens of a batch.
        watch_benign: Also log ℓ_collapse after the same walk on the role "benign": dormancy is the claim.

    Raises:
        SettingsError: A setting is out of range, or curvature was asked for with K > 1 or with an Adam-like step.

    Departures from the paper:
        * The default is the normalised first-order step, which neither the equation (plain, differentiated through
          θ′) nor the released code (collapses its alignment batch) is alone; :meth:`paper` and :meth:`released` are.
        * ``lookahead`` > 1 and "adam" are ours. Memory does not depend on K; the gradient at θ_K is applied at θ.
        * With micro-batches the harmful direction is that of the whole batch; the released code's is per micro-batch.
    """

    card: ClassVar[Card] = Card(
        name="CTRAP",
        paper="CTRAP: Embedding Collapse Trap to Safeguard LLMs from Harmful Fine-Tuning",
        arxiv="2505.16559",
        year=2025,
        block="conditional collapse",
        family="collapse trap",
        gradients="3 (4–5 with curvature, K + 2 looking K steps ahead) and one forward pass",
        says="Plants a trap: a harmful fine-tune falls to saying one word; a benign one should not notice.",
    )
    strength: ClassVar[str] = "lam"
    alpha: float = 0.1
    lam: float = 0.1
    word: str = "error"
    step: Rule = "normalised"
    lookahead: int = 1
    curvature: Curvature = "none"
    collapse_on: Literal["general", "alignment"] = "general"
    mean: Literal["example", "token"] = "example"
    watch_benign: bool = False

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.lam < 0:
            raise SettingsError(f"alpha ({self.alpha}) and lam ({self.lam}) must not be negative")
        if self.lookahead < 1:
            raise SettingsError(f"lookahead = {self.lookahead}: the simulated attacker takes at least one step")
        if self.curvature != "none" and (self.lookahead > 1 or self.step == "adam"):
            raise SettingsError(
                f"curvature = {self.curvature!r} needs lookahead = 1 and a plain or normalised step, not lookahead = "
                f"{self.lookahead} and step = {self.step!r}: further ahead only the first-order gradient exists"
            )

    @classmethod
    def paper(cls) -> CTRAP:
        """Eq. 2 as printed: a plain step, differentiated through; general data of its own. α = λ = 0.1."""
        return cls(step="plain", curvature="central")

    @classmethod
    def released(cls) -> CTRAP:
        """What the authors' code does: normalised first-order step, collapses the alignment batch, token means."""
        return cls(step="normalised", curvature="none", collapse_on="alignment", mean="token")

    @property
    def reads(self) -> Mapping[str, int]:
        """Alignment, K harmful batches, general data unless the alignment batch serves, benign on request."""
        general = {"general": 1} if self.collapse_on == "general" else {}
        benign = {"benign": self.lookahead} if self.watch_benign else {}
        return {"alignment": 1, "harmful": self.lookahead, **general, **benign}

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """A simulated attacker of K steps, and a collapse to ``word`` at the end of his walk; none with λ = 0."""
        ahead = (LookAhead(steps=self.lookahead, radius=self.alpha, rule=self.step),) if self.alpha else ()
        return (*ahead, Collapse(word=self.word, on=self.collapse_on)) if self.lam else ()

    def problems(self, model: LanguageModel) -> list[Problem]:
        """A word the tokenizer does not have; α = 0 or λ = 0, with which nothing is planted."""
        inert = [name for name, value in (("alpha", self.alpha), ("lam", self.lam)) if value == 0]
        found = [Problem(name, f"{name} = 0 plants no trap; use --method sft for the baseline") for name in inert]
        try:
            model.word_id(self.word)
        except ModelError as error:
            found.append(Problem("word", str(error)))
        return found

    def gradient(self, theta: Theta, batch: Batches) -> Vector:
        """∇ℓ_align + λ (I − ∂(θ−θ′)/∂θ)ᵀ ∇ℓ_collapse(θ′); the bracket is I unless ``curvature`` says otherwise."""
        e = collapse(theta.token(self.word))
        aligned = self._averaged(batch["alignment"])
        general = aligned if self.collapse_on == "alignment" else self._averaged(batch["general"])
        harmful = [self._averaged(part) for part in batch["harmful"].parts(self.lookahead)]
        theta.value(e, general)  # the trap must not show at θ: logged at every step
        g_harm = theta.grad(nll, harmful[0])
        with self._attacked(theta, g_harm, harmful[1:]):
            g_trap = theta.grad(e, general)
        g_trap = pulled_back(
            theta, nll, harmful[0], g_harm, g_trap, rule=self.step, alpha=self.alpha, curvature=self.curvature
        )
        if self.watch_benign:
            self._watch_benign(theta, batch["benign"], general)
        return theta.grad(nll, aligned) + self.lam * g_trap

    @contextmanager
    def _attacked(self, theta: Theta, first: Vector, rest: list[Batch]) -> Iterator[None]:
        """Stand where an attacker would be who has seen ``first`` and then each batch of ``rest``."""
        attacker = walker(self.step, self.alpha)
        with theta.excursion():
            theta.step(attacker(first))
            for part in rest:
                theta.step(attacker(theta.grad(nll, part)))
            yield

    def _watch_benign(self, theta: Theta, benign: Batch, general: Batch) -> None:
        rows = [self._averaged(part) for part in benign.parts(self.lookahead)]
        with self._attacked(theta, theta.grad(nll, rows[0]), rows[1:]):
            theta.value(collapse(theta.token(self.word)), general.as_role("general-after-benign"))

    def _averaged(self, batch: Batch) -> Batch:
        return batch.by_tokens() if self.mean == "token" else batch
