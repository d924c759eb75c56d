"""What the studies in this folder share: a file of defences, hardened from one aligned start by the command line."""

from __future__ import annotations

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


def read(path: Path) -> dict[str, Any]:
    """A study's file; each process of the runs gets one thread, if nobody says otherwise."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def hardened(study: Mapping[str, Any], defence: Mapping[str, Any], seed: int, folder: Path) -> Path:
    """The saved model of one defence and one seed."""
    aligned, here = folder / f"seed{seed}" / "aligned", folder / f"seed{seed}" / slug(defence["name"])
    same = [*study["common"].split(), "--seed", str(seed)]
    if not (aligned / "record.json").is_file():
        run("immunise", study["model"], "--method", "sft", *study["align"].split(), *same, "--out", str(aligned))
    start, rows = str(aligned / "model"), list[str]()
    if "group" in defence:
        groups = aligned.parent / f"{here.name}-groups"
        if not (groups / "record.json").is_file():
            run("group", start, *defence["group"].split(), "--seed", str(seed), "--out", str(groups))
        for role in ("alignment", "vulnerable"):
            rows += [f"--{role}", str(groups / f"{role}.jsonl")]
    if not (here / "record.json").is_file():
        method = ["--method", defence["method"], *shlex.split(defence["options"])]
        run("immunise", start, *method, *rows, *same, "--out", str(here))
    return here / "model"
