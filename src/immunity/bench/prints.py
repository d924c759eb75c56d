"""Fingerprints of saved weights, where the same name may stand for another model, and of prompts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final

from immunity.data.corpus import Corpus, Example
from immunity.data.duplicates import packed, prints
from immunity.pretrained import EMBEDDED, place_of

_BLOCK: Final = 1 << 16
_BLOCKS: Final = 64


def fingerprint(source: str) -> str:
    """Of the weights of a folder or an embedded model; "" of a name on the hub.

    It reads 64 blocks of each file, evenly spread, and the file's size: training moves every weight, so two runs
    differ everywhere, and a file of 15 GB takes no time.

    Raises:
        ModelError: The source is a path, and no folder.
    """
    if source in EMBEDDED and source != "tiny":
        return source  # fetched with a digest of its own
    folder = Path(place_of(source))
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    digest = hashlib.sha256(_base(folder).encode())
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as stream:
            for i in range(_BLOCKS):
                stream.seek(i * max(0, size - _BLOCK) // (_BLOCKS - 1))
                digest.update(stream.read(_BLOCK))
    return digest.hexdigest()[:16] if files else ""


def prompt_text(example: Example) -> str:
    """What a prompt is compared by."""
    return f"{example.prompt}\n{example.input}".strip()


def prompt_prints(corpus: Corpus) -> dict[str, Any]:
    """Hashes of every prompt and of its shingles (:mod:`immunity.data.duplicates`), as plain data.

    They are enough to find out later whether data overlap, without keeping the text.
    """
    return packed(prints(map(prompt_text, corpus)))


def prompts_as_written(corpus: Corpus) -> list[str]:
    """A hash of every prompt letter for letter, sorted: what records held before they held :func:`prompt_prints`."""
    return sorted({hashlib.sha256(f"{e.prompt}\n{e.input}".encode()).hexdigest()[:12] for e in corpus})


def _base(folder: Path) -> str:
    """The fingerprint of what an adapter stands on; "" if there is no adapter."""
    card = folder / "adapter_config.json"
    if not card.is_file():
        return ""
    base = json.loads(card.read_text(encoding="utf-8")).get("base_model_name_or_path") or ""
    place = Path(place_of(base, beside=folder)) if base not in EMBEDDED else Path(base)
    return base if base in EMBEDDED or place.resolve() == folder.resolve() else fingerprint(str(place))
