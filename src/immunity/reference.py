"""The model as it was before the first step: what preferences, divergences and drifts are measured against.

    before = Reference(network)
    theta.grad(kl(before), batch)             # KL(p_before || p_theta)
    margins(theta, a, b, before.at(log_prob))

Nothing it computes is kept from step to step: what a row gives differs by rounding with the rows beside it, and a
resumed run has to end bit for bit as a whole one. Within a step the caller keeps what it needs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, Literal, final

import torch
from torch import Tensor, nn

from immunity.batch import Batch
from immunity.errors import SettingsError
from immunity.losses import Loss, causal_lm, chunked, logits, response_states, row_means

_ADAPTER: Final = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
_ZERO_AT_FIRST: Final = ("lora_B", "lora_embedding_B")


@final
class Reference:
    """A network as it is when this is made, whatever is trained later.

    Over a fresh LoRA adapter it is the same network with the adapter off, and nothing is copied. Otherwise it is a
    frozen copy in the weights' own dtype, which takes as much memory as the weights that are trainable now: frozen
    weights are shared with it. (An adapter that has been trained before is copied; the base under it is not.)

    Args:
        network: Its frozen weights must stay as they are.

    Attributes:
        copied: Bytes of weights that the copy holds; 0 with the adapter off.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network if _adapter_is_fresh(network) else _frozen(network)
        self._switched = self._network is network
        self.copied = 0 if self._switched else sum(p.nbytes for p in network.parameters() if p.requires_grad)

    @contextmanager
    def standing(self) -> Iterator[nn.Module]:
        """The network as it was, without gradients, inside the ``with``; adapters and flags as found afterwards.

        Enter it *before* the forward pass whose gradient is wanted: switching adapters under a live graph is not safe.
        """
        with torch.no_grad():
            if not self._switched:
                yield self._network
            else:
                with _adapter_off(self._network):
                    yield self._network

    def at(self, loss: Loss) -> Loss:
        """The same loss, of the network as it was: a constant, without a gradient."""

        def of(_network: nn.Module, batch: Batch) -> Tensor:
            with self.standing() as before:
                return loss(before, batch)

        return Loss(f"{loss.name}-before", of, loss.coupled)

    def head(self, states: Tensor) -> Tensor:
        """Logits [N, V] of hidden states [N, D] of the network as it was; no gradient. Safe under a live graph."""
        with torch.no_grad():
            return logits(self._network, states)


def kl(reference: Reference, direction: Literal["forward", "reverse"] = "forward") -> Loss:
    """Divergence of next-token distributions from those of before, in nats, averaged over response positions: [B].

    Args:
        reference: Before.
        direction: "forward": KL(p_before ‖ p_theta), as in distillation. "reverse": KL(p_theta ‖ p_before), as in
            reinforcement learning. Both are 0, with gradient 0, where nothing has changed.

    Raises:
        SettingsError: There is no such direction.
    """
    if direction not in {"forward", "reverse"}:
        raise SettingsError(f"direction = {direction!r}: use forward, KL(before || now), or reverse, KL(now || before)")

    def each(scores: Tensor, states: Tensor) -> Tensor:
        now, then = scores.log_softmax(-1), reference.head(states).log_softmax(-1)
        p, q = (then, now) if direction == "forward" else (now, then)
        return (p.exp() * (p - q)).sum(-1)

    def of(network: nn.Module, batch: Batch) -> Tensor:
        with reference.standing() as before:
            known, _, _ = response_states(before, batch)
        states, _, keep = response_states(network, batch)
        return row_means(chunked(network, states, known, each), keep)

    return Loss(f"{direction}-kl", of)


def _adapter_is_fresh(network: nn.Module) -> bool:
    """Whether all that trains is a LoRA adapter that does nothing yet, and none of it sits on the head."""
    if not hasattr(network, "disable_adapter"):
        return False
    trained = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    return (
        all(any(part in _ADAPTER for part in name.split(".")) for name, _ in trained)
        and not any(p.any() for name, p in network.named_parameters() if _first_zero(name))
        and not any(p.requires_grad for p in causal_lm(network).get_output_embeddings().parameters())
    )


def _first_zero(name: str) -> bool:
    return any(part in _ZERO_AT_FIRST for part in name.split("."))


def _frozen(network: nn.Module) -> nn.Module:
    """A copy that shares every frozen weight and every buffer."""
    shared: list[Tensor] = [p for p in network.parameters() if not p.requires_grad]
    memo: dict[int, Any] = {id(t): t for t in [*shared, *network.buffers()]}
    return copy.deepcopy(network, memo).requires_grad_(False).eval()


@contextmanager
def _adapter_off(network: Any) -> Iterator[None]:  # noqa: ANN401 - a peft model
    """``peft`` switches gradients of adapters off and, afterwards, all of them on: the flags are put back as found."""
    flags = [(p, p.requires_grad) for p in network.parameters()]
    try:
        with network.disable_adapter():
            yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
