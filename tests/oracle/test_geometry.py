"""Cosines, norms, curvatures and losses of a probe against autograd and explicit loops on a float64 model."""

from __future__ import annotations

import math

import pytest
import torch

import slow
from immunity.batch import Batch
from immunity.data.streams import TokenSet
from immunity.measure.geometry import RAYS, Probe, probed
from immunity.testing import tiny

ROLES = ("harmful", "benign", "general")
HOW = Probe(distances=(0.05, 0.3), draws=2, rows=4, measured=5, path_steps=3, path_step=0.07)


def rows(seed: int) -> dict[str, Batch]:
    return {role: tiny.batch(4, seed=seed + i, role=role) for i, role in enumerate(ROLES)}


def sets(of: dict[str, Batch]) -> dict[str, TokenSet]:
    return {role: TokenSet(batch.rows, role, role) for role, batch in of.items()}


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    return tiny.gpt2()


@pytest.fixture(scope="module")
def found(network: torch.nn.Module) -> dict[str, object]:
    return probed(tiny.language_model(network), sets(rows(1)), sets(rows(11)), HOW, word="error")


def gradients(network: torch.nn.Module) -> dict[str, slow.Weights]:
    """A batch of as many rows as there are is all of them, in every draw."""
    at = slow.weights(network)
    return {role: slow.gradient(slow.mean_loss(network, at, batch), at) for role, batch in rows(1).items()}


def dot(a: slow.Weights, b: slow.Weights) -> float:
    return float(sum((a[name] * b[name]).sum() for name in a))


def test_norms_and_cosines(network, found):
    of = gradients(network)
    for draw in found["draws"]:
        for role in ROLES:
            assert draw["norms"][role] == pytest.approx(float(slow.norm(of[role])), rel=1e-10)
        for pair, cosine in draw["cosines"].items():
            a, b = pair.split()
            assert cosine == pytest.approx(dot(of[a], of[b]) / float(slow.norm(of[a]) * slow.norm(of[b])), abs=1e-10)
        assert set(draw["cosines"]) == {"harmful benign", "harmful general", "benign general"}


def test_curvature_is_that_of_double_backward(network, found):
    for role in ("harmful", "benign"):
        at = slow.weights(network)
        g = slow.gradient(slow.mean_loss(network, at, rows(1)[role]), at, graph=True)
        u = {name: (tensor / slow.norm(g)).detach() for name, tensor in g.items()}
        hu = slow.gradient(sum((g[name] * u[name]).sum() for name in g), at)
        exact = dot(u, hu)
        assert abs(exact) > 1.0, "a curvature that could not be told from nothing would test nothing"
        for draw in found["draws"]:
            assert draw["curvature"][role] == pytest.approx(exact, rel=1e-6)


def at_distance(network: torch.nn.Module, direction: slow.Weights, distance: float) -> dict[str, float]:
    at = slow.weights(network)
    moved = {name: at[name] + distance * direction[name] for name in at}
    held = rows(11)
    losses = {role: slow.mean_loss(network, moved, held[role]).item() for role in ROLES}
    return losses | {"collapse": slow.mean_loss(network, moved, held["general"], word=tiny.ERROR_ID).item()}


@pytest.mark.parametrize("name", RAYS)
def test_losses_along_a_ray(network, found, name):
    role, rule = RAYS[name]
    g = gradients(network)[role]
    step = g if rule == "normalised" else {k: t / (t.abs() + 1e-8) for k, t in g.items()}  # Adam's first step
    u = {k: -t / slow.norm(step) for k, t in step.items()}
    curve = next(one for one in found["curves"] if one["direction"] == name)
    assert [point["distance"] for point in curve["points"]] == [0.0, 0.05, 0.3]
    for point in curve["points"]:
        for loss, value in at_distance(network, u, point["distance"]).items():
            assert point[loss] == pytest.approx(value, rel=1e-6), (loss, point["distance"])


def test_losses_along_a_path(network, found):
    curve = next(one for one in found["curves"] if one["direction"] == "harmful-path")
    batch = rows(1)["harmful"]  # the same rows in every step, in some order
    at = start = slow.weights(network)
    for k, point in enumerate(curve["points"]):
        shift = slow.combine((1.0, at), (-1.0, start))
        assert point["distance"] == pytest.approx(0.07 * k)
        assert point["away"] == pytest.approx(slow.norm(shift).item(), rel=1e-6)  # a step is g / (‖g‖ + 1e-7)
        value = slow.mean_loss(network, at, rows(11)["general"], word=tiny.ERROR_ID).item()
        assert point["collapse"] == pytest.approx(value, rel=1e-6)
        g = slow.gradient(slow.mean_loss(network, at, batch), at)
        at = {n: (at[n] - 0.07 * g[n] / slow.norm(g)).detach().requires_grad_() for n in at}


def test_chance_is_the_loss_of_a_model_that_knows_nothing(found):
    assert found["chance"] == pytest.approx(math.log(tiny.SMALL_VOCAB))
