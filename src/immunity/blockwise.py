"""One block by itself: run again on what once entered it, so that training it needs no pass through the others.

    block = Block(network, layer=12)
    block.keep(theta, rows)                        # one pass through the network
    theta.grad(block.neutral([edit], reg=0.01), rows)   # passes through this block alone

What a block is given (hidden states, masks, positions) and what its attention and its MLP make of it are kept per
micro-batch, for as long as nothing below the block changes.

Shapes: B examples, T tokens, D hidden size, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, final

import torch
from torch import Tensor, nn

from immunity.batch import IGNORE, Batch, Tokens
from immunity.blocks import attention, blocks
from immunity.errors import ModelError
from immunity.hidden import Replace, Site, calls, reading, replacing
from immunity.losses import Loss, causal_lm, response_states
from immunity.networks import linear_layers
from immunity.patches import Patch, patched
from immunity.theta import Theta
from immunity.transforms import chosen, unchanged

ATTENTION_SCALE: Final = 0.5
"""What E.T.'s released code multiplies attention's patch with while it is trained (α / r = 1 / 2), not afterwards."""


def prompts(batch: Batch) -> Batch:
    """The same rows without their responses but for the first token, which a batch cannot be without."""
    rows = []
    for row in batch.rows:
        end = 1 + next(t for t in range(1, len(row.ids)) if row.labels[t] != IGNORE)
        rows.append(Tokens(row.ids[:end], row.labels[:end]))
    return Batch(tuple(rows), batch.role, batch.weights)


class Kept(NamedTuple):
    """What is known of a block and a micro-batch.

    Attributes:
        states: What entered the block: [B, T, D].
        args: What it was given by position after them.
        kwargs: What it was given by name.
        clean: What its attention and its MLP made of that.
        counted: Positions of prompts: [B, T].
    """

    states: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    clean: dict[Site, Tensor]
    counted: Tensor


@final
class Block:
    """A block of a network, and what it was given.

    Args:
        network: Left as found.
        layer: Number of the block, from 0.
    """

    def __init__(self, network: nn.Module, layer: int) -> None:
        self._network, self._layer = network, layer
        self._places = (Site(layer, "attention"), Site(layer, "mlp"))
        self._kept: dict[tuple[Tokens, ...], Kept] = {}

    def keep(self, theta: Theta, batch: Batch) -> None:
        """Note what the block is given for the micro-batches of ``batch``, and what it makes of it now."""

        def of(network: nn.Module, micro: Batch) -> Tensor:
            padded = micro.padded(next(network.parameters()).device)
            with (
                torch.no_grad(),
                replacing(network, unchanged(network, {})),
                calls(network, self._layer) as called,
                reading(network, self._places) as seen,
            ):
                response_states(network, micro)
            args, kwargs = called[-1]
            others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            states: Tensor = args[0] if args else kwargs["hidden_states"]
            self._kept[micro.rows] = Kept(states, args[1:], others, dict(seen), chosen(padded, "prompt"))
            return states.new_zeros(len(micro))

        before = dict(theta.trace)
        theta.value(Loss("kept", of), batch)
        theta.trace = before

    def neutral(self, edits: Sequence[Replace], reg: float, patches: Callable[[], Mapping[str, Patch]] = dict) -> Loss:
        """How much of edits of the block's input gets through its attention and its MLP: [B].

        Σ_m MSE(m(h + i), m₀(h)) + reg Σ_m MSE(m(h), m₀(h)) over the two modules m, at prompt positions: h is what was
        kept, i = edit(h) − h at prompt positions, m₀(h) what the module made of h when it was kept. With several edits
        the first term is their mean. The edit itself stays in the residual stream.

        Args:
            edits: [B, T, D] -> [B, T, D]; at least one.
            reg: λ_reg, the weight of staying as it was without an edit.
            patches: Gives what linear layers of the block compute with besides; called in every pass.
        """

        def of(network: nn.Module, micro: Batch) -> Tensor:
            kept = self._kept[micro.rows]
            with patched(network, patches()), reading(network, self._places) as seen:

                def off(states: Tensor) -> Tensor:
                    here = blocks(network)[self._layer]
                    here(states, *kept.args, **kept.kwargs)
                    return torch.stack([_apart(seen[at], kept.clean[at], kept.counted) for at in self._places]).sum(0)

                here = kept.counted[..., None]
                shifted = [torch.where(here, f(kept.states).to(kept.states.dtype), kept.states) for f in edits]
                through = torch.stack([off(states.detach()) for states in shifted]).mean(0)
                return through + reg * off(kept.states)

        return Loss("neutral", of)


@final
class LowRank:
    """Δ = V U for linear layers of a block whose weights are trainable, to be trained and then merged into them.

    U starts random and V at 0, so that Δ starts at 0; drawn from torch's generator.

    Args:
        network: Whose block it is.
        layer: Number of the block.
        rank: r.
        quirks: As E.T.'s released code has it: both factors start random, and attention's Δ is merged at twice the
            scale that it was trained at.
    """

    def __init__(self, network: nn.Module, layer: int, rank: int, *, quirks: bool = False) -> None:
        self._layers = trainable_linear(network, layer)
        inside = set(attention(blocks(network)[layer], layer).modules())
        self._scales = {
            name: ATTENTION_SCALE if quirks and module in inside else 1.0 for name, module in self._layers.items()
        }
        self.factors: dict[str, nn.Parameter] = {}
        for name, module in self._layers.items():
            n_out, n_in = _upright(module).shape
            u, v = torch.randn(1, rank, n_in) / math.sqrt(n_in), torch.zeros(1, n_out, rank)
            if quirks and module in inside:
                u, v = 0.02 * torch.randn(1, rank, n_in), 0.02 * torch.randn(1, n_out, rank)
            elif quirks:
                u = torch.empty(1, rank, n_in).uniform_(-1.0, 1.0) / math.sqrt(n_in)
                v = torch.empty(1, n_out, rank).uniform_(-1.0, 1.0) / math.sqrt(rank)
            like = _upright(module)
            self.factors[f"{name}.u"], self.factors[f"{name}.v"] = (nn.Parameter(t.to(like)) for t in (u, v))

    def patches(self) -> dict[str, Patch]:
        """For :func:`~immunity.patches.patched`, while it trains."""
        return {
            name: Patch(self.factors[f"{name}.u"], scale * self.factors[f"{name}.v"])
            for name, scale in self._scales.items()
        }

    def merge(self) -> None:
        """Add Δ to the weights."""
        with torch.no_grad():
            for name, module in self._layers.items():
                _upright(module).add_((self.factors[f"{name}.v"] @ self.factors[f"{name}.u"])[0])


def coordinates(network: nn.Module, layer: int) -> dict[str, nn.Parameter]:
    """The trainable parameters of a block, by name."""
    inside = {id(p) for p in blocks(network)[layer].parameters()}
    return {name: p for name, p in network.named_parameters() if p.requires_grad and id(p) in inside}


def treatable(network: nn.Module) -> tuple[int, ...]:
    """The blocks of which linear layers, or an adapter, are trainable, first to last.

    Raises:
        ModelError: The blocks cannot be found.
    """
    of = coordinates if adapted(network) else trainable_linear
    return tuple(layer for layer in range(len(blocks(network))) if of(network, layer))


def adapted(network: nn.Module) -> bool:
    """Whether there is an adapter, which is then what moves; without one the weights do."""
    return hasattr(network, "disable_adapter")


def trainable_linear(network: nn.Module, layer: int) -> dict[str, nn.Module]:
    """The linear layers of a block whose own weights are trainable, by name; none where there is an adapter.

    Raises:
        ModelError: The network has no such block.
    """
    if not 0 <= layer < len(blocks(network)):
        raise ModelError(f"there is no block {layer}: the network has {len(blocks(network))}, counted from 0")
    if adapted(network):
        return {}
    inside = set(blocks(network)[layer].modules())
    return {
        name: module
        for name, module in linear_layers(causal_lm(network)).items()
        if module in inside and module.get_parameter("weight").requires_grad
    }


def _upright(module: nn.Module) -> Tensor:
    """The weight of a linear layer as [out, in], whichever way it holds it: a view."""
    weight = module.get_parameter("weight")
    return weight if isinstance(module, nn.Linear) else weight.T


def _apart(now: Tensor, then: Tensor, counted: Tensor) -> Tensor:
    """Mean square of the difference over D and the counted positions of each row: [B], in float32 at least."""
    wide = torch.promote_types(now.dtype, torch.float32)
    squares = (now.to(wide) - then.to(wide)).square().mean(-1).masked_fill(~counted, 0.0)
    return squares.sum(1) / counted.sum(1).clamp(min=1)
