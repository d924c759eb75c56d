"""What a step of each method costs, against SFT's, in one run on one machine.

    python benchmarks/cost.py
    python benchmarks/cost.py --model smollm2 --rows 4 --only vaccine --only tar:paper --steps 2

Each method has a process of its own, in which SFT's steps and its own are taken in turn; the figure is the median over
rounds of the ratio within a round, and its range. Time is the processor's, so that other load on the machine matters
little (on CUDA the clock's). Peak memory is what that process held in its first steps: the weights, and what came
beyond them. A step is what a method calls one: SOPHON's is a loop of updates, E.T.'s a round at a block. Methods that
do not train, and those that only rewrite data and then are SFT, have no step of their own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Final

import torch

from immunity.attacks.attack import Opening
from immunity.bench import memory, standins
from immunity.bench.hardened import ordinary
from immunity.data.corpus import Corpora
from immunity.fit import Fit
from immunity.method import DataEdit, Method, Run
from immunity.methods import PRESETS
from immunity.methods.sft import SFT
from immunity.models import LanguageModel, all_weights
from immunity.spec import build

CHOSEN: Final[Mapping[str, Mapping[str, Any]]] = {
    "ctrap, K = 6": {"lookahead": 6, "alpha": 0.12, "step": "adam"},
    "ctrap, curvature": {"curvature": "forward"},
}
"""Beside the presets: settings of CTRAP that change what it costs."""
AFTER: Final[Mapping[str, Mapping[str, Any]]] = {"tar": {"mapping_steps": 0}}
"""Settings that leave out a short first phase: what is timed is the steps after it."""


def methods() -> dict[str, Method]:
    """Name -> settings of all that have a step of their own: "method", or "method:preset" for what is not default."""
    found = {
        name if preset == "default" else f"{name}:{preset}": build(method, AFTER.get(name, {}))
        for name, presets in PRESETS.items()
        for preset, method in presets.items()
    }
    found |= {name: build(PRESETS["ctrap"]["default"], more) for name, more in CHOSEN.items()}
    return {name: one for name, one in found.items() if one.trains and not isinstance(one, DataEdit)}


class Clock:
    """Seconds of each step, as an observer."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.at: dict[int, float] = {}

    def __call__(self, done: int, _trace: Mapping[str, float]) -> None:
        """Told of every step, before the first, and by long steps of their parts."""
        torch.zeros((), device=self.device).item()  # waits for what the device still does
        self.at.setdefault(done, time.process_time() if self.device.type == "cpu" else time.perf_counter())

    @property
    def step(self) -> float:
        """The median of all steps but the first, which sets things up."""
        between = [b - a for a, b in pairwise(self.at.values())]
        return statistics.median(between[1:] or between)


def data(model: str) -> Corpora:
    """What any method may read; for the cost it does not matter which rows are called vulnerable."""
    made = standins.defence("umbra", general=ordinary(model))
    return {**made, "vulnerable": made["alignment"]}


def steps(model: LanguageModel, rows: Corpora, method: Method, asked: argparse.Namespace) -> float:
    """Seconds of a step."""
    clock = Clock(model.device)
    run = Run(fit=Fit(steps=asked.steps + 1, lr=1e-6), default_batch_size=asked.rows, observe=clock)
    method.immunise(model, rows, run)
    return clock.step


def one(asked: argparse.Namespace) -> dict[str, Any]:
    """One method, in this process."""
    torch.set_num_threads(asked.threads)
    method, rows = methods()[asked.measure], data(asked.model)
    model = all_weights(Opening(source=asked.model, device=asked.device, max_length=asked.max_length).load("merged"))
    with memory.watched(model.network) as watch:
        steps(model, rows, method, asked)
    pairs = [(steps(model, rows, method, asked), steps(model, rows, SFT(), asked)) for _ in range(asked.rounds)]
    ratios = [mine / plain for mine, plain in pairs]
    return {
        "method": asked.measure,
        "seconds_per_step": round(statistics.median(mine for mine, _ in pairs), 4),
        "times_sft": round(statistics.median(ratios), 2),
        "range": [round(min(ratios), 2), round(max(ratios), 2)],
        "peak_bytes": watch.peak,
    }


def main() -> None:
    """Measure, and print one row of JSON a method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--only", action="append", choices=list(methods()), metavar="METHOD", help="May be repeated.")
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-length", type=int, default=96)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--measure", choices=list(methods()), metavar="METHOD", help="One method, in this process.")
    asked = parser.parse_args()
    if asked.measure:
        print(json.dumps(one(asked)))
        return
    given = [
        word
        for name in ("model", "rows", "steps", "rounds", "threads", "max_length", "device")
        for word in (f"--{name.replace('_', '-')}", str(getattr(asked, name)))
    ]
    plain = 0
    for name in dict.fromkeys(["sft", *(asked.only or methods())]):
        code = [sys.executable, __file__, *given, "--measure", name]
        said = subprocess.run(code, check=False, capture_output=True, text=True)
        if said.returncode:
            print(json.dumps({"method": name, "error": said.stderr.strip().splitlines()[-1]}), flush=True)
            continue
        row = json.loads(said.stdout.splitlines()[-1])
        peak = row.pop("peak_bytes")
        plain = plain or peak
        row |= {"peak_mib": round(peak / 2**20), "peak_times_sft": round(peak / plain, 2)}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
