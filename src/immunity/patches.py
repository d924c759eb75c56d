"""Patches of low rank on linear layers: the network computes with W + V U, and no weight is touched.

    with patched(network, {"model.layers.0.self_attn.q_proj": Patch(u, v)}):
        nll(network, batch)

A layer's output y becomes y + (x Uᵀ) Vᵀ for its input x, which is what W + V U gives; each example may have a patch of
its own.

Shapes: B examples, T tokens, r rank, D_in and D_out of a linear layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from immunity.blocks import attention, blocks
from immunity.errors import ModelError, SettingsError
from immunity.hidden import Port, Replace, replacing
from immunity.losses import causal_lm
from immunity.networks import linear_layers

Targets = Literal["attention", "all-linear"]
"""Which linear layers of every block."""


class Size(NamedTuple):
    """A linear layer's inputs and outputs, and the Frobenius norm of its weight."""

    n_in: int
    n_out: int
    norm: float

    @property
    def shape(self) -> str:
        """A name for its shape."""
        return f"{self.n_in}-{self.n_out}"


class Patch(NamedTuple):
    """V U, to be added to the weight of a linear layer: for each example, or with a first dimension of 1 for all.

    Attributes:
        u: U, [B, r, D_in].
        v: V, [B, D_out, r].
    """

    u: Tensor
    v: Tensor

    def twice(self) -> Patch:
        """For the same examples twice, one after the other."""
        return self if len(self.u) == 1 else Patch(*(torch.cat([t, t]) for t in self))


def sizes(network: nn.Module, targets: Targets = "attention") -> dict[str, Size]:
    """The linear layers of a kind in every block, by name; one that carries an adapter counts once, with its own size.

    Raises:
        SettingsError: There is no such kind.
        ModelError: Blocks or layers cannot be found, or a layer does not hold its weight as a plain matrix.
    """
    if targets not in {"attention", "all-linear"}:
        raise SettingsError(f"targets = {targets!r}: use attention or all-linear")
    model = causal_lm(network)
    names = {module: name for name, module in model.named_modules()}
    plain = set(linear_layers(model).values())
    found: dict[str, Size] = {}
    for layer, block in enumerate(blocks(network)):
        root = attention(block, layer) if targets == "attention" else block
        for module in root.modules():
            base = _base(module)
            inside = any(names[module].startswith(f"{name}.") for name in found)
            if base in plain and not inside:
                found[names[module]] = _size(names[module], base)
    if not found:
        raise ModelError(f"{type(model).__name__} has no linear layer of the kind {targets!r} in its blocks")
    return found


@contextmanager
def patched(network: nn.Module, patches: Mapping[str, Patch]) -> Iterator[None]:
    """Inside the ``with`` each linear layer that is named computes with W + V U; its weights are not touched.

    Gradients flow to U and V, and may be taken after the ``with``; gradient checkpointing is counted in.

    Args:
        network: Left as found, also after an exception.
        patches: Name of a layer (see :func:`sizes`) -> its patch.

    Raises:
        ModelError: There is no such layer in a block; when called, a patch does not fit its layer or the batch.
    """
    by: dict[Port, Replace] = {}
    for name, patch in patches.items():
        held: dict[str, Tensor] = {}
        by[Port(name, "input")] = partial(_held, held)
        by[Port(name, "output")] = partial(_patched, name, patch, held)
    with replacing(network, by):
        yield


def _held(held: dict[str, Tensor], x: Tensor) -> Tensor:
    held["x"] = x
    return x


def _patched(name: str, patch: Patch, held: dict[str, Tensor], y: Tensor) -> Tensor:
    x, (u, v) = held.pop("x"), patch
    if x.shape[-1] != u.shape[-1] or y.shape[-1] != v.shape[-2] or x.ndim != 3 or len(u) not in {1, len(x)}:
        raise ModelError(
            f"{name} maps {tuple(x.shape)} to {tuple(y.shape)}: a patch with U {tuple(u.shape)} and V {tuple(v.shape)} "
            "does not fit"
        )
    return y + (x.to(u.dtype) @ u.mT) @ v.mT


def _base(module: Any) -> Any:  # noqa: ANN401 - one of peft's layers, perhaps
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _size(name: str, base: Any) -> Size:  # noqa: ANN401 - torch's linear layers and those of transformers
    weight: Tensor = base.weight
    # nn.Linear holds [out, in]; GPT-2's layers [in, out], and say only what comes out.
    known = (base.out_features, base.in_features) if isinstance(base, nn.Linear) else tuple(weight.shape)
    if tuple(weight.shape) != known or not weight.is_floating_point():
        raise ModelError(
            f"{name} holds its weight as {tuple(weight.shape)} of {weight.dtype}, no plain matrix: load the model "
            "without quantisation to patch it"
        )
    n_out, n_in = known if isinstance(base, nn.Linear) else (known[1], known[0])
    return Size(n_in, n_out, float(torch.linalg.vector_norm(weight.detach().double())))
