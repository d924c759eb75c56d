"""Every method, with every preset, keeps the contract. A line in METHODS is all that a new one needs."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from immunity.method import Card
from immunity.methods import METHODS, PRESETS
from immunity.methods.antidote import AntiDote
from immunity.methods.booster import Booster
from immunity.methods.circuit_breakers import CircuitBreakers
from immunity.methods.condition_number import ConditionNumber
from immunity.methods.ctrap import CTRAP
from immunity.methods.ctrl import CTRL
from immunity.methods.ilu import ILU
from immunity.methods.lapt import LAPT
from immunity.methods.lox import LoX
from immunity.methods.mlac import MLAC
from immunity.methods.npo import NPO
from immunity.methods.persistent_trap import PersistentTrap
from immunity.methods.repnoise import RepNoise
from immunity.methods.sdd import SDD
from immunity.methods.seam import SEAM
from immunity.methods.sft import SFT
from immunity.methods.sophon import SOPHON
from immunity.methods.tar import TAR
from immunity.methods.targeted_vaccine import TargetedVaccine
from immunity.methods.token_buncher import TokenBuncher
from immunity.methods.vaa import VAA
from immunity.methods.vaccine import Vaccine
from immunity.testing import contract, tiny

MORE = {
    "antidote-shared": AntiDote(width=16, rank=2, per="batch", targets="all-linear", adversary_steps=2),
    "antidote-constant": AntiDote(width=16, rank=2, grad_through_activations=False, beta=0.0),
    "booster-forward": Booster(curvature="forward"),
    "circuit-breakers-response": CircuitBreakers(over="response", depths=(0.9,), everywhere=True),
    "condition-number-head": ConditionNumber(layers=(), axes=2),
    "ctrap-far": CTRAP(lookahead=3, step="adam", watch_benign=True),
    "ctrap-forward": CTRAP(curvature="forward"),
    "ctrl-question": CTRL(tau=0.0, ask="question", share=0.5, beam=1, tokens=6, mean="token"),
    "ilu-weights": ILU(reading="weights", estimate="halves"),
    "ilu-gradient": ILU(reading="gradient", base="rmu"),
    "lox-bare": LoX(rank=2, embeddings=False),
    "lapt-named": LAPT(layers="0", tolerance=None, noise="fixed", like="input"),
    "mlac-censoring": MLAC(lookahead=0, ceiling="none"),
    "npo-kl": NPO(per="token", kl=0.5),
    "persistent-trap-many": PersistentTrap(
        pool=("sgd lr=0.01..0.1 momentum=0.9 mix=0.5", "adam lr=1e-4..1e-3 r=2 replay=0.5", "adamw lr=1e-3 on=benign"),
        horizon=(2, 3),
        moves=2,
        general="random",
        restricted="error+the",
    ),
    "repnoise-drawn": RepNoise(depths=1, faithful=True, beta=0.5),
    "sdd-model": SDD(similarity="model", retain=True, mean="example"),
    "seam-central": SEAM(difference="central", radius="relative", unlearn="none"),
    "sft-token": SFT(mean="token"),
    "sophon-ce": SOPHON(lookahead=2, outer="ce", reinforce=2, rollback=0.0),
    "tar-dpo": TAR(lookahead=2, every=1, outer="dpo", mapping_steps=1, lrs=(1e-3,)),
    "tar-mapped": TAR(lookahead=2, every=2, outer="uniform", mapping_steps=2, drift="none"),
    "targeted-vaccine-drawn": TargetedVaccine(gamma=1, redraw=1, rescore=2),
    "token-buncher-noised": TokenBuncher(max_new_tokens=4, first=0.0, near="reward", entropy="gradient", mean="token"),
    "token-buncher-compat": TokenBuncher(max_new_tokens=4, first=0.0, drawn=True, near="none", compat=True),
    "vaa-sam": VAA(curriculum="none", lam=0.5),
    "vaccine-example": Vaccine(norm_scope="per_example"),
}
# A method that walks far, or does something else first, is checked on a shorter walk and from where it does its own.
SHORT = {
    "antidote": {"width": 32},
    "ctrl": {"tau": 0.0, "rounds": 2, "temperatures": (0.2, 1.0), "tokens": 12},  # a random model writes nothing good
    "et": {"attacks": 1, "attack_steps": 10, "steps": 10, "success": 0.0, "keep": (-1.0, 0.5)},
    "mlac": {"lookahead": 3},
    "sophon": {"lookahead": 3},
    "tar": {"lookahead": 4, "every": 2, "mapping_steps": 0},
    "token-buncher": {"max_new_tokens": 4},
}
SUBJECTS = {
    f"{name}-{preset}": replace(method, **SHORT.get(name, {}))
    for name, of in PRESETS.items()
    for preset, method in of.items()
} | MORE
CHECKS = [
    pytest.param(check, id=f"{where}-{check}")
    for where, method in SUBJECTS.items()
    for check in contract.checks(method)
]


@pytest.mark.parametrize("check", CHECKS)
def test_contract(check):
    check()


def test_every_method_has_presets_of_its_own():
    assert METHODS.keys() == PRESETS.keys()
    for name, presets in PRESETS.items():
        assert "default" in presets
        assert {type(method) for method in presets.values()} == {METHODS[name]}


def test_all_problems_of_ctrap_are_reported_at_once():
    found = CTRAP(alpha=0.0, lam=0.0, word=" ").problems(tiny.language_model())
    assert [problem.where for problem in found] == ["alpha", "lam", "word"]


IMPORTS = """
from collections.abc import Mapping
from dataclasses import dataclass

from immunity.fit import Batches
from immunity.losses import nll
from immunity.mechanisms import LookAhead, Mechanism
from immunity.method import GradientMethod, Problem
from immunity.models import LanguageModel
from immunity.theta import Theta, Vector
"""


def booster() -> type:
    """The method of CONTRIBUTING.md, and the three things that it says it leaves out."""
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = re.search(r"```python\n(@dataclass.*?)```", text, re.DOTALL)
    assert block, "CONTRIBUTING.md has lost its example"
    space: dict[str, object] = {"__name__": __name__}
    exec(compile(IMPORTS + block[1], "CONTRIBUTING.md", "exec"), space)
    kind = space["Booster"]
    kind.strength = "lam"
    kind.card = Card("Booster", "…", "2409.01586", 2024, "raises the cost of harmful convergence", "…", "3", "…")
    kind.__doc__ = "alpha: …; lam: …. Departures from the paper: …"
    return kind


def test_the_method_of_contributing_keeps_the_contract_with_what_it_leaves_out():
    contract.check(booster()())


def test_without_it_the_suite_says_what_is_missing():
    kind = booster()
    del kind.strength
    with pytest.raises(contract.ContractError, match="write `strength: ClassVar"):
        contract.check(kind())
    del kind.card
    kind.__doc__ = "alpha: …; lam: …. Departures from the paper: …"
    with pytest.raises(contract.ContractError, match="has no card"):
        contract.check(kind())
    kind.__doc__ = None
    with pytest.raises(contract.ContractError, match="does not explain alpha, lam"):
        contract.check(kind())
