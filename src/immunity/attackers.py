"""Persistent simulated attackers: a pool of them, each at θ + δ of its own, who go on while a defence trains θ.

    _, member = pool.turn()  # whose turn it is; he starts anew from δ = 0 if his time is over
    member.walk(theta, batches)  # a few steps of a fine-tune at θ + δ; θ itself stays
    with theta.moved(member.displacement()):
        theta.grad(...)  # what the defence asks where he stands

As persistent chains sample from a model that is trained (Tieleman, 2008), so these sample the places that fine-tunes of
it get to: far ones for the price of a few steps, because a fine-tune that was simulated for the last θ goes on from
where it was.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from immunity.batch import Batch
from immunity.errors import ModelError, SettingsError
from immunity.losses import causal_lm, nll
from immunity.networks import linear_layers, transposed_linear
from immunity.optimizers import Descent
from immunity.profiles import Profile
from immunity.theta import Theta, Vector

CLIP: Final = 1.0
"""Largest norm of a simulated attacker's gradient: what a fine-tune clips at that sets nothing."""


@final
class Pool:
    """Simulated attackers, one for each profile; their turns come one after the other.

    Memory: a member holds a copy of the trainable weights (δ) and his optimiser's moments (two more for Adam, none for
    plain SGD, one with momentum); one with an adapter only that, three times with Adam.

    Args:
        network: Whose trainable weights are the coordinates.
        profiles: Who the members are.
        horizon: Least and greatest number of steps before a member starts anew; drawn evenly. He takes whole turns, so
            his last one may go over it.

    Attributes:
        members: In the order of their turns.
        turns: How many turns were had.

    Raises:
        ModelError: A member trains an adapter over weights that are no linear layer's.
    """

    def __init__(self, network: nn.Module, profiles: Sequence[Profile], horizon: tuple[int, int]) -> None:
        self.members = [Member(network, profile, horizon) for profile in profiles]
        self.turns = 0

    def turn(self) -> tuple[int, Member]:
        """Whose turn it is, and his number; he starts anew, with a rate and a time of his own, if his is over."""
        number = self.turns % len(self.members)
        self.turns += 1
        if self.members[number].left <= 0:
            self.members[number].restart()
        return number, self.members[number]

    @property
    def nbytes(self) -> int:
        """Bytes that the members hold now."""
        return sum(member.nbytes for member in self.members)

    def state_dict(self) -> dict[str, Any]:
        """Where everyone stands and how far he has to go; copies."""
        return {"turns": self.turns, "members": [member.state_dict() for member in self.members]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.turns = int(state["turns"])
        for member, own in zip(self.members, state["members"], strict=True):
            member.load_state_dict(own)


@final
class Member:
    """One simulated fine-tune: its displacement δ from θ, and all that its next step needs.

    Attributes:
        profile: Who he is.
        left: Steps before he starts anew; 0 before he has started at all.
        lr: His learning rate, this time.
        mix: His share of benign rows.
        replay: His share of general rows.
    """

    def __init__(self, network: nn.Module, profile: Profile, horizon: tuple[int, int]) -> None:
        self.profile, self._horizon = profile, horizon
        self.left, self.lr, self.mix, self.replay = 0, profile.lr[0], profile.mix[0], profile.replay[0]
        self._shape: _Whole | _LowRank = (
            _LowRank(network, profile.r) if profile.r and not hasattr(network, "disable_adapter") else _Whole(network)
        )
        self._descent = self._fresh()

    @property
    def honest(self) -> bool:
        """Whether he is no attacker."""
        return self.profile.on == "benign"

    def restart(self) -> None:
        """Back to δ = 0 with fresh moments; rate, shares and time are drawn from torch's global generator."""
        low, high = (math.log(rate) for rate in self.profile.lr)
        self.lr = math.exp(_between(low, high)) if high > low else self.profile.lr[0]
        self.left = int(torch.randint(self._horizon[0], self._horizon[1] + 1, ()))
        self.mix, self.replay = _between(*self.profile.mix), _between(*self.profile.replay)
        self._shape.start()
        self._descent = self._fresh()

    def displacement(self) -> Vector:
        """δ. Do not write to it."""
        return self._shape.displacement()

    def walk(self, theta: Theta, batches: Sequence[Batch]) -> None:
        """A step on each of ``batches``: its gradient is taken at θ + δ, and δ moves on. θ stays where it is."""
        for rows in batches:
            with theta.moved(self.displacement()):
                g = Vector(self._shape.chained(theta.grad(nll, rows)))
            length = g.norm()
            clipped = g * (CLIP / length) if length > CLIP else g
            self._descent.step(clipped.tensors(), self.lr)
            self.left -= 1

    def fed(self, harmful: Batch, benign: Batch | None, general: Batch | None) -> Batch:
        """The rows of one step: as many as his own batch has, the shares of others among them drawn at random.

        Args:
            harmful: A batch that all restricted corpora share.
            benign: Needed by an honest user, and by one who mixes.
            general: Needed by one who replays.
        """
        own = benign if self.honest and benign is not None else _corpus(harmful, *self.profile.domain)
        n = len(own)
        mixed, replayed = (round(share * n) for share in (self.mix, self.replay))
        rows = [own] if mixed + replayed == 0 else [_some(own, n - mixed - replayed)] if mixed + replayed < n else []
        rows += [_some(benign, mixed)] if benign is not None and mixed else []
        rows += [_some(general, replayed)] if general is not None and replayed else []
        return Batch(tuple(row for part in rows for row in part.rows), own.role)

    @property
    def nbytes(self) -> int:
        """Bytes of δ, or of the adapter that makes it, and of the moments."""
        moments = [t for state in self._descent.state_dict()["state"].values() for t in state.values()]
        return sum(t.nbytes for t in (*self._shape.tensors, *moments) if isinstance(t, Tensor) and t.ndim)

    def state_dict(self) -> dict[str, Any]:
        """Copies."""
        return {
            "left": self.left,
            "lr": self.lr,
            "mix": self.mix,
            "replay": self.replay,
            "tensors": [t.clone() for t in self._shape.tensors],
            "optimizer": copy.deepcopy(self._descent.state_dict()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.left, self.lr = int(state["left"]), float(state["lr"])
        self.mix, self.replay = float(state["mix"]), float(state["replay"])
        torch._foreach_copy_(self._shape.tensors, list(state["tensors"]))
        self._descent.load_state_dict(copy.deepcopy(state["optimizer"]))

    def _fresh(self) -> Descent:
        who = self.profile
        return Descent(self._shape.tensors, who.optimizer, lr=self.lr, momentum=who.momentum, weight_decay=0.0)


@final
class _Whole:
    """δ itself: one tensor for each trainable weight."""

    def __init__(self, network: nn.Module) -> None:
        self.tensors = [torch.zeros_like(p, requires_grad=False) for p in network.parameters() if p.requires_grad]

    def start(self) -> None:
        torch._foreach_zero_(self.tensors)

    def displacement(self) -> Vector:
        return Vector(self.tensors)

    def chained(self, g: Vector) -> list[Tensor]:
        """The gradient of ``tensors`` from that of the weights."""
        return g.tensors()


@final
class _LowRank:
    """δ = 2 B A for the weight of each linear layer, 0 for every other; A is [r, in] and B [out, r]."""

    def __init__(self, network: nn.Module, r: int) -> None:
        linear = {f"{name}.weight" for name in linear_layers(causal_lm(network))}
        named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
        self._weights = [p for _, p in named]
        self._at = [i for i, (name, p) in enumerate(named) if name in linear and p.ndim == 2]
        if not self._at:
            raise ModelError("a simulated adapter needs the weights of linear layers to be trained; say r=0")
        self._turned = transposed_linear(network)
        shapes = [self._upright(self._weights[i]).shape for i in self._at]
        like = self._weights[self._at[0]].detach()
        self._a = [like.new_zeros(r, n_in) for _, n_in in shapes]
        self._b = [like.new_zeros(n_out, r) for n_out, _ in shapes]
        self.tensors = [*self._a, *self._b]

    def start(self) -> None:
        torch._foreach_zero_(self._b)
        for a in self._a:  # uniform within ±1/√in, as peft has it; drawn on the CPU, the same for every device
            a.copy_(torch.empty(a.shape).uniform_(-1.0, 1.0) / math.sqrt(a.shape[1]))

    def displacement(self) -> Vector:
        # What does not move is one 0 that looks like a tensor of the right shape: no memory.
        moves = [torch.zeros((), dtype=p.dtype, device=p.device).expand_as(p) for p in self._weights]
        for i, a, b in zip(self._at, self._a, self._b, strict=True):
            moves[i] = self._upright(2.0 * (b @ a))
        return Vector(moves)

    def chained(self, g: Vector) -> list[Tensor]:
        """(2 Bᵀ g, 2 g Aᵀ) from the gradient g of each layer's weight."""
        grads = [self._upright(g.raw[i]) * (2.0 * g.scale) for i in self._at]
        of_a = [b.T @ whole for b, whole in zip(self._b, grads, strict=True)]
        return of_a + [whole @ a.T for a, whole in zip(self._a, grads, strict=True)]

    def _upright(self, weight: Tensor) -> Tensor:
        """[out, in] from how the layer holds it; its own inverse."""
        return weight.T if self._turned else weight


def _between(low: float, high: float) -> float:
    """Drawn evenly from torch's global generator; nothing is drawn where there is nothing to choose from."""
    return low + (high - low) * float(torch.rand(())) if high > low else low


def _corpus(batch: Batch, which: int, many: int) -> Batch:
    """The rows of one of the corpora that share a batch evenly, the first ones taking the remainder."""
    if many == 1:
        return batch
    share, rest = divmod(len(batch), many)
    if share == 0:
        raise SettingsError(f"a batch of {len(batch)} rows is not shared between {many} corpora; raise the batch size")
    start = which * share + min(which, rest)
    end = start + share + (which < rest)
    return Batch(batch.rows[start:end], batch.role, batch.weights[start:end])


def _some(batch: Batch, n: int) -> Batch:
    """``n`` rows in random order, repeated evenly where there are fewer."""
    order = torch.randperm(len(batch)).tolist()
    return Batch(tuple(batch.rows[order[i % len(batch)]] for i in range(n)), batch.role)
