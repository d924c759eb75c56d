"""Samplers: which layers, which group comes next. All draw from torch's global generator, which ``fit`` seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from immunity.errors import SettingsError


def without_replacement(weights: Sequence[float], k: int) -> tuple[int, ...]:
    """``k`` different indices, drawn one after the other, each with its weight's share of what is left.

    An index is in the sample more or less often than ``k`` times its share of the weights: the shares are the odds of
    the first draw only. Weights of 0 are never drawn.

    Args:
        weights: From 0 on; they need not sum to 1.
        k: At least 1.

    Returns:
        The indices, in increasing order.

    Raises:
        SettingsError: A weight is negative or not finite, or fewer than ``k`` are above 0.

    Source:
        The index whose clock, exponential with the rate of its weight, rings first is the first to be drawn, and so on:
        Efraimidis and Spirakis, 2006.
    """
    bad = [weight for weight in weights if not (math.isfinite(weight) and weight >= 0)]
    able = sum(weight > 0 for weight in weights)
    if bad or not 1 <= k <= able:
        raise SettingsError(
            f"cannot draw {k} of {len(weights)} by their weights: "
            + (f"{bad[0]} is no weight" if bad else f"only {able} of them are above 0")
        )
    clocks = torch.empty(len(weights), dtype=torch.float64).exponential_()
    rings = clocks / torch.tensor(weights, dtype=torch.float64)  # a weight of 0 rings never: inf
    return tuple(sorted(int(i) for i in rings.argsort()[:k]))


@dataclass
class Exp3:
    """EXP3 over two arms: an adversary who moves to the arm with the higher loss, though he sees only the drawn one's.

    The drawn arm's weight is multiplied by exp(η ℓ / p), p its own probability (so the step is unbiased), then both are
    normalised.

    Attributes:
        eta: η, the rate. 0 never moves.
        floor: The least probability of an arm; 0 lets one die out.
        p: The probability of the second arm.

    Source:
        As VAA uses it, arXiv 2506.03850; clipped to [0.1, 0.9] in its released code alone.
    """

    eta: float = 0.007
    floor: float = 0.1
    p: float = 0.5

    def draw(self) -> int:
        """An arm, 0 or 1."""
        return int(float(torch.rand(())) < self.p)

    def learn(self, arm: int, loss: float) -> None:
        """The drawn arm had this loss."""
        own = self.p if arm else 1.0 - self.p
        # w e^x / (w e^x + rest), written so that it cannot overflow.
        own = 1.0 / (1.0 + (1.0 - own) / own * math.exp(-self.eta * loss / own))
        p = own if arm else 1.0 - own
        self.p = min(max(p, self.floor), 1.0 - self.floor)

    def state_dict(self) -> dict[str, float]:
        """The probability; settings are not state."""
        return {"p": self.p}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.p = float(state["p"])
