"""Defences, one file per paper; none imports another."""

from __future__ import annotations

from typing import Final

from immunity.method import Method
from immunity.methods.antidote import AntiDote
from immunity.methods.booster import Booster
from immunity.methods.circuit_breakers import CircuitBreakers
from immunity.methods.condition_number import ConditionNumber
from immunity.methods.ctrap import CTRAP
from immunity.methods.ctrl import CTRL
from immunity.methods.et import ET
from immunity.methods.ilu import ILU
from immunity.methods.lapt import LAPT
from immunity.methods.lox import LoX
from immunity.methods.mlac import MLAC
from immunity.methods.npo import NPO
from immunity.methods.ntl import NTL
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

METHODS: Final[dict[str, type[Method]]] = {
    "antidote": AntiDote,
    "booster": Booster,
    "circuit-breakers": CircuitBreakers,
    "condition-number": ConditionNumber,
    "ctrap": CTRAP,
    "ctrl": CTRL,
    "et": ET,
    "ilu": ILU,
    "lapt": LAPT,
    "lox": LoX,
    "mlac": MLAC,
    "npo": NPO,
    "ntl": NTL,
    "persistent-trap": PersistentTrap,
    "repnoise": RepNoise,
    "sdd": SDD,
    "seam": SEAM,
    "sft": SFT,
    "sophon": SOPHON,
    "tar": TAR,
    "targeted-vaccine": TargetedVaccine,
    "token-buncher": TokenBuncher,
    "vaa": VAA,
    "vaccine": Vaccine,
}
"""Command-line name -> class. A line here gives a method the contract suite and the command line."""

PRESETS: Final[dict[str, dict[str, Method]]] = {
    "antidote": {"default": AntiDote(), "paper": AntiDote.paper()},
    "booster": {"default": Booster(), "paper": Booster.paper(), "released": Booster.released()},
    "circuit-breakers": {
        "default": CircuitBreakers(),
        "paper": CircuitBreakers.paper(),
        "released": CircuitBreakers.released(),
    },
    "condition-number": {"default": ConditionNumber()},
    "ctrap": {"default": CTRAP(), "paper": CTRAP.paper(), "released": CTRAP.released()},
    "ctrl": {"default": CTRL(), "paper": CTRL.paper()},
    "et": {"default": ET(), "paper": ET.paper(), "released": ET.released()},
    "ilu": {"default": ILU(), "rmu": ILU.rmu()},
    "lapt": {"default": LAPT(), "paper": LAPT.paper()},
    "lox": {"default": LoX(), "paper": LoX.paper(), "released": LoX.released()},
    "mlac": {"default": MLAC(), "paper": MLAC.paper()},
    "npo": {"default": NPO(), "released": NPO.released()},
    "ntl": {"default": NTL(), "paper": NTL.paper(), "released": NTL.released()},
    "persistent-trap": {"default": PersistentTrap()},
    "repnoise": {"default": RepNoise(), "paper": RepNoise.paper(), "released": RepNoise.released()},
    "sdd": {"default": SDD(), "rejecting": SDD.rejecting()},
    "seam": {"default": SEAM(), "paper": SEAM.paper(), "released": SEAM.released()},
    "sft": {"default": SFT()},
    "sophon": {"default": SOPHON(), "paper": SOPHON.paper(), "ice": SOPHON.ice()},
    "tar": {"default": TAR(), "paper": TAR.paper(), "released": TAR.released()},
    "targeted-vaccine": {
        "default": TargetedVaccine(),
        "paper": TargetedVaccine.paper(),
        "released": TargetedVaccine.released(),
    },
    "token-buncher": {
        "default": TokenBuncher(),
        "paper": TokenBuncher.paper(),
        "released": TokenBuncher.released(),
    },
    "vaa": {"default": VAA(), "paper": VAA.paper(), "released": VAA.released()},
    "vaccine": {"default": Vaccine(), "paper": Vaccine.paper(), "released": Vaccine.released()},
}
"""Command-line name -> preset -> settings. "default" is always there."""
