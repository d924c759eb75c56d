"""Defences, one file per paper; none imports another."""

from __future__ import annotations

from typing import Final

from immunity.method import Method
from immunity.methods.antidote import AntiDote
from immunity.methods.booster import Booster
from immunity.methods.ctrap import CTRAP
from immunity.methods.mlac import MLAC
from immunity.methods.ntl import NTL
from immunity.methods.sft import SFT
from immunity.methods.sophon import SOPHON
from immunity.methods.tar import TAR
from immunity.methods.targeted_vaccine import TargetedVaccine
from immunity.methods.vaa import VAA
from immunity.methods.vaccine import Vaccine

METHODS: Final[dict[str, type[Method]]] = {
    "antidote": AntiDote,
    "booster": Booster,
    "ctrap": CTRAP,
    "mlac": MLAC,
    "ntl": NTL,
    "sft": SFT,
    "sophon": SOPHON,
    "tar": TAR,
    "targeted-vaccine": TargetedVaccine,
    "vaa": VAA,
    "vaccine": Vaccine,
}
"""Command-line name -> class. A line here gives a method the contract suite and the command line."""

PRESETS: Final[dict[str, dict[str, Method]]] = {
    "antidote": {"default": AntiDote(), "paper": AntiDote.paper()},
    "booster": {"default": Booster(), "paper": Booster.paper(), "released": Booster.released()},
    "ctrap": {"default": CTRAP(), "paper": CTRAP.paper(), "released": CTRAP.released()},
    "mlac": {"default": MLAC(), "paper": MLAC.paper()},
    "ntl": {"default": NTL(), "paper": NTL.paper(), "released": NTL.released()},
    "sft": {"default": SFT()},
    "sophon": {"default": SOPHON(), "paper": SOPHON.paper(), "ice": SOPHON.ice()},
    "tar": {"default": TAR(), "paper": TAR.paper(), "released": TAR.released()},
    "targeted-vaccine": {
        "default": TargetedVaccine(),
        "paper": TargetedVaccine.paper(),
        "released": TargetedVaccine.released(),
    },
    "vaa": {"default": VAA(), "paper": VAA.paper(), "released": VAA.released()},
    "vaccine": {"default": Vaccine(), "paper": Vaccine.paper(), "released": Vaccine.released()},
}
"""Command-line name -> preset -> settings. "default" is always there."""
