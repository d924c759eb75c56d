"""Read or replace hidden states inside a ``with``: the only forward hooks of this library.

    with reading(network, sites(network, "output", [0.5])) as seen:
        nll(network, batch)
    (h,) = seen.values()  # [B, T, D], with its graph

Under gradient checkpointing a block is run again by the backward pass, often after the ``with`` is left. What replaced
its hidden states is then put back for the time of that second run, so that gradients are those of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Final, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from immunity.blocks import attention, blocks, linear, mlp, projection
from immunity.errors import ModelError, SettingsError
from immunity.losses import causal_lm

Where = Literal["input", "output", "attention", "mlp", "heads"]
Replace = Callable[[Tensor], Tensor]
"""Hidden states [B, T, D] -> what goes on in their place, of the same shape."""

_RERUN: Final = "_gradient_checkpointing_func"
"""What transformers calls instead of a block's forward when it checkpoints the block."""


class Site(NamedTuple):
    """A place in a network whose hidden states can be read or replaced.

    Attributes:
        layer: Number of the block, from 0.
        where: The residual stream before ("input") or after ("output") the block; what its "attention" or "mlp" adds
            to it; or "heads": the heads' outputs side by side, just before attention projects them.
    """

    layer: int
    where: Where


class Port(NamedTuple):
    """What enters or leaves a linear layer that lies in a block.

    Attributes:
        name: Of the layer, in the causal language model. With an adapter on it, the two together are meant.
        end: Its input [B, T, D_in] or its output [B, T, D_out].
    """

    name: str
    end: Literal["input", "output"]


P = TypeVar("P", Site, Port)


def n_layers(network: nn.Module) -> int:
    """Number of blocks.

    Raises:
        ModelError: They cannot be found.
    """
    return len(blocks(network))


def n_heads(network: nn.Module) -> int:
    """Attention heads of each block: "heads" is that many parts of equal width (queries' heads, however they share)."""
    return int(causal_lm(network).config.get_text_config().num_attention_heads)


def module_at(network: nn.Module, site: Site) -> nn.Module:
    """The module of a site: of "input" and "output" the whole block, of "heads" the projection that reads them.

    Raises:
        ModelError: The network has no such site.
    """
    return _place(network, site).module


def width(network: nn.Module, site: Site) -> int:
    """Size D of the hidden states at a site.

    Raises:
        ModelError: The network has no such site.
    """
    found = _place(network, site).module
    if site.where != "heads":
        return int(causal_lm(network).config.get_text_config().hidden_size)
    inner: Any = found
    sized = inner.get_base_layer() if hasattr(inner, "get_base_layer") else inner
    return int(sized.in_features if hasattr(sized, "in_features") else sized.weight.shape[0])  # GPT-2: [in, out]


def sites(network: nn.Module, where: Where, layers: Literal["all"] | Sequence[int | float] = "all") -> tuple[Site, ...]:
    """The sites of one kind, by number of their block.

    Args:
        network: Its blocks are counted.
        where: See :class:`Site`.
        layers: "all"; whole numbers count blocks (from 0; -1 is the last), other numbers are depths from 0.0, the
            first block, to 1.0, the last. Two that name the same block give one site.

    Raises:
        SettingsError: ``where`` is unknown, or a layer lies outside the network.
        ModelError: The blocks cannot be found.
    """
    if where not in get_args(Where):
        raise SettingsError(f"where = {where!r}: use one of {', '.join(get_args(Where))}")
    n = n_layers(network)
    if isinstance(layers, str):
        if layers != "all":
            raise SettingsError(f'layers = {layers!r}: say "all", or give numbers')
        return tuple(Site(layer, where) for layer in range(n))
    return tuple(Site(layer, where) for layer in sorted({_layer(at, n) for at in layers}))


@contextmanager
def reading(network: nn.Module, places: Sequence[P]) -> Iterator[dict[P, Tensor]]:
    """A dict that every forward pass inside the ``with`` fills anew: [B, T, D], with the graph; detach it yourself.

    Hooks act in the order in which their ``with`` was entered: a site that was replaced before is read as replaced.

    Raises:
        ModelError: The network has no such site.
    """
    seen: dict[P, Tensor] = {}

    def keep(site: P, h: Tensor) -> None:
        seen[site] = h

    with _tapped(network, {site: partial(keep, site) for site in places}, again=False):
        yield seen


@contextmanager
def replacing(network: nn.Module, by: Mapping[P, Replace]) -> Iterator[None]:
    """Hidden states h are replaced by f(h) in every forward pass inside the ``with``, a cached generation's too.

    The result is cast to h's dtype. Gradients may be taken after the ``with``. Under gradient checkpointing f is called
    again by the backward pass and must give the same: draw noise before, or from torch's global generator.

    Args:
        network: Left as found, also after an exception.
        by: Site -> f. Sites that an outer ``with`` replaces too are replaced by both, the outer one first.

    Raises:
        ModelError: The network has no such site, or f changes the shape.
    """
    with _tapped(network, {site: partial(_replaced, site, f) for site, f in by.items()}, again=True):
        yield


