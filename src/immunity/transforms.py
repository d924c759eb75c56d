"""Loss -> loss: the same loss of a network whose hidden states are not quite what they were.

    theta.grad(drifted(nll, 2.0, sites(theta.network, "attention")), batch)  # Vaccine

A transform of this kind says, for a network and a batch, what is added to the hidden states of some sites, and
:func:`perturbed` makes a loss of it. The additions are made before the pass that they are for and are constants in it,
so that they are the same in a block's second run under gradient checkpointing, whether they were computed or drawn.

Shapes: B examples, T tokens, D hidden size, S sites.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Final, Literal, get_args

import torch
from torch import Tensor, nn

from immunity.batch import IGNORE, Batch, Padded
from immunity.errors import SettingsError
from immunity.hidden import Replace, Site, n_layers, replacing
from immunity.losses import Loss
from immunity.theta import Theta

Additions = Callable[[nn.Module, Batch], Mapping[Site, Tensor]]
"""(network, batch) -> what is added to the hidden states of each site: [B, T, D]."""
NormScope = Literal["global", "per_example", "per_layer"]
"""What one radius is for: all sites, examples and positions together, each example, or each site."""
Masks = Literal["same", "fresh"]
"""Whether two passes over one batch drop the same units."""
Positions = Literal["all", "prompt", "response", "predicting"]
"""Positions of a row: of the prompt, of the response, or those at which a token of the response is predicted, from the
last of the prompt to the last but one of the response. Pads are in none."""

EPS: Final = 1e-7
"""Added to a norm before dividing by it, as the released codes do."""


def perturbed(loss: Loss, additions: Additions, *, name: str, coupled: bool) -> Loss:
    """``loss`` where ``additions`` are added to hidden states; no gradient flows into them.

    Args:
        loss: What is computed in the perturbed pass.
        additions: Called once before each pass, with gradients off or on as the caller has them.
        name: Of the result, in the log.
        coupled: Whether an example's additions depend on the others of its batch.
    """

    def of(network: nn.Module, batch: Batch) -> Tensor:
        by = {site: partial(torch.add, added.detach()) for site, added in additions(network, batch).items()}
        with replacing(network, {**unchanged(network, by), **by}):
            return loss(network, batch)

    return Loss(name, of, coupled=coupled or loss.coupled)


def drifted(
    loss: Loss,
    rho: float,
    places: Sequence[Site],
    *,
    norm_scope: NormScope = "global",
    masks: Masks = "same",
) -> Loss:
    """``loss`` where hidden states drifted by ε = ρ ∇_e ℓ / ‖∇_e ℓ‖, the worst drift of that length to first order.

    A first pass finds ∇_e ℓ, the gradient of the loss with respect to the hidden states e of ``places`` and to nothing
    else; a second one computes the loss at e + ε, with ε a constant (arXiv 2402.01109, eq. 4 to 6). Positions that no
    response token looks at, padding among them, have no gradient and do not drift.

    Args:
        loss: Of which the worst case is taken. In the log the result is called "drifted-" and its name.
        rho: ρ, the length of the drift; at 0 the loss itself is given back.
        places: Where hidden states drift.
        norm_scope: "global": ρ is the length over all places, examples and positions of a batch, whose loss is its
            weighted mean; "per_layer": of each place by itself. Both couple the examples of a batch. "per_example": of
            each example, over all places; the loss stays uncoupled.
        masks: What dropout drops in the second pass. "same" as in the first, so that ε is for the network that it is
            added to, and torch's random numbers go on as if there had been one pass; or "fresh".

    Raises:
        SettingsError: ``rho`` is negative or not finite, there is no place, ``norm_scope`` or ``masks`` is unknown, or
            an example of a coupled loss was to have a drift of its own.
    """
    if not (math.isfinite(rho) and rho >= 0):
        raise SettingsError(f"rho = {rho}: the length of a drift is a number from 0")
    if norm_scope not in get_args(NormScope) or masks not in get_args(Masks):
        raise SettingsError(
            f"norm_scope = {norm_scope!r}, masks = {masks!r}: use one of {', '.join(get_args(NormScope))}, and one of "
            f"{', '.join(get_args(Masks))}"
        )
    if not places:
        raise SettingsError("nothing can drift: give at least one place")
    own = norm_scope == "per_example"
    if own and loss.coupled:
        raise SettingsError(f"the loss {loss.name!r} couples examples, so none has a drift of its own: use global")
    if rho == 0:
        return loss

    def additions(network: nn.Module, batch: Batch) -> Mapping[Site, Tensor]:
        with _drawn_again(network, masks):
            _, found = _felt(network, loss, batch, places, mean=not own)
        lengths = _lengths(found, norm_scope)
        return {site: (rho / (lengths[site] + EPS) * g).to(g.dtype) for site, g in found.items()}

    return perturbed(loss, additions, name=f"drifted-{loss.name}", coupled=not own)


def chosen(padded: Padded, positions: Positions) -> Tensor:
    """Which positions are meant: [B, T], true or false.

    Raises:
        SettingsError: There is no such kind of position.
    """
    if positions not in get_args(Positions):
        raise SettingsError(f"positions = {positions!r}: use one of {', '.join(get_args(Positions))}")
    there, asked = padded.attention_mask.bool(), padded.labels != IGNORE
    if positions == "predicting":
        return torch.cat([asked[:, 1:], torch.zeros_like(asked[:, :1])], dim=1)
    return {"all": there, "prompt": there & ~asked, "response": asked}[positions]


def edited(loss: Loss, by: Mapping[Site, Replace], positions: Positions = "all") -> Loss:
    """``loss`` where hidden states h of each site are f(h) at some positions; gradients flow into what f is made of.

    Args:
        loss: What is computed with them, on the batch itself. In the log the result is "edited-" and its name.
        by: Site -> f, as for :func:`immunity.hidden.replacing`.
        positions: Where f acts.
    """

    def of(network: nn.Module, batch: Batch) -> Tensor:
        here = chosen(batch.padded(next(network.parameters()).device), positions)[..., None]  # [B, T, 1]
        acts = {site: partial(_where, here, f) for site, f in by.items()}
        with replacing(network, {**unchanged(network, acts), **acts}):
            return loss(network, batch)

    return Loss(f"edited-{loss.name}", of, loss.coupled)


def site_norms(theta: Theta, loss: Loss, batch: Batch, places: Sequence[Site]) -> dict[Site, float]:
    """‖∂L/∂e‖ at each place, L the weighted mean of ``loss`` over ``batch``, at ``theta``; logged as ``theta.value``.

    The hidden states of one example are moved by its own loss only, so micro-batches change nothing.

    Raises:
        SettingsError: The loss couples examples.
        DivergedError: The loss is NaN or infinite.
    """
    if loss.coupled:
        raise SettingsError(f"the loss {loss.name!r} couples examples: its norms cannot be added up over them")
    squares = dict.fromkeys(places, 0.0)
    total = sum(batch.weights)

    def of(network: nn.Module, micro: Batch) -> Tensor:
        values, found = _felt(network, loss, micro, places, mean=False)
        shares = torch.tensor(micro.weights, dtype=torch.float64) / total
        for site, norms in _row_norms(found).items():
            squares[site] += float((shares * norms.double().cpu()).square().sum())
        return values

    theta.value(Loss(loss.name, of), batch)
    return {site: math.sqrt(square) for site, square in squares.items()}


def check_places(network: nn.Module, places: Sequence[Site]) -> None:
    """Look whether hidden states can be changed there, without computing anything.

    Raises:
        ModelError: The network has no such place, or does not checkpoint its blocks one by one.
    """
    with replacing(network, dict.fromkeys(places, _same)):
        pass


def _felt(
    network: nn.Module, loss: Loss, batch: Batch, places: Sequence[Site], *, mean: bool
) -> tuple[Tensor, dict[Site, Tensor]]:
    """Values [B] and, for each place, their gradient [B, T, D]: of the weighted mean, or of each example's own value.

    It is taken with respect to a 0 that is added to each hidden state, so that nothing else needs a gradient for it:
    neither the weights, nor the blocks below the lowest place.
    """
    zeros: dict[Site, Tensor] = {}

    def opened(site: Site, h: Tensor) -> Tensor:
        if site not in zeros:  # one, however often the loss runs the network
            zeros[site] = h.new_zeros(()).expand_as(h).requires_grad_()
        return h + zeros[site]

    by = {site: partial(opened, site) for site in places}
    with torch.enable_grad(), replacing(network, {**unchanged(network, by), **by}):
        values = loss(network, batch)
        weights = torch.tensor(batch.weights, dtype=values.dtype, device=values.device)
        total = (values * (weights / weights.sum())).sum() if mean else values.sum()
        found = torch.autograd.grad(total, [zeros[site] for site in places], materialize_grads=True)
    return values.detach(), dict(zip(places, found, strict=True))


def _row_norms(found: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
    """The norm of each example's part, over positions and hidden size: [B], in float32 at least."""
    return {
        site: torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=torch.promote_types(g.dtype, torch.float32))
        for site, g in found.items()
    }


