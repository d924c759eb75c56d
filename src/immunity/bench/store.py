"""Store: a folder for each job, written beside and renamed, its record last; results are a pure function of records."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, TextIO

from immunity.errors import DataError, ResumeError, SettingsError

SCHEMA: Final = 1
JOB: Final = "job.json"
RECORD: Final = "record.json"
RESULT: Final = "result.json"
CHECKPOINTS: Final = "checkpoint-????????"
_PACKAGES: Final = ("immunity", "torch", "transformers", "peft", "safetensors", "numpy")
_SHOWN: Final = 3
_MISSING: Final = "nothing"


def write(path: Path, data: object) -> None:
    """JSON, beside and renamed: a reader sees the old file or the new one, never half of it. NaN becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    text = json.dumps(_finite(data), indent=1, ensure_ascii=False, allow_nan=False, default=str)
    beside.write_text(text + "\n", encoding="utf-8")
    beside.replace(path)


def read(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        DataError: The file holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}): remove it and run the command that wrote it again") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} is not what immunity writes there: it holds no JSON object")
    return found


def plain(data: object) -> Any:  # noqa: ANN401 - any JSON
    """What ``data`` is after a journey through JSON: tuples as lists, paths as text."""
    return json.loads(json.dumps(_finite(data), allow_nan=False, default=str))


def record(folder: Path) -> dict[str, Any] | None:
    """What a finished job wrote, or None if it is not finished."""
    path = folder / RECORD
    return read(path) if path.exists() else None


def claim(folder: Path, identity: Mapping[str, Any], *, write_card: bool = True) -> dict[str, Any] | None:
    """Make a folder that of one job; its record if the job is finished.

    Args:
        folder: Of the job; need not exist.
        identity: What makes the job this job.
        write_card: False only looks.

    Raises:
        ResumeError: The folder is another job's. The message names what differs.
        DataError: Its files are damaged.
    """
    if folder.exists() and not folder.is_dir():
        raise ResumeError(f"{folder} is a file: choose another --out")
    wanted = plain(identity)
    done = record(folder)
    card = folder / JOB
    known = done["identity"] if done is not None else read(card) if card.exists() else None
    if known is not None and (found := differences(known, wanted)):
        what = "a finished run" if done is not None else "an unfinished run"
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise ResumeError(
            f"{folder} holds {what} with other settings: {'; '.join(found[:_SHOWN])}{more}. "
            "Choose another --out, or remove that folder to start again"
        )
    if known is None and write_card and not (folder / "run.json").exists():  # else fit knows whose run that is
        write(card, wanted)
    return done


def shelved(shelf: Path, name: str, identity: Mapping[str, Any]) -> Path:
    """Where a job lies among those that several results share: by all that can change its numbers.

    That is what makes it this job, and the versions of the packages that compute them.

    Args:
        shelf: Folder of them all.
        name: For people; two jobs of other names are never one.
        identity: What makes the job this job.
    """
    made = json.dumps([name, plain(identity), versions()], sort_keys=True, ensure_ascii=False)
    words = re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-")
    return shelf / f"{words[:60]}-{hashlib.sha256(made.encode()).hexdigest()[:16]}"


def abandon(folder: Path) -> None:
    """Let go of a folder whose job failed before its first checkpoint, so that other settings can be tried there."""
    if not any(folder.rglob(CHECKPOINTS)) and not (folder / RECORD).exists():
        for name in (JOB, "run.json", "metrics.jsonl", "points.jsonl"):
            for file in list(folder.rglob(name)):
                file.unlink()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a job's folder; the system lets go when this process ends, however it ends.

    Where the system or the file system knows no locks, nobody is kept out.

    Raises:
        ResumeError: Another process is in it.
        SettingsError: There can be no such folder, or nothing can be written to it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise SettingsError(f"cannot write to the folder {folder}: {error.strerror}. Choose another --out") from error
    with file:
        yield from _holding(file, folder)


def _holding(file: TextIO, folder: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ResumeError(f"another process is writing to {folder}: wait for it, or choose another --out") from error
    except OSError:  # no locks on this file system
        pass
    try:
        yield
    finally:
        Path(file.name).unlink(missing_ok=True)
        with suppress(OSError):  # a job that was refused leaves nothing behind
            folder.rmdir()


def differences(found: object, wanted: object, place: str = "") -> list[str]:
    """What two plain values differ in, one line a leaf: "fit.lr is 0.1, not 0.2"."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        lines = []
        for key in [*found, *(key for key in wanted if key not in found)]:
            inside = f"{place}.{key}" if place else str(key)
            lines += differences(found.get(key, _MISSING), wanted.get(key, _MISSING), inside)
        return lines
    return [] if found == wanted else [f"{place} is {_short(found)}, not {_short(wanted)}"]


def log(folder: Path) -> list[dict[str, float]]:
    """The rows of a training run's ``metrics.jsonl``."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def line(*words: object) -> str:
    """A command of ours as a user would type it, quotes included."""
    return shlex.join(["immunity", *map(str, words)])


def command() -> str:
    """The command that is running, as a user would type it again."""
    return line(*sys.argv[1:])


def versions() -> dict[str, str]:
    """Package -> version of what can change a number."""
    return {"python": sys.version.split()[0], **{name: _version(name) for name in _PACKAGES}}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def result(
    *,
    title: str,
    command: str,
    seconds: float,
    model: Mapping[str, Any],
    hardened: Sequence[Mapping[str, Any]],
    attacked: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """``result.json`` (see ``immunity.report``) from the records of finished jobs.

    Args:
        title: Of the page.
        command: That made it.
        seconds: From first job to last.
        model: Name, parameters, licence.
        hardened: Records of hardening jobs.
        attacked: Records of attack jobs.
    """
    data = {(row["role"], row["fingerprint"]): row for job in (*hardened, *attacked) for row in job["data"]}
    attacks = {job["attack"]["name"]: job["attack"] for job in attacked}
    return {
        "schema": SCHEMA,
        "title": title,
        "command": command,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "versions": versions(),
        "model": dict(model),
        "data": [{key: value for key, value in row.items() if key != "prompts"} for row in data.values()],
        "defences": [{k: v for k, v in job.items() if k not in {"data", "kind"}} for job in hardened],
        "attacks": list(attacks.values()),
        "curves": [job["curve"] for job in attacked],
    }


def same_run(path: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    """``found``, with the command, the time and the date of the result at ``path`` if that has the same curves.

    A run that was finished before is only shown again.
    """
    before = read(path) if path.exists() else {}
    if before.get("curves") != plain(found["curves"]):
        return dict(found)
    return {**found, **{key: before[key] for key in ("command", "created", "seconds", "versions") if key in before}}


def thinned(rows: Iterable[Mapping[str, float]], most: int = 200) -> list[dict[str, float]]:
    """At most ``most`` evenly spaced rows of a log, first and last among them, so that a page stays light."""
    every = [dict(row) for row in rows]
    if len(every) <= most:
        return every
    return [every[round(i * (len(every) - 1) / (most - 1))] for i in range(most)]


def _short(value: object) -> str:
    text = value if value is _MISSING else json.dumps(value, ensure_ascii=False)
    return str(text) if len(str(text)) <= 60 else f"{str(text)[:59]}…"


def _finite(data: Any) -> Any:  # noqa: ANN401 - any JSON
    if isinstance(data, float):
        return data if data - data == 0 else None
    if isinstance(data, Mapping):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return data