@contextmanager
def calls(network: nn.Module, layer: int) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """The arguments, by position and by name, of every call of a block inside the ``with``: enough to call it again."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))

    handle = blocks(network)[layer].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


class _Place(NamedTuple):
    """Where a hook goes: before or after a module, which lies in a block."""

    block: nn.Module
    module: nn.Module
    before: bool


_Act = Callable[[Tensor], "Tensor | None"]


@contextmanager
def _tapped(network: nn.Module, by: Mapping[P, _Act], *, again: bool) -> Iterator[None]:
    """Hooks on every site; with ``again`` they act in second runs of checkpointed blocks too."""
    places = {site: _place(network, site) for site in by}
    _check_checkpointing(network)
    with ExitStack() as stack:
        reruns: dict[nn.Module, list[tuple[_Place, _Act]]] = {}
        for site, place in places.items():
            stack.callback(_hook(place, by[site], second=False).remove)
            reruns.setdefault(place.block, []).append((place, by[site]))
        for block, taps in reruns.items():
            if block.__dict__.get("gradient_checkpointing"):
                found = block.__dict__[_RERUN]
                stack.callback(setattr, block, _RERUN, found)
                setattr(block, _RERUN, partial(_checkpointed, found, taps if again else []))
        yield


def _checkpointed(
    checkpoint: Callable[..., Any],
    taps: Sequence[tuple[_Place, _Act]],
    run: Callable[..., Any],
    *args: Any,  # noqa: ANN401 - what transformers hands to a block
    use_reentrant: bool = False,
) -> Any:  # noqa: ANN401
    """Checkpoint ``run``. Never the reentrant way, whatever was set: its first run has no graph to read."""
    return checkpoint(partial(_with_taps, taps, run), *args, use_reentrant=use_reentrant)


def _with_taps(taps: Sequence[tuple[_Place, _Act]], run: Callable[..., Any], *args: Any) -> Any:  # noqa: ANN401
    if not _running_back():
        return run(*args)
    with ExitStack() as stack:
        for place, act in taps:
            stack.callback(_hook(place, act, second=True).remove)
        return run(*args)


def _hook(place: _Place, act: _Act, *, second: bool) -> RemovableHandle:
    """A hook that acts in first runs only or in second runs only: both kinds may be there at once."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401, ARG001
        if _running_back() != second:
            return None
        new = act(args[0] if args else kwargs["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:  # noqa: ANN401, ARG001
        if _running_back() != second:
            return None
        new = act(output[0] if isinstance(output, tuple) else output)
        return (new, *output[1:]) if new is not None and isinstance(output, tuple) else new

    if place.before:
        return place.module.register_forward_pre_hook(before, with_kwargs=True)
    return place.module.register_forward_hook(after)


def _running_back() -> bool:
    """Whether a backward pass is running in this thread: a forward pass inside it is a second run."""
    return torch._C._current_graph_task_id() != -1


def _replaced(site: Site | Port, f: Replace, h: Tensor) -> Tensor:
    new = f(h)
    if new.shape != h.shape:
        where = f"{site.end} of {site.name}" if isinstance(site, Port) else f"{site.where} of block {site.layer}"
        raise ModelError(
            f"what replaces the {where} has the shape {tuple(new.shape)}, the hidden states there {tuple(h.shape)}: "
            "the shapes must be equal"
        )
    return new.to(h.dtype)


def _place(network: nn.Module, at: Site | Port) -> _Place:
    if isinstance(at, Port):
        block, module = linear(network, at.name)
        return _Place(block, module, at.end == "input")
    found = blocks(network)
    if not 0 <= at.layer < len(found):
        raise ModelError(f"there is no block {at.layer}: the network has {len(found)}, counted from 0")
    block = found[at.layer]
    if at.where in {"input", "output"}:
        return _Place(block, block, at.where == "input")
    if at.where == "mlp":
        return _Place(block, mlp(block, at.layer), False)
    module = attention(block, at.layer)
    return _Place(block, module, False) if at.where == "attention" else _Place(block, projection(module), True)


def _layer(at: int | float, n: int) -> int:
    if isinstance(at, int):
        if not -n <= at < n:
            raise SettingsError(f"layer {at}: the network has {n} blocks, 0 to {n - 1}")
        return at % n
    if not 0.0 <= at <= 1.0:
        raise SettingsError(f"layer {at}: a depth lies between 0.0, the first block, and 1.0, the last")
    return round(at * (n - 1))


def _check_checkpointing(network: nn.Module) -> None:
    """Refuse a checkpointing that is not done block by block: second runs would miss what was replaced."""
    modules = {m for m in network.modules() if m.__dict__.get("gradient_checkpointing")}
    if modules and not any(_RERUN in block.__dict__ for block in blocks(network)):
        raise ModelError(
            f"{type(causal_lm(network)).__name__} does not checkpoint its blocks one by one: turn gradient "
            "checkpointing off to read or replace its hidden states"
        )
