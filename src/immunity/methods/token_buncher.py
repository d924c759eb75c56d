"""Token Buncher: answers to restricted prompts so certain that reinforcement finds nothing to prefer among them.

maximise  E R(x, y),   R = −1/|y| Σ_t H(p_θ(· | x, y_<t)),   x ~ D_harm,  y ~ p_θ(· | x),   near p_before on D_align
and, in every second step after the first E/8 of them, minimise the token noiser on answers y that fared no worse:
          −1/|y| Σ_t [(1 − λ) log p_θ(y_t) + λ Σ_{v ≠ y_t} z_v log p_θ(v)],   z random,  Σ z_v = 1

Feng et al., arXiv 2508.20697. The policy gradient is GRPO's, and what an attacker gets out of his is bounded by the
root of the mean entropy of a token (the paper's theorem). Whoever raises the entropy first is to find only noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeAlias, final

import torch

from immunity.batch import IGNORE, Batch, Tokens
from immunity.errors import DataError, SettingsError
from immunity.fit import Batches
from immunity.generate import sample
from immunity.losses import entropy
from immunity.mechanisms import EntropyMinimum, Mechanism
from immunity.method import Card, Problem, StatefulMethod
from immunity.models import LanguageModel
from immunity.noiser import noiser
from immunity.onpolicy import told, worth
from immunity.policy import Rollout, Scored, advantages, rewarded, surrogate
from immunity.preference import each, log_prob
from immunity.reference import Reference, kl
from immunity.theta import Theta, Vector

Groups: TypeAlias = Sequence[Sequence[Rollout]]


@dataclass(frozen=True, kw_only=True)
class TokenBuncher(StatefulMethod):
    """Rolls out answers to restricted prompts, and makes them certain, or trains on them with noise.

    Nothing in this prefers a refusal to another certain answer. What does are refusals in the alignment data, and only
    where ``near`` is "loss": with the paper's rewards alone the aligned tiny model came to comply, before any attack.

    Attributes:
        group: Answers to each prompt, which are compared with one another.
        max_new_tokens: Tokens per answer. Prompts that leave no room for them are passed over.
        entropy: How it is lowered: as a "reward" (the paper), by a policy gradient that makes the surer answers of a
            group more likely, or by its own "gradient" at the answers, which makes each of them surer.
        first: Share of the steps before the noiser has its turns; 1 leaves it out.
        noise: λ, the mass of all tokens that were not said. 0.01 is what the released code's two come to; 0.1, the
            paper's, holds the entropy of a token at 0.33 + 0.1 ln(V − 1) nats or more, where the noiser has its way.
        drawn: Whether the noiser's z are drawn, anew each time (the paper), or are their mean, 1/(V − 1).
        near: What holds the model where it was: a "loss" KL(p_θ ‖ p_before) on answers of the alignment data; the
            paper's "reward" −KL of the model's own answers to alignment prompts; the released code's "penalty", the
            log-ratio of an answer to a restricted prompt, taken off its reward; or "none".
        kl: Weight of that.
        compat: The noiser as released: λ is applied twice, so that the target's mass is 1 − λ + λ², and pads after an
            answer are learnt as well, in answers that fared worse nothing else.
        mean: "example" averages tokens within an answer and then answers, "token" (the released code) over all tokens.

    Raises:
        SettingsError: A setting is out of range.

    Source:
        arXiv 2508.20697, as third parties tell it (its equations could not be read in full); schedule, numbers and the
        noiser of the released code, Georgefwt/Token-Buncher.

    Departures from the paper:
        * Each rollout serves one step, where the released code takes four with a share each: its 200 steps of 32
          prompts are 800 of 8 here, with the same cost, and then no ratio is there to be clipped.
        * The default descends the entropy's own gradient, on fresh answers, and λ is 0.01. On the tiny model the reward
          of 4 answers to a prompt did not lower the entropy, that of 16 moved the model to other, shorter answers.
        * The default holds the model near by a loss on the alignment data, and draws no z: the noiser is linear in z,
          so that drawing adds variance to its gradient, and nothing else. Answers have 24 tokens, not 1024.
        * The paper's weight of its KL reward is not known to us; 1 is taken, beside the entropy's. GRPO scales either
          by its own deviation. The released code has no alignment data at all.
        * E/8, 25 of 200 steps, is a share of the run. Steps count from 0, and the noiser's are even. That it learns
          from answers of an advantage of 0 or more is the released code's; the paper's are not known to us.
        * ∇ of the expected entropy is the sum of what the two settings of ``entropy`` do; the paper has the first.
        * The released code does not clip the noiser's gradient; the run's own clipping is for all steps. Its noiser
          averages over the tokens of a micro-batch, here of a batch.
        * Pads, if they are learnt, can be attended to; there they are masked.
    """

    card: ClassVar[Card] = Card(
        name="Token Buncher",
        paper="Token Buncher: Shielding LLMs from Harmful Reinforcement Learning Fine-Tuning",
        arxiv="2508.20697",
        year=2025,
        block="conditional collapse",
        family="starved reinforcement",
        gradients="2 (1 without a loss on alignment data), on 4 answers to each prompt that are sampled first",
        says="Makes answers to restricted prompts so certain that reinforcement has nothing to choose from.",
    )
    strength: ClassVar[str] = ""
    group: int = 4
    max_new_tokens: int = 24
    entropy: Literal["reward", "gradient"] = "gradient"
    first: float = 0.125
    noise: float = 0.01
    drawn: bool = False
    near: Literal["loss", "reward", "penalty", "none"] = "loss"
    kl: float = 1.0
    compat: bool = False
    mean: Literal["example", "token"] = "example"

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or not 0 <= self.first <= 1 or not self.kl >= 0:
            raise SettingsError(
                f"max_new_tokens = {self.max_new_tokens}, first = {self.first}, kl = {self.kl}: at least one token, a "
                "share from 0 to 1, and a weight that is not negative"
            )
        noiser(self.noise)  # these check what is theirs
        advantages([0.0] * self.group, "grpo")

    @classmethod
    def paper(cls) -> TokenBuncher:
        """Entropy and KL as rewards of answers of 1024 tokens, λ = 0.1 with z drawn."""
        return cls(max_new_tokens=1024, entropy="reward", noise=0.1, drawn=True, near="reward")

    @classmethod
    def released(cls) -> TokenBuncher:
        """What the authors' code does: no alignment data, 0.001 KL off the reward, λ twice, pads learnt, token mean."""
        return replace(cls.paper(), near="penalty", kl=0.001, compat=True, mean="token")

    @property
    def reads(self) -> Mapping[str, int]:
        """Restricted prompts, whose answers are not used; alignment data where they hold the model near."""
        return {**({"alignment": 1} if self.near in {"loss", "reward"} else {}), "harmful": 1}

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """Certain answers; the noise around them is tried by the same attacks."""
        return (EntropyMinimum(),)

    def problems(self, model: LanguageModel) -> list[Problem]:
        """Answers without room; a noiser without noise, or settings of one that never has a turn; κ = 0; no pad."""
        found = []
        if self.max_new_tokens >= model.max_length:
            found.append(
                Problem(
                    "max_new_tokens",
                    f"{self.max_new_tokens} new tokens leave no prompt any room within {model.max_length}: open the "
                    "model with a larger --max-length, or lower max_new_tokens",
                )
            )
        if self.first < 1 and not self.noise:
            found.append(Problem("noise", "noise = 0 adds none: say first=1 to leave the noiser out"))
        if self.first == 1 and (self.compat or self.drawn):
            found.append(Problem("first", "first = 1 leaves the noiser out: drawn and compat change nothing"))
        if self.near != "none" and not self.kl:
            found.append(Problem("kl", "kl = 0 holds nothing: say near=none"))
        if self.compat and model.tokenizer.pad_token_id is None:
            found.append(Problem("compat", f"the tokenizer of {model.source!r} has no pad that could be learnt"))
        return found

    def start(self, model: LanguageModel) -> Bunching:
        """The model as it is now is what it is held near to: the adapter switched off, or a frozen copy."""
        return Bunching(self, model, None if self.near == "none" else Reference(model.network))


