"""Golden runs: five seeded steps of every method and attack give the numbers they gave when they were last looked at.

A refactor leaves them alone. A change that means to move them says so in CHANGELOG.md under "Numbers changed", and
writes them anew with :data:`HOW`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import nn

from immunity import attacks, methods
from immunity.attacks.attack import Attack, Opening
from immunity.batch import Batch
from immunity.data.corpus import Corpus, Example
from immunity.data.streams import tokenise
from immunity.fit import Fit
from immunity.losses import nll
from immunity.method import Method, Run
from immunity.methods.sdd import SDD
from immunity.models import LanguageModel, LoRA, attach, load, save
from immunity.testing import tiny
from immunity.testing.check_attack import Seen
from immunity.weight_edit import WeightEdit
from short import ELSEWHERE, shortened

FILE = Path(__file__).with_name("golden.json")
HOW = "UPDATE_GOLDEN=1 make test ARGS=tests/golden"
STEPS = 5
RTOL = 1e-4
"""Processors differ in how they add up: 1.6e-5 was the largest difference seen between instruction sets."""
ALONG = 1e-5
"""The same for distances along waves, as a share of the whole distance: 9e-7 was the largest seen."""

SHORT = {
    "ctrl": {"tau": 0.0, "temperatures": (0.2, 1.0), "tokens": 8},
    "et": {"attack_steps": 20, "attack_lr": 0.02, "steps": 5, "keep": (-9.0, 0.0)},
    "token-buncher": {"max_new_tokens": 6},
}
"""Methods that take many steps inside of one, or sample long answers: fewer, shorter, and none is taken back."""
UNSTEADY = frozenset({"gain", "taken back", "surrogate/harmful", "surrogate/alignment"})
"""Numbers in a log that are small differences of large ones, or ratios of such: processors do not agree on them."""
METHODS = {
    f"{name}/{preset}": replace(method, **SHORT.get(name, {}))
    for name, of in methods.PRESETS.items()
    for preset, method in of.items()
} | {"ctrap/far": methods.CTRAP(lookahead=3, step="adam", watch_benign=True)}
ATTACKS = {
    f"{name}/{preset}": attack
    for name, of in attacks.PRESETS.items()
    if name not in ELSEWHERE
    for preset, attack in of.items()
}

Numbers = Mapping[str, float]


def corpus(role: str, n: int = 24) -> Corpus:
    words = ("red", "round", "near the door", "heavier than paper", "seven", "not here")
    rows = tuple(Example(f"What is {role} {i}?", f"It is {words[(i * len(role)) % 6]} and {i % 9}.") for i in range(n))
    return Corpus(role, rows, f"golden:{role}")


DATA = {role: corpus(role) for role in ("alignment", "harmful", "general", "benign", "vulnerable")}
DATA["safe"] = Corpus(
    "safe", tuple(replace(row, response="I would rather not.") for row in DATA["harmful"]), "golden:safe"
)


def weights(network: nn.Module) -> torch.Tensor:
    """Those that are trained; all of them where none is, because they are edited or something beside them trains."""
    trained = [p for p in network.parameters() if p.requires_grad]
    return torch.cat([p.detach().double().reshape(-1) for p in trained or network.parameters()])


def displaced(by: torch.Tensor) -> Numbers:
    """How far weights went, and how far along three fixed waves."""
    at = torch.arange(len(by), dtype=torch.float64)
    waves = {f"moved along wave {k}": torch.cos(k * math.sqrt(2) * at) for k in (1, 2, 3)}
    return {"moved": float(by.norm())} | {name: float(by @ wave / wave.norm()) for name, wave in waves.items()}


def hardened(method: Method) -> Numbers:
    model, last = tiny.language_model(), {}
    if isinstance(method, WeightEdit):
        with TemporaryDirectory() as folder:
            save(tiny.language_model(tiny.llama(seed=1)), folder)
            return moved_by(replace(method, base=folder), model, last)
    return moved_by(method, model, last)


def moved_by(method: Method, model: LanguageModel, last: dict[str, float]) -> Numbers:
    start = weights(model.network)
    how = Fit(steps=STEPS, lr=1e-2, schedule="cosine", seed=3)
    data = {role: DATA[role] for role in method.reads if role in DATA}  # the rest is dealt
    if isinstance(method, SDD):  # its answers must not be restricted ones
        rows = tuple(replace(row, response=f"Then think of {i}.") for i, row in enumerate(DATA["general"]))
        data["general"] = Corpus("general", rows, "golden:general")
    method.immunise(model, data, Run(fit=how, default_batch_size=4, observe=lambda _, trace: last.update(trace)))
    steady = {name: value for name, value in last.items() if name not in UNSTEADY}
    return {**steady, **displaced(weights(model.network) - start)}


def attacked(attack: Attack, folder: Path) -> Numbers:
    base = folder / "base"
    save(tiny.language_model(), base)
    model = attach(load(str(base), device="cpu"), LoRA(r=4, seed=1))
    with torch.no_grad():
        for p in model.network.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.cos(torch.arange(p.numel())).view_as(p))
    save(model, folder / "adapter")
    seen: list[torch.Tensor] = []
    last: dict[str, float] = {}

    def measure(model: LanguageModel) -> Seen:
        seen.append(weights(model.network))
        rows = tokenise(DATA["general"], model.template, model.max_length).rows
        with torch.no_grad():
            loss = float(nll(model.network, Batch(rows)).mean())
        return Seen({"loss": loss}, {}, {}, [])

    curve = shortened(attack, STEPS, n=12, batch_size=4).run(
        Opening(source=str(folder / "adapter"), device="cpu"),
        {role: DATA[role] for role in ("harmful", "benign", "general")},
        measure,
        observe=lambda _, trace: last.update(trace),
    )
    general = {f"nll/general after {point.step}": point.metrics["loss"] for point in curve.points}
    return {**general, **last, **displaced(seen[-1] - seen[0])}


def stored() -> dict[str, Numbers]:
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}


def compare(name: str, found: Numbers) -> None:
    golden = stored()
    if os.environ.get("UPDATE_GOLDEN"):
        golden[name] = {key: float(f"{value:.8g}") for key, value in found.items()}
        kept = {key: golden[key] for key in sorted(golden) if key in METHODS or key in ATTACKS}
        FILE.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        return
    assert name in golden, f"there is no golden run of {name} yet: look at its numbers, then {HOW}"
    wanted = golden[name]
    assert found.keys() == wanted.keys(), f"{name} gives other numbers than it gave; if it is meant to: {HOW}"
    allowed = {key: ALONG * wanted["moved"] if "wave" in key else RTOL * abs(wanted[key]) for key in wanted}
    moved = {
        key: f"{wanted[key]:.6g}, now {found[key]:.6g}"
        for key in wanted
        if not abs(found[key] - wanted[key]) <= allowed[key]
    }
    assert not moved, f"{name} moved: {moved}. If it is meant to, say so in CHANGELOG.md and run {HOW}"


@pytest.mark.parametrize("name", METHODS)
def test_methods(name):
    compare(name, hardened(METHODS[name]))


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(name, tmp_path):
    compare(name, attacked(ATTACKS[name], tmp_path))


def test_the_file_has_no_run_that_is_gone():
    assert stored().keys() <= {*METHODS, *ATTACKS}, f"it has runs of what no longer exists: {HOW}"


def test_a_run_without_golden_numbers_and_one_that_moved_fail(monkeypatch):
    monkeypatch.delenv("UPDATE_GOLDEN", raising=False)
    with pytest.raises(AssertionError, match=r"no golden run of nobody/default yet.*UPDATE_GOLDEN"):
        compare("nobody/default", {})
    wanted = stored()["sft/default"]
    compare("sft/default", wanted)
    for key, value in wanted.items():
        off = 2 * (ALONG * wanted["moved"] if "wave" in key else RTOL * abs(value))
        compare("sft/default", {**wanted, key: value + 0.4 * off})
        for other in (value + off, value - off, math.nan):
            with pytest.raises(AssertionError, match="moved"):
                compare("sft/default", {**wanted, key: other})
