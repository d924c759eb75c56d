"""Looking around a model: nothing about it changes, and the same look gives the same numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from immunity.attacks.attack import Opening
from immunity.bench import standins, store
from immunity.bench.geometry import PROBES, Geometry, around, beside, told
from immunity.bench.tiers import TIERS
from immunity.data.streams import TokenSet
from immunity.errors import DataError, DivergedError, ModelError, ResumeError, SettingsError
from immunity.losses import collapse, nll
from immunity.measure import geometry
from immunity.measure.geometry import LOSSES, RANDOM, RAYS, Probe, probed
from immunity.metrics.geometry import along, summary
from immunity.testing import tiny
from immunity.theta import Theta

HOW = Probe(distances=(0.1, 1.0), draws=2, rows=3, measured=4, path_steps=2)


def sets(seed: int, n: int = 6) -> dict[str, TokenSet]:
    roles = ("harmful", "benign", "general")
    return {role: TokenSet(tiny.batch(n, seed=seed + i).rows, role, role) for i, role in enumerate(roles)}


def look(model: Any = None, how: Probe = HOW, **more: Any) -> dict[str, Any]:
    given = {"data": sets(1), "held_out": sets(11), **more}
    data, held_out = given.pop("data"), given.pop("held_out")
    return probed(model or tiny.language_model(), data, held_out, how, word="error", **given)


def by_name(found: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    curves: dict[str, list[dict[str, Any]]] = {}
    for curve in found["curves"]:
        curves.setdefault(curve["direction"], []).append(curve)
    return curves


def test_nothing_about_the_model_changes_not_even_when_it_is_interrupted():
    model = tiny.language_model()
    before = {name: p.detach().clone() for name, p in model.network.named_parameters()}
    next(iter(model.network.parameters())).grad = torch.ones_like(next(iter(model.network.parameters())))
    model.network.train()
    noise = torch.get_rng_state()
    first = look(model)
    seen: list[object] = []

    def stop(losses: Mapping[str, float]) -> None:
        seen.append(losses)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        look(model, tell=stop)
    assert all(torch.equal(before[name], p) for name, p in model.network.named_parameters())
    assert torch.equal(next(iter(model.network.parameters())).grad, torch.ones_like(next(iter(before.values()))))
    assert model.network.training
    assert torch.equal(noise, torch.get_rng_state())
    assert look(model) == first


def test_distance_0_is_the_model_itself():
    model, held = tiny.language_model(), sets(11)
    theta = Theta(model.network)
    expected = {role: theta.value(nll, tiny.batch(6, seed=11 + i)) for i, role in enumerate(held)}
    expected["collapse"] = theta.value(collapse(tiny.ERROR_ID), tiny.batch(6, seed=13))
    for curve in look(model)["curves"]:
        here = next(point for point in curve["points"] if point["distance"] == 0.0)
        assert {name: here[name] for name in LOSSES} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("benign", [True, False])
@pytest.mark.parametrize("how", [HOW, replace(HOW, both_signs=True), replace(HOW, path_steps=0, draws=1)], ids=str)
def test_it_tells_as_many_points_as_it_said(how, benign):
    seen: list[Mapping[str, float]] = []
    data = {role: tokens for role, tokens in sets(1).items() if benign or role != "benign"}
    found = look(how=how, data=data, tell=seen.append)
    assert len(seen) == how.looks(benign=benign)
    assert set(seen[0]) == {f"{name}/held-out" for name in LOSSES}
    names = {*RAYS, RANDOM, *(geometry.PATHS if how.path_steps else ())}
    assert set(by_name(found)) == {name for name in names if benign or not name.startswith("benign")}
    assert all(len(curves) == how.draws for curves in by_name(found).values())


def test_both_signs_go_both_ways():
    found = look(how=replace(HOW, both_signs=True, path_steps=0))
    for curve in found["curves"]:
        assert [point["distance"] for point in curve["points"]] == [-1.0, -0.1, 0.0, 0.1, 1.0]
        assert [at for at, _ in along(curve, "collapse")] == [0.0, 0.1, 1.0], "the numbers are of the way ahead"
    ahead = look(how=replace(HOW, path_steps=0))
    for both, one in zip(found["curves"], ahead["curves"], strict=True):
        assert both["points"][2:] == one["points"]


def test_descent_descends_and_the_other_way_ascends():
    model, data = tiny.language_model(), sets(1)
    how = replace(HOW, both_signs=True, distances=(0.01,), rows=6, path_steps=0)
    for curve in look(model, how, data=data, held_out=data)["curves"]:
        role = RAYS[curve["direction"]][0] if curve["direction"] in RAYS else None
        up, _, down = (point[role] if role else 0.0 for point in curve["points"])
        assert role is None or down < curve["points"][1][role] < up


def test_random_directions_are_as_long_as_the_others_and_differ_by_draw_and_seed():
    model = tiny.language_model()

    def noise(seed: int, draw: int) -> list[torch.Tensor]:
        how = replace(HOW, seed=seed)
        one = geometry._Around(model, Theta(model.network), sets(1), sets(11), how, "error", lambda _: None)
        direction = one.noise(draw)
        assert direction.norm() == pytest.approx(1.0, rel=1e-5)
        return direction.tensors()

    first = noise(0, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, noise(0, 0), strict=True))
    for other in (noise(0, 1), noise(1, 0)):
        assert not torch.equal(first[0], other[0])


def test_where_a_loss_is_not_finite_the_curve_ends(monkeypatch):
    model = tiny.language_model()
    weight = next(iter(model.network.parameters()))
    home, real = weight.detach().clone(), geometry.collapse_set

    def far(*args: Any, **more: Any) -> Any:
        if float((weight.detach() - home).abs().max()) > 1e-2:
            raise DivergedError("too far")
        return real(*args, **more)

    monkeypatch.setattr(geometry, "collapse_set", far)
    for curve in look(model, replace(HOW, distances=(1e-3, 100.0), path_step=100.0))["curves"]:
        last = curve["points"][-1]
        assert (last["collapse"], last["general"]) == (None, None)
        assert last["harmful"] is not None
        assert len(along(curve, "collapse")) == (1 if "path" in curve["direction"] else 2)


def test_a_path_ends_where_there_is_no_gradient(monkeypatch):
    asked = []
    real = Theta.grad

    def grad(self: Theta, loss: Any, batch: Any) -> Any:
        asked.append(batch)
        if len(asked) in {9, 10}:  # three roles, two curvatures of two each; then the paths
            raise DivergedError("nll/harmful@1 is nan")
        return real(self, loss, batch)

    monkeypatch.setattr(Theta, "grad", grad)
    found = look(how=replace(HOW, draws=1))
    assert [len(by_name(found)[name][0]["points"]) for name in geometry.PATHS] == [2, 1]
    assert summary(found)["directions"]


def test_a_model_that_is_broken_already_is_refused():
    model = tiny.language_model()
    with torch.no_grad():
        next(iter(model.network.parameters())).fill_(float("nan"))
    with pytest.raises(DivergedError, match="before it is moved"):
        look(model)


def test_what_it_cannot_do_without_it_asks_for():
    with pytest.raises(DataError, match="harmful"):
        look(data={"benign": sets(1)["benign"]})
    with pytest.raises(DataError, match="general"):
        look(held_out={"harmful": sets(1)["harmful"]})
    with pytest.raises(ModelError, match="no ordinary token"):
        probed(tiny.language_model(), sets(1), sets(11), HOW, word="<|pad|>")
    with pytest.raises(SettingsError, match="word"):
        probed(tiny.language_model(), sets(1), sets(11), HOW, word="")


@pytest.mark.parametrize(
    "settings",
    [{"distances": ()}, {"distances": (0.0, 1.0)}, {"distances": (2.0, 1.0)}, {"distances": (1.0, float("inf"))},
     {"draws": 0}, {"rows": 0}, {"measured": 0}, {"seed": -1}, {"path_steps": -1}, {"path_step": 0.0},
     {"path_rule": "plain"}],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(SettingsError):
        Probe(**settings)


def test_micro_batches_change_no_number():
    whole, parted = look(), look(how=replace(HOW, micro_batch=1))
    for a, b in zip(whole["draws"], parted["draws"], strict=True):
        for kind in ("norms", "cosines", "losses"):
            assert a[kind] == pytest.approx(b[kind], rel=1e-4, abs=1e-5)


# As a job


def jobs(folder: Path, how: Probe = HOW, models: tuple[str, ...] = ("tiny",)) -> list[Geometry]:
    suite = standins.suite("umbra", n=8)
    opening = Opening(source="", device="cpu", max_length=64)
    return around(models, opening, standins.attacker("umbra"), suite, probe=how, folder=folder)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("geometry")
    (job,) = jobs(folder)
    return folder, job(lambda *_: None)


def test_a_job_keeps_what_it_found(done, monkeypatch):
    folder, record = done
    (job,) = jobs(folder)
    assert job.kept() == record
    monkeypatch.setattr(Geometry, "work", lambda *_: pytest.fail("it is done already"))
    assert job(lambda *_: None) == record
    assert [row["role"] for row in record["data"]] == [
        "harmful", "general", "benign", "measured on harmful", "measured on general", "measured on benign",
    ]  # fmt: skip
    assert [row["examples"] for row in record["data"]][3:] == [4, 4, 4]
    for other in (replace(HOW, seed=1), replace(HOW, distances=(0.2,))):
        with pytest.raises(ResumeError, match="other settings"):
            jobs(folder, other)[0].kept()
    assert jobs(folder, replace(HOW, micro_batch=2))[0].kept() == record, "that changes a cost, and no number"


def test_its_steps_are_what_it_tells(tmp_path):
    told_: list[tuple[int, dict[str, float]]] = []
    (job,) = jobs(tmp_path, replace(HOW, draws=1, path_steps=1))
    job(lambda at, trace: told_.append((at, dict(trace))))
    assert [at for at, _ in told_] == list(range(job.steps + 1))
    assert all(trace for at, trace in told_ if at)


def test_both_models_are_compared_at_one_distance(done):
    _, record = done
    found = told({"model": record, "baseline": {**record, "name": "other"}})
    assert [(row["role"], row["name"]) for row in found["models"]] == [("model", "tiny"), ("baseline", "other")]
    assert len({row["summary"]["at"] for row in found["models"]}) == 1
    assert store.plain(found) == found


def test_a_model_that_failed_is_left_out(done):
    _, record = done
    both = jobs(Path("nowhere"), models=("tiny", "other"))
    assert [job.folder.name for job in both] == ["model", "baseline"]
    assert beside(both, {}) == {}
    assert [row["role"] for row in beside(both, {both[0].title: record})["models"]] == ["model"]
    whole = beside(both, {both[0].title: record, both[1].title: {**record, "name": "other"}})
    assert [row["name"] for row in whole["models"]] == ["tiny", "other"]


def test_what_is_around_the_baseline_can_be_shared_between_audits(done):
    _, record = done
    suite, data, shelf = standins.suite("umbra", n=8), standins.attacker("umbra"), Path("shelf")

    def audit(folder: str, how: Probe = HOW) -> list[Geometry]:
        opening = Opening(source="", device="cpu", max_length=64)
        return around(("tiny", "tiny"), opening, data, suite, probe=how, folder=Path(folder), shelf=shelf)

    one, two, other = audit("one"), audit("two"), audit("three", replace(HOW, seed=1))
    assert one[0].folder == Path("one", "model") and two[0].folder == Path("two", "model"), "each has its own model"
    assert one[1].folder == two[1].folder != other[1].folder and one[1].folder.parent == shelf
    found = beside(one, {one[0].title: record, one[1].title: record})
    assert [row["role"] for row in found["models"]] == ["model", "baseline"]


def test_every_tier_of_an_audit_has_a_probe():
    assert set(PROBES) == set(TIERS)
    assert (
        PROBES["smoke"].looks(benign=True) < PROBES["standard"].looks(benign=True) < PROBES["full"].looks(benign=True)
    )
