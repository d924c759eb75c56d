"""Lens: the loss of a language model that is read off too early, at every depth, through its last norm and its head."""

from __future__ import annotations

from typing import Final

from torch import Tensor, nn
from torch.nn import functional

from immunity.batch import IGNORE, Batch
from immunity.drift import depths
from immunity.errors import ModelError
from immunity.losses import Loss, causal_lm, chunked, row_means
from immunity.networks import decoder_blocks, norm_layers


def final_norm(network: nn.Module) -> nn.Module:
    """The norm between the last block and the head.

    Raises:
        ModelError: Outside of the blocks there is none.
    """
    backbone = causal_lm(network).base_model
    inside = decoder_blocks(backbone)
    outside = [
        module
        for name, module in norm_layers(backbone).items()
        if not any(name == block or name.startswith(f"{block}.") for block in inside)
    ]
    if not outside:
        raise ModelError(f"{type(backbone).__name__} has no norm between its last block and its head")
    return outside[-1]


def _cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(scores, targets, reduction="none")


def _every_depth(network: nn.Module, batch: Batch) -> Tensor:
    padded = batch.padded(next(network.parameters()).device)
    found = depths(network, padded)  # the last one is normed already
    keep = padded.labels[:, 1:] != IGNORE
    targets = padded.labels[:, 1:][keep]
    norm, head = final_norm(network), causal_lm(network).get_output_embeddings()
    own = next(norm.parameters()).dtype

    def read(states: Tensor) -> Tensor:
        return chunked(network, states.to(head.weight.dtype), targets, _cross_entropy)

    states = [h[:, :-1][keep] for h in found]
    early = [read(norm(h.to(own))) for h in states]
    values: Tensor = sum(early, start=read(states[-1]))
    return row_means(values / len(early), keep)


every_depth: Final = Loss("nll-at-every-depth", _every_depth)
"""(ℓ + Σ_j ℓ_j)/(L + 1), averaged over the response positions of each row: [B].

ℓ_j is the cross-entropy of head(norm(h_j)), for the L + 1 hidden states that transformers gives, what enters the first
block among them; ℓ that of the model's own logits. The last state has been through the norm and goes through it again:
L + 2 terms over L + 1, as in the released code of SEAM (arXiv 2505.12186).
"""
