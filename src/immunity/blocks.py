"""Where things are in a transformer: its blocks, and inside a block its attention, its MLP, and its linear layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from torch import nn

from immunity.errors import ModelError
from immunity.losses import causal_lm

_MLPS: Final = ("mlp", "feed_forward", "feedforward", "ffn", "ff", "moe", "block_sparse_moe")
_PROJECTIONS: Final = ("o_proj", "c_proj", "out_proj", "dense", "wo")


def blocks(network: nn.Module) -> nn.ModuleList:
    """The blocks, first to last.

    Raises:
        ModelError: They cannot be found.
    """
    model = causal_lm(network)
    n = model.config.get_text_config().num_hidden_layers
    text = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    found = next((m for m in text.modules() if isinstance(m, nn.ModuleList) and len(m) == n), None)
    if found is None:
        raise ModelError(
            f"the {n} blocks of {type(model).__name__} cannot be found: hidden states can be read and replaced only "
            "where the blocks are one list of modules"
        )
    return found


def attention(block: nn.Module, layer: int) -> nn.Module:
    """The attention of a block, which is called ``layer`` in the error.

    Raises:
        ModelError: It cannot be told from the other parts.
    """
    return _child(block, layer, "attention", _attends)


def mlp(block: nn.Module, layer: int) -> nn.Module:
    """The MLP of a block, which is called ``layer`` in the error.

    Raises:
        ModelError: It cannot be told from the other parts.
    """
    return _child(block, layer, "mlp", lambda name, _: name in _MLPS)


def projection(attending: nn.Module) -> nn.Module:
    """What projects the outputs of an attention's heads."""
    found: nn.Module = next(module for name, module in attending.named_modules() if _projects(name))
    return found


def linear(network: nn.Module, name: str) -> tuple[nn.Module, nn.Module]:
    """The block that a linear layer lies in, and the layer.

    Args:
        network: A wrapper around the causal language model is looked through.
        name: Of the layer, in the causal language model. With an adapter on it, that of the layer and adapter together.

    Raises:
        ModelError: There is no such module, or it lies outside of the blocks.
    """
    parts, inside, at = name.split("."), set(blocks(network)), causal_lm(network)
    block: nn.Module | None = None
    for part in parts:
        at = dict(at.named_children()).get(part)
        if at is None:
            raise ModelError(f"there is no layer {name!r}: {part!r} is not found")
        block = at if at in inside else block
    if block is None:
        raise ModelError(f"the layer {name!r} lies in no block: only layers inside blocks can be read or replaced")
    return block, at


def _attends(name: str, module: nn.Module) -> bool:
    """Whether a child of a block is its attention; norms are called after it too ("post_attention_layernorm")."""
    return ("attn" in name or "attention" in name) and any(_projects(inside) for inside, _ in module.named_modules())


def _projects(name: str) -> bool:
    """Whether a module inside an attention, by its dotted name, projects the heads' outputs."""
    return name.rsplit(".", 1)[-1] in _PROJECTIONS


def _child(parent: nn.Module, layer: int, what: str, wanted: Callable[[str, nn.Module], bool]) -> nn.Module:
    found = [module for name, module in parent.named_children() if wanted(name.lower(), module)]
    if len(found) != 1:
        names = ", ".join(name for name, _ in parent.named_children()) or "nothing"
        raise ModelError(
            f"cannot tell which part of {type(parent).__name__} (block {layer}) is meant by {what!r}: it consists of "
            f'{names}. "input" and "output" of blocks are always there'
        )
    return found[0]
