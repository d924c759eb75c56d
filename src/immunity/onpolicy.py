"""OnPolicy: a direction for ``fit`` that rolls out the model's own answers and steps along their policy gradient."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import fmean
from typing import Any, final

import torch
from torch import nn

from immunity.batch import Batch, Tokens
from immunity.data.corpus import Example
from immunity.errors import SettingsError
from immunity.fit import Batches
from immunity.models import LanguageModel
from immunity.policy import Estimator, Reward, Rollout, Scored, advantages, log_probs, roll_out, shown, surrogate
from immunity.theta import Theta, Vector

_LOG = logging.getLogger(__name__)

Reference = Callable[[], AbstractContextManager[nn.Module]]
"""Opens the network that the KL term measures from, for as long as it is looked at."""


@dataclass(frozen=True, kw_only=True)
class Rolling:
    """How answers are rolled out and learnt from.

    Attributes:
        group: Answers to each prompt.
        max_new_tokens: Tokens per answer.
        temperature: Of sampling, and of the policy that is trained.
        estimator: See :func:`~immunity.policy.advantages`; "grpo" averages over each answer's own tokens, the others
            divide by ``max_new_tokens``.
        ratio_clip: ε of the clipped surrogate.
        kl: Weight of the KL term.
        updates: Steps on each rollout, each with its share of the groups.
        sample_batch: Answers sampled at once; memory only.
        shown: Whether each prompt's own answer stands in its group beside the sampled ones. It was sampled by nobody,
            so its ratio counts from the policy that meets it.
        seed: Of sampling.

    Raises:
        SettingsError: A number is out of range.
    """

    group: int
    max_new_tokens: int
    temperature: float = 1.0
    estimator: Estimator = "grpo"
    ratio_clip: float = 0.2
    kl: float = 0.0
    updates: int = 1
    sample_batch: int = 64
    shown: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.max_new_tokens, self.updates, self.sample_batch) < 1:
            raise SettingsError(
                f"max_new_tokens = {self.max_new_tokens}, updates = {self.updates}, sample_batch = "
                f"{self.sample_batch}: each must be at least 1"
            )
        advantages([0.0] * self.group, self.estimator)  # these check what is theirs
        surrogate([], clip=self.ratio_clip, temperature=self.temperature, kl=self.kl)


@final
class OnPolicy:
    """−∇ of the clipped surrogate over fresh answers; see :class:`~immunity.keeper.Stateful`.

    What is drawn for a rollout depends on (seed, number of the rollout) alone. The state are the step, the cost, and in
    the middle of a rollout its answers; so a killed run that is resumed draws and learns the same, bit for bit.

    The trace of each step says of its rollout: "reward" (mean), "flat_groups" (share of the prompts whose answers were
    all rewarded alike: at 1 nothing is learnt from rewards in this step), "sampled_entropy" (mean −log-probability of
    the sampled tokens: an estimate of the entropy, in nats), "answer_tokens" (mean), "ended" (share that said a stop
    token).

    Args:
        model: Whose network ``fit`` trains.
        prompts: Number of the rollout -> its prompts, a pure function; their number must divide by ``updates``.
        reward: Of an answer.
        how: Settings.
        entropy: Step -> weight of the entropy bonus.
        reference: Needed where ``how.kl`` is above 0.
        role: Names the loss in the log.

    Attributes:
        tokens: Trained on so far, prompts included; sampled were as many.

    Raises:
        SettingsError: There is a KL term, but no reference.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Callable[[int], Sequence[Example]],
        reward: Reward,
        how: Rolling,
        *,
        entropy: Callable[[int], float] = lambda _: 0.0,
        reference: Reference | None = None,
        role: str = "harmful",
    ) -> None:
        if how.kl > 0 and reference is None:
            raise SettingsError(f"kl = {how.kl} needs a reference model")
        self.tokens = 0
        self._model = model
        self._prompts = prompts
        self._reward = reward
        self._how = how
        self._entropy = entropy
        self._reference = reference
        self._role = role
        self._step = 0
        self._rows: list[Scored] = []
        self._seen: dict[str, float] = {}
        self._warned = False

    def __call__(self, theta: Theta, _: Batches) -> Vector:
        """The direction to descend along; ``fit`` has put the network's weights where it wants the gradient."""
        how = self._how
        number, part = divmod(self._step, how.updates)
        if part == 0:
            self._roll_out(theta, number)
        share = len(self._rows) // how.updates
        rows = self._rows[part * share : (part + 1) * share]
        loss = surrogate(
            rows,
            clip=how.ratio_clip,
            temperature=how.temperature,
            entropy=self._entropy(self._step),
            kl=how.kl,
            divisor=None if how.estimator == "grpo" else how.max_new_tokens,
        )
        vector = theta.grad(loss, Batch(tuple(row.tokens for row in rows), self._role))
        theta.trace.update(self._seen)
        self._step += 1
        self.tokens += sum(len(row.tokens.ids) for row in rows)
        if part == how.updates - 1:
            self._rows = []
        return vector

    def state_dict(self) -> dict[str, Any]:
        """See :class:`~immunity.keeper.Stateful`."""
        rows = [
            {
                "ids": list(row.tokens.ids),
                "labels": list(row.tokens.labels),
                "advantage": row.advantage,
                "before": list(row.before),
                "reference": list(row.reference),
            }
            for row in self._rows
        ]
        return {"step": self._step, "tokens": self.tokens, "rows": rows, "seen": dict(self._seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`~immunity.keeper.Stateful`."""
        self._step, self.tokens, self._seen = state["step"], state["tokens"], dict(state["seen"])
        self._rows = [
            Scored(
                Tokens(tuple(row["ids"]), tuple(row["labels"])),
                row["advantage"],
                tuple(row["before"]),
                tuple(row["reference"]),
            )
            for row in state["rows"]
        ]

    def _roll_out(self, theta: Theta, number: int) -> None:
        how, prompts = self._how, self._prompts(number)
        if len(prompts) % how.updates:
            raise SettingsError(f"{len(prompts)} prompts cannot be shared evenly between {how.updates} updates")
        drawn = random.Random(f"{how.seed}/{number}").getrandbits(63)
        groups = roll_out(
            self._model,
            prompts,
            self._reward,
            n=how.group,
            max_new_tokens=how.max_new_tokens,
            temperature=how.temperature,
            generator=torch.Generator().manual_seed(drawn),
            batch_size=how.sample_batch,
        )
        self._seen = self._told(groups, number)
        if how.shown:
            own = shown(self._model, prompts, self._reward, max_new_tokens=how.max_new_tokens)
            groups = [[*group, answer] for group, answer in zip(groups, own, strict=True)]
        rows = [answer.tokens for group in groups for answer in group]
        unrecorded: list[tuple[float, ...]] = [()] * len(rows)
        before = self._recorded(theta, theta.network, rows) if how.updates > 1 else unrecorded
        reference = unrecorded
        if how.kl > 0 and self._reference is not None:
            with self._reference() as network:
                reference = self._recorded(theta, network, rows)
        self._rows = [Scored(*row) for row in zip(rows, worth(groups, how.estimator), before, reference, strict=True)]

    def _recorded(self, theta: Theta, network: nn.Module, rows: list[Tokens]) -> list[tuple[float, ...]]:
        return log_probs(
            network,
            rows,
            temperature=self._how.temperature,
            micro_batch=theta.micro_batch,
            autocast=theta.autocast,
        )

    def _told(self, groups: list[list[Rollout]], number: int) -> dict[str, float]:
        seen = told(groups, self._model.template.stop_ids)
        if seen["flat_groups"] == 1.0 and not (self._warned or self._how.shown):
            self._warned = True
            _LOG.warning(
                "rollout %d: all answers to each prompt got the same reward (mean %g), so rewards teach nothing here; "
                "a hotter temperature, a larger group or another reward may find a difference",
                number,
                seen["reward"],
            )
        return seen


def worth(groups: Sequence[Sequence[Rollout]], estimator: Estimator) -> list[float]:
    """The advantage of each answer within its group, one group after the other."""
    return [a for group in groups for a in advantages([answer.reward for answer in group], estimator)]


def told(groups: Sequence[Sequence[Rollout]], stops: Collection[int]) -> dict[str, float]:
    """For the log, what :class:`OnPolicy` says of a rollout."""
    answers = [answer for group in groups for answer in group]
    return {
        "reward": fmean(answer.reward for answer in answers),
        "flat_groups": fmean(float(len({answer.reward for answer in group}) == 1) for group in groups),
        "sampled_entropy": -fmean(value for answer in answers for value in answer.log_probs),
        "answer_tokens": fmean(len(answer.log_probs) for answer in answers),
        "ended": fmean(float(answer.tokens.ids[-1] in stops) for answer in answers),
    }