@final
class Bunching:
    """The direction: answers of the step's own, then policy gradient or noiser, then what holds the model near."""

    def __init__(self, how: TokenBuncher, model: LanguageModel, before: Reference | None) -> None:
        self._how, self._model, self._step = how, model, 0
        self._shift = None if before is None else kl(before, "reverse")
        self._once = None if before is None else before.at(log_prob)

    def __call__(self, theta: Theta, batch: Batches) -> Vector:
        """Down the entropy or the noiser, at the point of ``theta``."""
        how, noised = self._how, theta.progress >= self._how.first and self._step % 2 == 0
        self._step += 1
        groups = self._rolled(theta, batch["harmful"], self._certainty)
        theta.trace.update(told(groups, self._model.template.stop_ids))
        rows = _scored(groups)
        g = self._noised(theta, rows) if noised else self._learnt(theta, rows, "harmful")
        if self._shift is None or not how.kl or how.near == "penalty":
            return g
        if how.near == "loss":
            return g + how.kl * theta.grad(self._shift, self._averaged(batch["alignment"]))
        if noised:
            return g
        return g + how.kl * self._learnt(
            theta, _scored(self._rolled(theta, batch["alignment"], self._nearness)), "alignment"
        )

    def _rolled(self, theta: Theta, batch: Batch, reward: Callable[[Theta, Batch], list[float]]) -> Groups:
        """Answers to the batch's prompts and what they earn; what is drawn follows from torch's random numbers."""
        how, length = self._how, self._model.max_length
        prompts = [ids for row in batch.rows if len(ids := _asked(row)) + how.max_new_tokens <= length]
        if not prompts:
            raise DataError(
                f"none of {len(batch)} {batch.role} prompts leaves room for {how.max_new_tokens} new tokens within "
                f"{length}; raise max_length or lower max_new_tokens"
            )
        said = sample(
            self._model,
            prompts,
            n=how.group,
            max_new_tokens=how.max_new_tokens,
            generator=torch.Generator().manual_seed(int(torch.randint(2**63 - 1, ()))),
            batch_size=64 if theta.micro_batch is None else 4 * theta.micro_batch,  # no gradient: memory only
        )
        rows = Batch(tuple(answer.tokens for group in said for answer in group), batch.role)
        return rewarded(said, reward(theta, rows))

    def _certainty(self, theta: Theta, rows: Batch) -> list[float]:
        """R, with the released code's penalty where that is chosen."""
        found = [-value for value in each(theta, entropy, rows)]
        if self._once is None or self._how.near != "penalty":
            return found
        ahead = zip(each(theta, log_prob, rows), each(theta, self._once, rows), strict=True)
        return [value - self._how.kl * (now - then) for value, (now, then) in zip(found, ahead, strict=True)]

    def _nearness(self, theta: Theta, rows: Batch) -> list[float]:
        """−KL(p_θ ‖ p_before) along the model's own answers."""
        return [] if self._shift is None else [-value for value in each(theta, self._shift, rows)]

    def _learnt(self, theta: Theta, rows: Sequence[Scored], role: str) -> Vector:
        own = self._how.entropy == "gradient" and role == "harmful"
        return theta.grad(
            entropy if own else surrogate(rows), self._averaged(Batch(tuple(row.tokens for row in rows), role))
        )

    def _noised(self, theta: Theta, rows: Sequence[Scored]) -> Vector:
        how, seed = self._how, int(torch.randint(2**31, ())) if self._how.drawn else None
        if how.compat:
            pad = self._model.tokenizer.pad_token_id
            chosen = [_padded(row, how.max_new_tokens, pad) for row in rows]
        else:
            chosen = [row.tokens for row in rows if row.advantage >= 0]
        loss = noiser(how.noise, mass=how.noise**2 if how.compat else None, seed=seed)
        return theta.grad(loss, self._averaged(Batch(tuple(row for row in chosen if row.n_response), "harmful")))

    def _averaged(self, batch: Batch) -> Batch:
        return batch.by_tokens() if self._how.mean == "token" else batch

    def state_dict(self) -> dict[str, Any]:
        """The step, by which the noiser has its turns; the original model is made anew from what is loaded."""
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._step = state["step"]


def _asked(row: Tokens) -> tuple[int, ...]:
    """The prompt of a row: what comes before its first label."""
    return row.ids[: next(t for t, label in enumerate(row.labels) if t and label != IGNORE)]


def _scored(groups: Groups) -> list[Scored]:
    answers = [answer.tokens for group in groups for answer in group]
    return [Scored(*row) for row in zip(answers, worth(groups, "grpo"), strict=True)]


def _padded(row: Scored, most: int, pad: int) -> Tokens:
    """As released: pads up to the longest answer there may be, all learnt; the answer itself only if it is no worse."""
    ids, labels = row.tokens
    pads = (pad,) * (most - row.tokens.n_response)
    return Tokens(ids + pads, (labels if row.advantage >= 0 else (IGNORE,) * len(ids)) + pads)
