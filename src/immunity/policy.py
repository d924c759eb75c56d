"""Policy gradients: a model's own answers, rewarded, become more or less likely.

An attacker who trains with a harmful reward stands on this, and so does a defence that rolls out answers itself. A row
is one answer. What its loss needs beside its tokens — its advantage, the log-probabilities of its tokens when it was
sampled — is looked up by row. So rows are coupled through their advantages alone, which are numbers by then, and the
size of micro-batches cannot change a gradient.

Shapes: B rows, T tokens, N response positions in the batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor, nn

from immunity.batch import IGNORE, Batch, Tokens
from immunity.data.corpus import Example
from immunity.errors import DataError, SettingsError
from immunity.generate import Sampled, sample
from immunity.losses import Loss, chunked, response_states, token_entropy
from immunity.models import LanguageModel
from immunity.quiet import quiet

Estimator = Literal["grpo", "dr-grpo", "rloo"]
Reward = Callable[[Sequence[Example], Sequence[str]], Sequence[float]]
"""(examples, one answer to each) -> one number for each; higher is better."""

ESTIMATORS: Final = ("grpo", "dr-grpo", "rloo")
EPS: Final = 1e-6
"""Added to a group's standard deviation, in the reward's unit."""


class Rollout(NamedTuple):
    """A sampled answer and what it earned.

    Attributes:
        tokens: Prompt and answer; the prompt is not learnt.
        log_probs: Of the answer's tokens, as they were sampled.
        text: What the reward has read.
        reward: What it says.
    """

    tokens: Tokens
    log_probs: tuple[float, ...]
    text: str
    reward: float


@dataclass(frozen=True)
class Scored:
    """An answer with what its loss needs.

    Attributes:
        tokens: The row; a loss knows it again as this very object.
        advantage: How much better it was than the other answers to its prompt.
        before: Log-probabilities of its tokens under the policy that sampled it (:func:`log_probs`). Empty where that
            is the policy whose gradient is taken: the ratio is then exactly 1.
        reference: The same under a reference model, for the KL term.
    """

    tokens: Tokens
    advantage: float
    before: tuple[float, ...] = ()
    reference: tuple[float, ...] = ()


def roll_out(
    model: LanguageModel,
    examples: Sequence[Example],
    reward: Reward,
    *,
    n: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    generator: torch.Generator,
    batch_size: int = 64,
) -> list[list[Rollout]]:
    """Sample ``n`` answers to each prompt and reward them: for each example, in their order, its group.

    Args:
        model: Left as it is.
        examples: Prompts, with what the reward reads.
        reward: Called once, with all answers.
        n: Answers to each prompt.
        max_new_tokens: Tokens per answer.
        temperature: Of sampling.
        generator: Of all that is drawn.
        batch_size: Answers sampled at once.

    Raises:
        DataError: A reward is missing, NaN or infinite.
        SettingsError: See :func:`immunity.generate.sample`.
        ModelError: See :func:`immunity.generate.sample`.
        DivergedError: See :func:`immunity.generate.sample`.
    """
    groups = sample(
        model,
        examples,
        n=n,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        generator=generator,
        batch_size=batch_size,
    )
    asked = [example for example in examples for _ in range(n)]
    return rewarded(groups, _earned(reward, asked, [answer.text for group in groups for answer in group]))


def shown(model: LanguageModel, examples: Sequence[Example], reward: Reward, *, max_new_tokens: int) -> list[Rollout]:
    """The examples' own answers, rewarded like sampled ones; nobody sampled them, so they have no ``log_probs``.

    Args:
        model: Whose template writes them.
        examples: With answers.
        reward: Called once, with all answers.
        max_new_tokens: Where an answer is cut.

    Raises:
        DataError: An example has no answer, or a reward is missing, NaN or infinite.
    """
    if lacking := next((example for example in examples if not example.response), None):
        raise DataError(f"{lacking.prompt[:60]!r} has no answer that could be shown")
    rewards, found = _earned(reward, examples, [example.response for example in examples]), []
    for example, value in zip(examples, rewards, strict=True):
        asked, said = model.template.prompt_ids(example), model.template.answer_ids(example)[:max_new_tokens]
        row = Tokens((*asked, *said), (*(IGNORE,) * len(asked), *said))
        found.append(Rollout(row, (), example.response, value))
    return found


def _earned(reward: Reward, asked: Sequence[Example], answers: Sequence[str]) -> list[float]:
    """A finite reward for each answer."""
    rewards = list(reward(asked, answers))
    if len(rewards) != len(asked):
        raise DataError(f"the reward gave {len(rewards)} numbers for {len(asked)} answers")
    wrong = next((i for i, value in enumerate(rewards) if not math.isfinite(value)), None)
    if wrong is not None:
        raise DataError(f"the reward of an answer to {asked[wrong].prompt[:60]!r} is {rewards[wrong]}")
    return [float(value) for value in rewards]


def rewarded(groups: Sequence[Sequence[Sampled]], rewards: Sequence[float]) -> list[list[Rollout]]:
    """Sampled answers with what each has earned: rewards of one group after the other."""
    earned = iter(rewards)
    return [[Rollout(a.tokens, a.log_probs, a.text, float(next(earned))) for a in group] for group in groups]


def advantages(rewards: Sequence[float], estimator: Estimator) -> list[float]:
    """How much better each answer to one prompt was than the others.

    "rloo" subtracts the mean of the *other* rewards (arXiv 2402.14740), which leaves the gradient of the expected
    reward unbiased. "dr-grpo" subtracts the mean of all n (arXiv 2503.20783), which is (n − 1)/n of that. "grpo"
    divides the latter by the group's standard deviation, with n − 1, plus :data:`EPS` (arXiv 2402.03300): biased, but
    the same for any scale of the reward. Where all rewards are equal every advantage is exactly 0, so that no rounding
    error is blown up to the size of a lesson.

    Raises:
        SettingsError: There is no such estimator, or fewer than two answers to compare.
    """
    n = len(rewards)
    if estimator not in ESTIMATORS or n < 2:
        raise SettingsError(
            f"estimator = {estimator!r} with {n} answers to a prompt: use one of {', '.join(ESTIMATORS)} with 2 or more"
        )
    if max(rewards) == min(rewards):
        return [0.0] * n
    mean = fmean(rewards)
    scale = {"grpo": 1.0 / (stdev(rewards) + EPS), "dr-grpo": 1.0, "rloo": n / (n - 1)}[estimator]
    return [scale * (reward - mean) for reward in rewards]


def surrogate(
    rows: Sequence[Scored],
    *,
    clip: float = 0.2,
    temperature: float = 1.0,
    entropy: float = 0.0,
    kl: float = 0.0,
    divisor: int | None = None,
) -> Loss:
    """The clipped surrogate of PPO (arXiv 1707.06347, eq. 7), a loss to descend on: one value per row, [B].

    For a row of tokens y_t with the advantage A, and the ratios ρ_t = π(y_t)/π_before(y_t), it is
    mean over t of  −min(ρ_t A, clip(ρ_t, 1 − ε, 1 + ε) A) + kl · k3_t − entropy · H_t,
    with k3 = e^d − d − 1 at d = log π_ref(y_t) − log π(y_t), an unbiased estimate of KL(π ‖ π_ref) (GRPO's eq. 4),
    and H_t the exact entropy of π there. Both terms are differentiated at the answers that were sampled.
    Where ``before`` is empty all ratios are 1 and the gradient is REINFORCE's: −A · mean over t of ∇ log π(y_t).

    Args:
        rows: Every row that the loss will be asked about, by the same ``tokens`` objects; ``Batch`` hands them on.
        clip: ε.
        temperature: π is softmax(logits / temperature): that of sampling.
        entropy: Weight of the bonus, in advantage per nat; 0 computes no entropy.
        kl: Weight of the KL term; 0 needs no reference.
        divisor: Divide each row's sum by this instead of its number of tokens. A constant keeps the gradient of the
            expected reward unbiased where answers differ in length (Dr. GRPO); 1 is the plain sum.

    Raises:
        SettingsError: A number is out of range; when called, a row is unknown or its records do not fit its tokens.
    """
    if not clip > 0 or not temperature > 0 or entropy < 0 or kl < 0 or (divisor is not None and divisor < 1):
        raise SettingsError(
            f"clip = {clip}, temperature = {temperature}, entropy = {entropy}, kl = {kl}, divisor = {divisor}: clip, "
            "temperature and divisor must be positive, entropy and kl not negative"
        )
    known = {id(row.tokens): row for row in rows}  # rows stay alive with this loss, so no id is given twice

    def scores(logits: Tensor, targets: Tensor) -> Tensor:
        tempered = logits / temperature
        said = tempered.log_softmax(-1).gather(-1, targets[:, None])  # [n, 1]
        return said if entropy == 0 else torch.cat([said, token_entropy(tempered, targets)[:, None]], 1)

    def of(network: nn.Module, batch: Batch) -> Tensor:
        mine = _records(known, batch, kl > 0)
        states, targets, keep = response_states(network, batch)
        values = chunked(network, states, targets, scores)  # [N, 1 or 2]
        now = values[:, 0]
        before = _flat([row.before for row in mine], now) if mine[0].before else now.detach()
        ratio = (now - before).exp()
        advantage = _flat([(row.advantage,) * row.tokens.n_response for row in mine], now)
        each = -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
        if kl > 0:
            ahead = _flat([row.reference for row in mine], now) - now
            each = each + kl * (ahead.expm1() - ahead)
        if entropy > 0:
            each = each - entropy * values[:, 1]
        placed = each.new_zeros(keep.shape).masked_scatter(keep, each)
        return placed.sum(1) / (keep.sum(1) if divisor is None else divisor)

    return Loss("surrogate", of)


def log_probs(
    network: nn.Module,
    rows: Sequence[Tokens],
    *,
    temperature: float = 1.0,
    micro_batch: int | None = None,
    autocast: torch.dtype | None = None,
) -> list[tuple[float, ...]]:
    """The log π of each response token of each row, in nats, as :func:`surrogate` computes it; no gradient.

    Recorded before several updates on the same answers, or under a reference model. (What :func:`sample` returns with
    an answer differs by rounding: it was computed with a cache, one token at a time.)

    Args:
        network: Left as it is.
        rows: Answers.
        temperature: See :func:`surrogate`.
        micro_batch: Rows per forward pass.
        autocast: As the gradient will be computed.
    """

    def said(logits: Tensor, targets: Tensor) -> Tensor:
        return (logits / temperature).log_softmax(-1).gather(-1, targets[:, None])[:, 0]

    found: dict[int, tuple[float, ...]] = {}
    device = next(network.parameters()).device
    with quiet(network), nullcontext() if autocast is None else torch.autocast(device.type, autocast):
        for micro in Batch(tuple(rows)).split(micro_batch):
            states, targets, _ = response_states(network, micro)
            values = iter(chunked(network, states, targets, said).tolist())
            for row in micro.rows:
                found[id(row)] = tuple(next(values) for _ in range(row.n_response))
    return [found[id(row)] for row in rows]


def _records(known: dict[int, Scored], batch: Batch, with_reference: bool) -> list[Scored]:
    """What is known of a batch's rows.

    Raises:
        SettingsError: A row is unknown, its records do not fit its tokens, or only some rows have been recorded.
    """
    if any(id(row) not in known for row in batch.rows):
        raise SettingsError("this surrogate knows nothing of a row of its batch: make both from the same Tokens")
    mine = [known[id(row)] for row in batch.rows]
    for row in mine:
        n = row.tokens.n_response
        if (row.before or mine[0].before) and len(row.before) != n:
            raise SettingsError(f"`before` has {len(row.before)} log-probabilities for {n} response tokens")
        if with_reference and len(row.reference) != n:
            raise SettingsError(f"kl needs `reference`: it has {len(row.reference)} log-probabilities for {n} tokens")
    return mine


def _flat(rows: Sequence[Sequence[float]], like: Tensor) -> Tensor:
    """Numbers of each row, one row after the other, as response positions are: [N]."""
    return torch.tensor([number for row in rows for number in row], dtype=like.dtype, device=like.device)
