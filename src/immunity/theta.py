"""Theta and Vector: a point in parameter space that you can take gradients at, move from, and come back to."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache

import torch
from torch import Tensor, nn

from immunity.batch import Batch
from immunity.errors import DivergedError, ModelError, PrecisionError, SettingsError
from immunity.losses import Loss


class Vector:
    """A direction in parameter space: one tensor for each trainable weight, times a lazy coefficient.

    Multiplying by a number costs nothing; a sum is one fused pass.

    Attributes:
        scale: The coefficient.
        still: Numbers of the tensors that are left out (see :meth:`Theta.resting`): 0 here, and a training run leaves
            those weights and their optimiser's state alone, where a gradient of 0 would move them by momentum and
            decay. A sum leaves out what both of its terms do.
    """

    __slots__ = ("_parts", "scale", "still")

    def __init__(self, parts: Sequence[Tensor], scale: float = 1.0, still: frozenset[int] = frozenset()) -> None:
        self._parts = list(parts)
        self.scale = scale
        self.still = still

    @property
    def raw(self) -> list[Tensor]:
        """The tensors without the coefficient ``scale``; do not write to them."""
        return self._parts

    def tensors(self) -> list[Tensor]:
        """The tensors with the coefficient applied; new memory unless the coefficient is 1."""
        return self._parts if self.scale == 1.0 else list(torch._foreach_mul(self._parts, self.scale))

    def __mul__(self, number: float) -> Vector:
        return Vector(self._parts, self.scale * number, self.still)

    __rmul__ = __mul__

    def __neg__(self) -> Vector:
        return self * -1.0

    def __add__(self, other: Vector) -> Vector:
        out = list(torch._foreach_mul(self._parts, self.scale))
        torch._foreach_add_(out, other._parts, alpha=other.scale)
        return Vector(out, still=self.still & other.still)

    def __sub__(self, other: Vector) -> Vector:
        return self + -other

    def __matmul__(self, other: Vector) -> float:
        products = [(a * b).sum() for a, b in zip(self._parts, other._parts, strict=True)]
        return self.scale * other.scale * float(torch.stack(products).sum())

    def norm(self) -> float:
        """Euclidean norm over all tensors together."""
        return abs(self.scale) * float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self._parts))))

    def unit(self, eps: float = 1e-7) -> Vector:
        """This vector divided by (its global norm + ``eps``)."""
        return self * (1.0 / (self.norm() + eps))


class Theta:
    """The trainable weights of a network, as a point.

    Args:
        network: What a loss is computed with.
        trainable: The coordinates, by name: parameters of the network or of anything that acts on it (an intervention,
            a soft prompt). None: the network's own with ``requires_grad``.
        micro_batch: Rows per forward pass; None takes each batch whole. Never changes a result, only memory.
        autocast: Compute dtype (``torch.bfloat16``); None computes in the weights' own.
        token: Resolves a word to a token id for losses that need one (see ``LanguageModel.word_id``).

    Attributes:
        trace: Loss values met since the last :meth:`clear`: "nll/harmful" at home, "collapse/general@3" three steps
            away from it.
        progress: The share of its run that is done, from 0 to 1; the loop says it, a curriculum reads it.

    Raises:
        ModelError: Nothing is trainable, or a coordinate was given that takes no gradient.
        PrecisionError: A trainable weight is in half precision, where a simulated step leaves most weights unmoved.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        trainable: Mapping[str, nn.Parameter] | None = None,
        micro_batch: int | None = None,
        autocast: torch.dtype | None = None,
        token: Callable[[str], int] | None = None,
    ) -> None:
        self.network = network
        chosen = _own(network) if trainable is None else dict(trainable)
        self.names = list(chosen)
        self.parameters: list[Tensor] = list(chosen.values())
        # Only these leaves get a gradient, so that weights which are trainable but not coordinates are left as found.
        self._leaves = None if trainable is None else self.parameters
        if frozen := [n for n, p in chosen.items() if not p.requires_grad]:
            raise ModelError(f"{frozen[0]} was given as trainable but takes no gradient: call requires_grad_() on it")
        if not self.parameters:
            raise ModelError("no trainable weight: attach a LoRA adapter or make every weight trainable first")
        low = [n for n, p in zip(self.names, self.parameters, strict=True) if p.dtype.itemsize < 4]
        if low:
            raise PrecisionError(
                f"{len(low)} trainable weights are in half precision (first: {low[0]}). Load with dtype='float32', or "
                "train a LoRA adapter (kept in fp32 over a bf16 base); use autocast='bf16' to compute in bf16"
            )
        self.micro_batch = micro_batch
        self.autocast = autocast
        self.trace: dict[str, float] = {}
        self.progress = 0.0
        self._token = None if token is None else cache(token)
        self._away = 0  # displacements from home: names the place in the trace

    def token(self, word: str) -> int:
        """The id of ``word`` in the model's vocabulary.

        Raises:
            SettingsError: This Theta was made without a tokenizer.
        """
        if self._token is None:
            raise SettingsError(f"cannot resolve the word {word!r}: Theta was made without `token`")
        return self._token(word)

    def clear(self) -> dict[str, float]:
        """The trace so far; the next one starts empty."""
        trace, self.trace = self.trace, {}
        return trace

    def grad(self, loss: Loss, batch: Batch) -> Vector:
        """∇ of the weighted mean of ``loss`` over ``batch``, at this point. Every ``.grad`` is left as found.

        Raises:
            SettingsError: The loss is coupled and ``micro_batch`` would split the batch.
            DivergedError: The loss is NaN or infinite.
        """
        if loss.coupled and self.micro_batch is not None and self.micro_batch < len(batch):
            raise SettingsError(
                f"the loss {loss.name!r} couples the examples of a batch: its {len(batch)} rows cannot be split into "
                f"micro-batches of {self.micro_batch}; set micro_batch to {len(batch)} or more"
            )
        with no_grads(self.parameters):
            value = 0.0
            for part in self._parts(loss, batch):
                inputs = None if self._leaves is None else [p for p in self._leaves if p.requires_grad]
                part.backward(inputs=inputs)  # type: ignore[no-untyped-call]
                value += float(part.detach())
            self.record(loss, batch, value)
            return self.accumulated()

    def accumulated(self) -> Vector:
        """The ``.grad`` of every coordinate, 0 where no backward pass came by. Not a copy."""
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        return Vector(found, still=frozenset(i for i, p in enumerate(self.parameters) if not p.requires_grad))

    @contextmanager
    def resting(self, names: Collection[str]) -> Iterator[None]:
        """Freeze some coordinates inside the ``with``: gradients leave them out (:attr:`Vector.still`)."""
        chosen = [p for name, p in zip(self.names, self.parameters, strict=True) if name in names]
        try:
            for p in chosen:
                p.requires_grad_(False)
            yield
        finally:
            for p in chosen:
                p.requires_grad_(True)

    def value(self, loss: Loss, batch: Batch) -> float:
        """The weighted mean of ``loss`` over ``batch`` at this point, without a gradient.

        Raises:
            DivergedError: The loss is NaN or infinite.
        """
        with torch.no_grad():
            value = sum(float(part) for part in self._parts(loss, batch))
        self.record(loss, batch, value)
        return value

    @contextmanager
    def moved(self, by: Vector) -> Iterator[None]:
        """Stand at θ + ``by`` inside the ``with``; back bit for bit afterwards, also after an exception."""
        with self.excursion():
            self.step(by)
            yield

    @contextmanager
    def excursion(self) -> Iterator[None]:
        """Take any number of steps inside the ``with``; back bit for bit afterwards, also after an exception.

        Costs one copy of the trainable weights, however many steps are taken.
        """
        home, away = [p.detach().clone() for p in self.parameters], self._away
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, home)
            self._away = away

    def step(self, by: Vector) -> None:
        """θ ← θ + ``by``, in place."""
        with torch.no_grad():
            torch._foreach_add_(self.parameters, by.raw, alpha=by.scale)
        self._away += 1

    def hvp(self, loss: Loss, batch: Batch, v: Vector, *, scale: float, at: Vector | None = None) -> Vector:
        """H v, the Hessian of the mean loss times ``v``, by a difference of two gradients. No double backward.

        Args:
            loss: Smooth at this point.
            batch: The same rows at both ends.
            v: The direction; its length does not matter to the accuracy.
            scale: A distance in weight space over which the gradient changes noticeably (a simulated step, say). The
                gradients are taken at a fraction of it that balances truncation against rounding in the weights' dtype.
            at: ∇loss(θ) where it is already known: a forward difference, one extra gradient and an error of the order
                √ε of the dtype. None takes a central difference: two gradients, and ε^⅔.

        Raises:
            PrecisionError: Under bf16 autocast a difference of gradients is rounding noise.
        """
        if self.autocast is not None:
            raise PrecisionError(
                "a Hessian-vector product by differences of gradients is noise under bf16 autocast; "
                "set autocast='no', or leave the curvature term out"
            )
        length = v.norm()
        if length == 0.0:
            return v
        eps = torch.finfo(self.parameters[0].dtype).eps
        r = scale * math.pow(eps, 1 / 3 if at is None else 1 / 2) / length
        trace = dict(self.trace)
        with self.moved(r * v):
            ahead = self.grad(loss, batch)
        if at is not None:
            product = (1.0 / r) * (ahead - at)
        else:
            with self.moved(-r * v):
                product = (0.5 / r) * (ahead - self.grad(loss, batch))
        self.trace = trace
        return product

    def _parts(self, loss: Loss, batch: Batch) -> Iterator[Tensor]:
        """For each micro-batch its share of the batch's weighted mean, as a scalar with a graph."""
        total = sum(batch.weights)
        context = (
            nullcontext() if self.autocast is None else torch.autocast(self.parameters[0].device.type, self.autocast)
        )
        for micro in batch.split(self.micro_batch):
            with context:
                values = loss(self.network, micro)
            weights = torch.tensor(micro.weights, dtype=values.dtype, device=values.device) / total
            yield (values * weights).sum()

    def record(self, loss: Loss, batch: Batch, value: float) -> None:
        """Put a value of ``loss`` over ``batch`` at this point into the trace.

        Raises:
            DivergedError: It is NaN or infinite.
        """
        place = f"@{self._away}" if self._away else ""
        name = f"{loss.name}/{batch.role}{place}"
        if not math.isfinite(value):
            raise DivergedError(f"{name} is {value}: lower the learning rate or the simulated step, or clip gradients")
        self.trace[name] = value


@contextmanager
def no_grads(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Inside the ``with`` every ``.grad`` starts as None; each is as found afterwards."""
    found = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in zip(parameters, found, strict=True):
            p.grad = grad


def _own(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in network.named_parameters() if p.requires_grad}
