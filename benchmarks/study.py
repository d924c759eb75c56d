"""What the studies in this folder share: a file of defences, hardened from one aligned start by the command line."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def slug(name: str) -> str:
    """A folder's name."""
    return "-".join(re.findall(r"[a-z0-9.]+", name.lower()))


def run(*words: str) -> None:
    """Run ``immunity`` with these words, and say so."""
    print("$ immunity", shlex.join(words), flush=True)
    ended = subprocess.run([Path(sys.executable).with_name("immunity"), *words], check=False, stdout=subprocess.DEVNULL)
    if ended.returncode:
        raise SystemExit(f"that ended with exit code {ended.returncode}")


def options(says: str | None) -> argparse.ArgumentParser:
    """What every study is asked with."""
    parser = argparse.ArgumentParser(description=says, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", action="append", help="A defence's name; may be repeated.")
    parser.add_argument("--seed", action="append", type=int, help="Instead of the study's seeds; may be repeated.")
    parser.add_argument("--workers", type=int, default=2)
    return parser


def read(asked: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A study's file, and the defences that are asked for; each process of the runs gets one thread by default."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found: dict[str, Any] = json.loads(asked.study.read_text(encoding="utf-8"))
    found["seeds"] = asked.seed or found["seeds"]
    return found, [one for one in found["defences"] if not asked.only or one["name"] in asked.only]


def aligned(study: Mapping[str, Any], seed: int, folder: Path) -> Path:
    """The saved model that is aligned and no more."""
    here = folder / f"seed{seed}" / "aligned"
    if not (here / "record.json").is_file():
        how = [*study["align"].split(), *study["common"].split(), "--seed", str(seed)]
        run("immunise", study["model"], "--method", "sft", *how, "--out", str(here))
    return here / "model"


def hardened(study: Mapping[str, Any], defence: Mapping[str, Any], seed: int, folder: Path) -> Path:
    """The saved model of one defence and one seed; it starts from the aligned one, or "after" another defence."""
    here = folder / f"seed{seed}" / slug(defence["name"])
    before = next((one for one in study["defences"] if one["name"] == defence.get("after")), None)
    start = aligned(study, seed, folder) if before is None else hardened(study, before, seed, folder)
    rows: list[str] = []
    if "group" in defence:
        groups = here.with_name(f"{here.name}-groups")
        if not (groups / "record.json").is_file():
            run("group", str(start), *defence["group"].split(), "--seed", str(seed), "--out", str(groups))
        for role in ("alignment", "vulnerable"):
            rows += [f"--{role}", str(groups / f"{role}.jsonl")]
    if not (here / "record.json").is_file():
        method = ["--method", defence["method"], *shlex.split(defence["options"])]
        how = [*study["common"].split(), "--seed", str(seed)]
        run("immunise", str(start), *method, *rows, *how, "--out", str(here))
    return here / "model"
