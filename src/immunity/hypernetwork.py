"""A learnt attacker: a network that writes patches for linear layers from what they see of a prompt.

    attacker = hypernetwork(network, rank=8, width=64, rho=0.1)
    with patched(network, attacker.patches(network, batch)):
        nll(network, batch)  # under the weights W + V U, for each example its own

It maps the inputs X of a linear layer, over the tokens of a prompt, to U [r, D_in] and V [D_out, r]. Nothing of the
answers is looked at.

Shapes: B examples, P prompt tokens, r rank, W width of the hypernetwork, D_in and D_out of a linear layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final, Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from immunity.batch import IGNORE, Batch, Padded, Tokens, pad
from immunity.errors import SettingsError
from immunity.hidden import Port, reading
from immunity.losses import Loss, causal_lm
from immunity.patches import Patch, Size, Targets, patched, sizes
from immunity.preference import log_prob_per_token

Per = Literal["example", "batch"]
"""Whether every example has a patch of its own, or a batch has one together."""
HEAD: Final = 64
"""Width of an attention head of the hypernetwork."""
BODY: Final = 2
"""Residual feed-forward layers of the hypernetwork, after pooling."""


def prompts(batch: Batch, device: torch.device | str = "cpu") -> Padded:
    """The tokens of every row up to the first that is to be predicted: no answer in them."""
    rows = [row.ids[: _context(row)] for row in batch.rows]
    return pad(rows, [(IGNORE,) * len(row) for row in rows], device)


@final
class Hypernetwork(nn.Module):
    """Inputs of linear layers -> patches: projection, attention over tokens, mean, feed-forward, one head per shape.

    V starts at 0: at first nothing is patched. Entries of V are in units in which a V of ones is about at the cap.
    Everything is computed in the hypernetwork's own precision, never in that of autocast.

    Args:
        layers: Which there are; each has an embedding, each shape among them a head for U and one for V.
        rank: r.
        width: W. A number of parameters goes with W², another with W r (D_in + D_out) for each shape.
        rho: The cap: ‖V U‖ ≤ rho ‖W‖ in the Frobenius norm, W being the weight as it was when it was measured.
        per: A patch for each "example", or one for a "batch", from the mean over its examples.
    """

    def __init__(self, layers: Mapping[str, Size], *, rank: int, width: int, rho: float, per: Per = "example") -> None:
        super().__init__()
        self.layers, self.rank, self.rho, self.per = dict(layers), rank, rho, per
        self.heads = max(1, width // HEAD)
        self.enter = nn.ModuleDict({str(n): nn.Linear(n, width) for n in {s.n_in: 0 for s in self.layers.values()}})
        self.place = nn.Embedding(len(self.layers), width)
        self.attend, self.attended = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.body = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(BODY)
        )
        shapes = {size.shape: size for size in self.layers.values()}
        self.u = nn.ModuleDict({name: nn.Linear(width, rank * size.n_in) for name, size in shapes.items()})
        self.v = nn.ModuleDict({name: nn.Linear(width, rank * size.n_out) for name, size in shapes.items()})
        for last, std in [(head, width**-0.5) for head in self.u.values()] + [(head, 0.0) for head in self.v.values()]:
            nn.init.normal_(last.get_parameter("weight"), std=std)
            nn.init.zeros_(last.get_parameter("bias"))

    def patches(self, network: nn.Module, batch: Batch, *, through: bool = False) -> dict[str, Patch]:
        """The patches for the prompts of a batch, from what the layers see of them in the network as it is.

        Args:
            network: Unpatched; one pass over its blocks is made, on prompts alone.
            batch: Its answers are not looked at.
            through: Whether gradients flow through what the layers see, to the network's weights.
        """
        padded = prompts(batch, next(network.parameters()).device)
        ports = {name: Port(name, "input") for name in self.layers}
        with torch.set_grad_enabled(through and torch.is_grad_enabled()), reading(network, [*ports.values()]) as seen:
            causal_lm(network).base_model(
                input_ids=padded.input_ids, attention_mask=padded.attention_mask, use_cache=False
            )
        return self.forward({name: seen[port] for name, port in ports.items()}, padded.attention_mask)

    def forward(self, inputs: Mapping[str, Tensor], mask: Tensor) -> dict[str, Patch]:
        """Patches from inputs, name of a layer -> [B, P, D_in], and a mask [B, P] that is 0 at pads."""
        with torch.autocast(mask.device.type, enabled=False):
            return {
                name: self._patch(place, size, inputs[name].to(self.place.weight.dtype), mask.bool())
                for place, (name, size) in enumerate(self.layers.items())
            }

    def _patch(self, place: int, size: Size, x: Tensor, mask: Tensor) -> Patch:
        h = _normed(self.enter[str(size.n_in)](x)) + self.place.weight[place]  # [B, P, W]
        h = h + self._attention(_normed(h), mask)
        mean = h.masked_fill(~mask[..., None], 0.0).sum(1) / mask.sum(1, keepdim=True)  # [B, W]
        mean = mean if self.per == "example" else mean.mean(0, keepdim=True)
        for layer in self.body:
            mean = mean + layer(mean)
        z = _normed(mean)
        u = self.u[size.shape](z).view(-1, self.rank, size.n_in) * size.n_in**-0.5
        cap = self.rho * size.norm
        v = self.v[size.shape](z).view(-1, size.n_out, self.rank) * (cap * (size.n_out * self.rank) ** -0.5)
        square = ((v.mT @ v) * (u @ u.mT)).sum((1, 2))  # ‖V U‖², [B]
        return Patch(u, v * (cap * square.clamp(min=max(cap**2, 1e-30)).rsqrt())[:, None, None])

    def _attention(self, h: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.attend(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, P, W/heads]
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        mixed: Tensor = self.attended(out.transpose(1, 2).flatten(2))
        return mixed

    @contextmanager
    def learning(self) -> Iterator[dict[str, nn.Parameter]]:
        """Inside the ``with`` it takes gradients, outside it is a constant; gives its parameters by name."""
        self.requires_grad_(True)
        try:
            yield dict(self.named_parameters())
        finally:
            self.requires_grad_(False)


def hypernetwork(
    network: nn.Module,
    *,
    rank: int,
    width: int,
    rho: float,
    targets: Targets = "attention",
    per: Per = "example",
    seed: int = 0,
) -> Hypernetwork:
    """A hypernetwork for a network, beside it and on its device, fp32 at least, frozen.

    The cap is measured against the network's weights as they are now, without adapters.

    Raises:
        SettingsError: ``width`` or ``rank`` does not suit.
        ModelError: See :func:`sizes`.
    """
    if rank < 1 or width < 1 or width % max(1, width // HEAD):
        raise SettingsError(f"rank = {rank}, width = {width}: at least 1, and a width above {HEAD} in multiples of it")
    found = sizes(network, targets)
    like = next(network.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = Hypernetwork(found, rank=rank, width=width, rho=rho, per=per)
    return made.to(like.device, torch.promote_types(like.dtype, torch.float32)).requires_grad_(False)


def preferred_under(
    attacker: Hypernetwork, chosen: Batch, rejected: Batch, *, name: str, through: bool = False
) -> Loss:
    """−log σ(π(chosen) − π(rejected)) of the patched network, π the log-probability of an answer per token: [B].

    A loss over the rows of ``chosen``; each brings its partner, and both go through the network in one pass, under the
    patch that the attacker makes of the prompt of the chosen one. (Both answer the same prompt.)

    Args:
        attacker: Writes the patches.
        chosen: The answers to make more likely. Rows are told apart as objects: none may be there twice.
        rejected: The answers to make less likely, row for row in step.
        name: Of the loss.
        through: See :meth:`Hypernetwork.patches`.

    Raises:
        SettingsError: The batches are not in step.
    """
    if len(chosen) != len(rejected):
        raise SettingsError(f"{len(chosen)} rows of {chosen.role!r} and {len(rejected)} of {rejected.role!r} pair not")
    partner = {id(row): other for row, other in zip(chosen.rows, rejected.rows, strict=True)}

    def of(network: nn.Module, part: Batch) -> Tensor:
        patches = attacker.patches(network, part, through=through)
        both = Batch((*part.rows, *(partner[id(row)] for row in part.rows)))
        with patched(network, {layer: patch.twice() for layer, patch in patches.items()}):
            liked, other = log_prob_per_token(network, both).chunk(2)
        return functional.softplus(other - liked)

    return Loss(name, of, coupled=attacker.per == "batch")


def apart(batch: Batch) -> Batch:
    """The same rows as objects of their own, so that a row which is there twice has a partner for each."""
    return Batch(tuple(Tokens(*row) for row in batch.rows), batch.role, batch.weights)


def _normed(h: Tensor) -> Tensor:
    return functional.layer_norm(h, h.shape[-1:])


def _context(row: Tokens) -> int:
    """How many tokens stand before the first that is predicted; the first of all never is."""
    return next(t for t, label in enumerate(row.labels) if t and label != IGNORE)
