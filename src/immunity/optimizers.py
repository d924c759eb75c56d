"""Optimisers by name: a step along a given direction, with a state that resumes bit for bit."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Literal, final

import torch
from torch import Tensor

from immunity.errors import MissingExtraError

Optimizer = Literal["adamw", "adam", "sgd", "nesterov", "adagrad", "adadelta", "schedulefree"]
OPTIMIZERS: Final[tuple[Optimizer, ...]] = (
    "adamw",
    "adam",
    "sgd",
    "nesterov",
    "adagrad",
    "adadelta",
    "schedulefree",
)
"""All of them, in the order in which they are listed for people."""

_ITERATE: Final = "iterate"


@final
class Descent:
    """One optimiser over some parameters.

    Schedule-Free AdamW trains at one point (y) and releases another (x, the average of where it went). Outside
    :meth:`shown` and before :meth:`settle` the parameters hold y; for every other optimiser the two are one.

    Args:
        parameters: What is stepped, in place.
        name: Of the optimiser.
        lr: Until a step says another.
        momentum: Of "sgd" and "nesterov".
        weight_decay: Decoupled for "adamw" and "schedulefree", added to the gradient for the others.

    Raises:
        MissingExtraError: "schedulefree" was asked for and its package is not installed.

    Source:
        Defazio et al., arXiv 2405.15682, for Schedule-Free AdamW: the package ``schedulefree`` of its authors. The
        others are torch's own.
    """

    def __init__(
        self, parameters: Sequence[Tensor], name: Optimizer, *, lr: float, momentum: float, weight_decay: float
    ) -> None:
        self._parameters = list(parameters)
        self._averages = name == "schedulefree"
        self._inner: Any = _made(self._parameters, name, lr, momentum, weight_decay)
        if self._averages:
            self._inner.train()

    def step(self, along: Sequence[Tensor], lr: float, still: Collection[int] = ()) -> None:
        """One step against ``along``, a gradient; its tensors are left as they are, and so is every ``.grad``.

        The parameters numbered in ``still`` are left alone, with their momentum and without decay.
        """
        for group in self._inner.param_groups:
            group["lr"] = lr
        found = [p.grad for p in self._parameters]
        try:
            for i, (p, g) in enumerate(zip(self._parameters, along, strict=True)):
                given = g.clone() if self._averages else g  # that one normalises gradients in place
                p.grad = None if i in still else given
            self._inner.step()
        finally:
            for p, grad in zip(self._parameters, found, strict=True):
                p.grad = grad

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Inside the ``with`` the parameters are those that are measured and saved; back bit for bit afterwards."""
        if not self._averages:
            yield
            return
        iterate = self._copies()
        self._inner.eval()
        try:
            yield
        finally:
            self._inner.train()
            self._put(iterate)

    def settle(self) -> None:
        """Leave the parameters as they are measured and saved: no further step will come."""
        if self._averages:
            self._inner.eval()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step needs, the parameters' released values apart."""
        state: dict[str, Any] = dict(self._inner.state_dict())
        return {**state, _ITERATE: self._copies()} if self._averages else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._inner.load_state_dict({name: value for name, value in state.items() if name != _ITERATE})
        if self._averages:
            self._put(state[_ITERATE])

    def _copies(self) -> list[Tensor]:
        return [p.detach().clone() for p in self._parameters]

    def _put(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self._parameters, list(values))


def _made(parameters: list[Tensor], name: Optimizer, lr: float, momentum: float, weight_decay: float) -> Any:  # noqa: ANN401
    if name == "schedulefree":
        try:
            from schedulefree import AdamWScheduleFree
        except ImportError as error:
            raise MissingExtraError(
                "optimizer = 'schedulefree' needs the package schedulefree: pip install 'immunity[search]'"
            ) from error
        return AdamWScheduleFree(parameters, lr=lr, weight_decay=weight_decay)
    if name in {"sgd", "nesterov"}:
        return torch.optim.SGD(
            parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=name == "nesterov"
        )
    kinds = {
        "adamw": torch.optim.AdamW,
        "adam": torch.optim.Adam,
        "adagrad": torch.optim.Adagrad,
        "adadelta": torch.optim.Adadelta,
    }
    # One pass over the weights, not one for each operation: a quarter of the time on a processor.
    fused = {"fused": True} if name in {"adamw", "adam"} else {}
    return kinds[name](parameters, lr=lr, weight_decay=weight_decay, **fused)
