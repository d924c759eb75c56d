"""Attacks, one file per threat."""

from __future__ import annotations

from typing import Final

from immunity.attacks.abliterate import Abliterate
from immunity.attacks.abliterate_search import AbliterateSearch
from immunity.attacks.asa import ASA
from immunity.attacks.ask import Ask
from immunity.attacks.attack import Attack
from immunity.attacks.difference import Interpolate, Subtract
from immunity.attacks.edits import Prune, Quantise
from immunity.attacks.finetune import FineTune
from immunity.attacks.intervene import Intervene
from immunity.attacks.merge import Merge
from immunity.attacks.operations import OPERATIONS
from immunity.attacks.patch import LowRankPatch
from immunity.attacks.program import Program
from immunity.attacks.rl import HarmfulRL
from immunity.attacks.steering import LoFiT, ReFT
from immunity.attacks.whiten import Whiten

ATTACKS: Final[dict[str, type[Attack]]] = {name: type(one) for name, one in OPERATIONS.items()} | {
    Program.name: Program
}
"""Command-line name -> class."""

PRESETS: Final[dict[str, dict[str, Attack]]] = {
    "finetune": {
        "default": FineTune(),
        "lora": FineTune(adapter="lora", lr=5e-4),
        "mixed": FineTune(harmful=0.25),
        "benign": FineTune(harmful=0.0),
        "ctrap-full": FineTune.full_harmful(),
        "ctrap-mixed": FineTune.mixed(),
        "ctrap-benign": FineTune.benign(),
    },
    "whiten": {"default": Whiten(), "sgd": Whiten(optimizer="sgd", lr=0.03)},
    "patch": {"default": LowRankPatch()},
    "ask": {"default": Ask(style="prefill"), "alpaca": Ask(template="alpaca"), "chatml": Ask(template="chatml")},
    "abliterate": {"default": Abliterate(), "rank-4": Abliterate(rank=4)},
    "abliterate-search": {"default": AbliterateSearch()},
    "reft": {"default": ReFT()},
    "lofit": {"default": LoFiT()},
    "intervene": {"default": Intervene(), "output": Intervene(where="output")},
    "asa": {"default": ASA(), "gradient": ASA(gradient=True)},
    "rl": {
        "default": HarmfulRL(),
        "token-buncher": HarmfulRL.token_buncher(),
        "adaptive": HarmfulRL.adaptive(),
        "harmrlvr": HarmfulRL.harmrlvr(),
    },
    "prune": {"default": Prune(), "wanda": Prune(kind="wanda")},
    "quantise": {"default": Quantise()},
    "interpolate": {"default": Interpolate()},
    "subtract": {"default": Subtract()},
    "merge": {"default": Merge()},
    "program": {"default": Program()},
}
"""Command-line name -> preset -> settings. "ctrap-…" are those of CTRAP's tables."""
