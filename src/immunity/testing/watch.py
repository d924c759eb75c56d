"""What the contract suite watches with: a picture of a network, roles that tell who reads them, spied-on calls."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, Final, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from immunity.batch import Batch
from immunity.data.corpus import Corpus, Example
from immunity.errors import ImmunityError
from immunity.fit import Batches, Direction
from immunity.losses import Loss, causal_lm
from immunity.method import Method
from immunity.models import LanguageModel, LoRA, attach
from immunity.testing import tiny
from immunity.theta import Theta, Vector

V = TypeVar("V")

_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ALGEBRA: Final = ("grad", "value", "step", "hvp", "token", "record")
"""What a fault is injected into: each before it does anything, ``record`` after a backward pass as well."""


class ContractError(ImmunityError, AssertionError):
    """A method or an attack breaks the contract. The message says what it did and what it should do."""


class InjectedError(BaseException):
    """Injected by the suite. No ``Exception``, like Ctrl-C: ``except Exception`` must not be what cleans up."""


def require(kept: bool, message: str) -> None:
    """Raise :class:`ContractError` with ``message`` unless ``kept``."""
    if not kept:
        raise ContractError(message)


def picture(network: nn.Module) -> dict[str, object]:
    """All that has to be as it was: weights and buffers bit for bit, ``.grad``, flags, modes, hooks, patched code."""
    seen: dict[str, object] = {}
    for name, p in network.named_parameters():
        seen[f"the weight {name}"] = bits(p)
        seen[f"the .grad of {name}"] = None if p.grad is None else (id(p.grad), bits(p.grad))
        seen[f"requires_grad of {name}"] = p.requires_grad
        seen[f"the hooks of the weight {name}"] = len(p._backward_hooks or ()) + len(_after(p) or ())
    for name, buffer in network.named_buffers():
        seen[f"the buffer {name}"] = bits(buffer)
    for name, module in network.named_modules():
        called = name or "the network"
        seen[f"the training mode of {called}"] = module.training
        seen[f"the hooks of {called}"] = sum(len(vars(module)[kind]) for kind in _HOOKS)
        seen[f"the forward method of {called}"] = "forward" in vars(module)
    return seen


def require_same(before: Mapping[str, object], network: nn.Module, when: str) -> None:
    """Raise :class:`ContractError` unless ``network`` gives the picture ``before``; ``when`` starts the message."""
    after = picture(network)
    other = [what for what in {**before, **after} if before.get(what, ()) != after.get(what, ())]
    more = f" and {len(other) - 3} more" if len(other) > 3 else ""
    require(not other, f"{when}: it did not leave as found {', '.join(other[:3])}{more}")


def bits(tensor: Tensor) -> bytes:
    """The bytes of a tensor: equal for NaNs too, different for 0 and -0."""
    return tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def equal(a: Vector, b: Vector) -> bool:
    """Whether two vectors are equal, entry by entry."""
    return all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


class Watched(Mapping[str, V]):
    """Role -> data, that records what is read and refuses what was not declared.

    Attributes:
        read: The roles read so far.
    """

    def __init__(self, data: Mapping[str, V], whose: str) -> None:
        self.read: set[str] = set()
        self._data = dict(data)
        self._whose = whose

    def __getitem__(self, role: str) -> V:
        if role in self:
            self.read.add(role)
        return self._data[role]

    def __contains__(self, role: object) -> bool:
        require(role in self._data, f"{self._whose} looks for the role {role!r}, which its `reads` does not declare")
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(self._data)

    def __len__(self) -> int:
        return len(self._data)


class Call(NamedTuple):
    """One call into the algebra; loss and batch are None where it takes none."""

    name: str
    loss: Loss | None
    batch: Batch | None


@contextmanager
def spied(theta: Theta, fail_at: int | None = None) -> Iterator[list[Call]]:
    """List the calls that are made into ``theta`` inside the ``with``, and the forward passes of its network.

    Args:
        theta: Watched as an object; the class stays as it is.
        fail_at: The call, counted from 1, that raises :class:`InjectedError` instead of being made; None for none.
    """
    calls: list[Call] = []

    def tell(name: str, *given: object) -> None:
        losses = [x for x in given if isinstance(x, Loss)]
        batches = [x for x in given if isinstance(x, Batch)]
        calls.append(Call(name, losses[0] if losses else None, batches[0] if batches else None))
        if len(calls) == fail_at:
            raise InjectedError(f"injected into call {fail_at}, {name}")

    def call(name: str, made: Callable[..., Any], *args: Any, **options: Any) -> Any:  # noqa: ANN401 - stands for any
        tell(name, *args, *options.values())
        return made(*args, **options)

    for name in _ALGEBRA:
        setattr(theta, name, partial(call, name, getattr(theta, name)))
    hook = first_layer(theta.network).register_forward_pre_hook(lambda *_: tell("forward"))
    try:
        yield calls
    finally:
        hook.remove()
        for name in _ALGEBRA:
            delattr(theta, name)


def first_layer(network: nn.Module) -> nn.Module:
    """The input embeddings, which every forward pass goes through."""
    found: nn.Module = causal_lm(network).get_input_embeddings()
    return found


def made(family: str = "llama", trains: str = "full", template: str = "chat") -> LanguageModel:
    """A small model: "llama" or "gpt2", training its "full" weights or a "lora", "chat" or "alpaca" prompts."""
    mould = _mould(family, template)
    model = replace(mould, network=copy.deepcopy(mould.network))
    return attach(model, LoRA(r=4)) if trains == "lora" else model


@lru_cache(maxsize=4)
def _mould(family: str, template: str) -> LanguageModel:
    network = tiny.llama() if family == "llama" else tiny.gpt2(torch.float32, vocab=tiny.VOCAB, positions=256)
    return tiny.language_model(network, chat=template == "chat", max_length=192)


def mark(model: LanguageModel) -> None:
    """Some gradients to be left alone, some that are None; some modules in training mode, some not."""
    for i, p in enumerate(model.network.parameters()):
        p.grad = torch.full_like(p, 7.0) if i % 2 else None
    for i, module in enumerate(model.network.modules()):
        module.training = i % 3 == 0


def at(model: LanguageModel, *, micro_batch: int | None = None, autocast: torch.dtype | None = None) -> Theta:
    """The point where ``model`` is."""
    return Theta(model.network, micro_batch=micro_batch, autocast=autocast, token=model.word_id)


def batches(method: Method, rows: int = 2) -> dict[str, Batch]:
    """What a step of ``method`` gets, ragged and made of random ids: ``rows`` rows for each batch that it declares."""
    return {role: tiny.batch(rows * k, seed=i, role=role) for i, (role, k) in enumerate(method.reads.items())}


def direction(along: Direction, theta: Theta, batch: Batches, step: int = 0) -> Vector:
    """A direction under the random numbers of one step, as in ``fit``; the caller's stay as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(step)
        return along(theta, batch)


def corpus(role: str, n: int = 12) -> Corpus:
    """Made-up, harmless examples; no two roles share one, but "heldout" and "safe" answer "harmful" prompts."""
    asks = "harmful" if role in {"heldout", "safe"} else role
    rows = tuple(Example(f"{asks} {i}?", f"the {role} is {i} and {i * i % 7}") for i in range(n))
    return Corpus(role, rows, f"made-in-code:{role}", "CC0-1.0")


def _after(p: Tensor) -> Any:  # noqa: ANN401 - a dict of hooks, None, or in some releases not there yet
    return getattr(p, "_post_accumulate_grad_hooks", None)