def _lengths(found: Mapping[Site, Tensor], scope: NormScope) -> dict[Site, Tensor]:
    """What each place's gradient is divided by: a scalar, or one for each example, [B, 1, 1]."""
    rows = _row_norms(found)
    if scope == "per_layer":
        return {site: torch.linalg.vector_norm(norms) for site, norms in rows.items()}
    every = torch.stack(list(rows.values()))  # [S, B]
    one = torch.linalg.vector_norm(every, dim=0)[:, None, None] if scope == "per_example" else every.norm()
    return dict.fromkeys(found, one)


def unchanged(network: nn.Module, by: Mapping[Site, object]) -> dict[Site, Callable[[Tensor], Tensor]]:
    """A site of every block that has none in ``by``, left as it is.

    Under reentrant gradient checkpointing no gradient can be taken with respect to hidden states; ``replacing``
    checkpoints the blocks that it acts on in the other way.
    """
    touched = {site.layer for site in by}
    return {Site(layer, "output"): _same for layer in range(n_layers(network)) if layer not in touched}


def _where(here: Tensor, f: Replace, h: Tensor) -> Tensor:
    return torch.where(here, f(h).to(h.dtype), h)


def _same(h: Tensor) -> Tensor:
    return h


@contextmanager
def _drawn_again(network: nn.Module, masks: Masks) -> Iterator[None]:
    """With "same", what is drawn inside the ``with`` is drawn again after it."""
    device = next(network.parameters()).device
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices, enabled=masks == "same"):
        yield
