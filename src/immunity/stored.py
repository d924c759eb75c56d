"""Stored: the weights of a saved model, read from safetensors one tensor at a time; and copies that are changed so.

What is in memory is one tensor, however large the model is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, final

import torch
from torch import Tensor

from immunity.errors import ModelError
from immunity.fetch import MEMO, replaced
from immunity.pretrained import place_of

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What safetensors calls them."""
_CODES: Final = {dtype: code for code, dtype in DTYPES.items()}


class Place(NamedTuple):
    """Where a tensor lies.

    Attributes:
        file: Its file.
        start: The first of its bytes.
        dtype: As stored.
        shape: As stored.
    """

    file: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@final
class Stored:
    """The tensors of a saved model, by the names that its files have for them.

    Args:
        name: A folder with a whole model, "tiny" or "smollm2".

    Attributes:
        folder: Where the files are.
        places: Name -> where it lies, in the order of the files.

    Raises:
        ModelError: There is no such folder, it holds an adapter or no safetensors, or a file is damaged.
    """

    def __init__(self, name: str) -> None:
        self.folder = Path(place_of(name))
        self._name = name
        if not self.folder.is_dir():
            raise ModelError(f"{name!r} is no folder: download the model first, and give the folder")
        if (self.folder / "adapter_config.json").is_file():
            raise ModelError(f"{name!r} is an adapter, not a whole model: merge it and save it whole first")
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise ModelError(f"the folder {name!r} has no *.safetensors, which alone is read")
        self.places: dict[str, Place] = {}
        for file in files:
            self.places.update(_header(file))

    def __getitem__(self, name: str) -> Tensor:
        """A tensor, on the CPU, in the dtype it is stored in.

        Raises:
            ModelError: There is none of that name.
        """
        if name not in self.places:
            raise ModelError(f"{self._name!r} has no tensor {name!r}")
        file, start, dtype, shape = self.places[name]
        found = torch.empty(shape, dtype=dtype)
        with file.open("rb") as stream:
            stream.seek(start)
            got = stream.readinto(_bytes(found))
        if got != found.nbytes:
            raise ModelError(f"{file} ends in the middle of {name}: it is damaged")
        return found

    def called(self, names: Iterable[str]) -> str | None:
        """Which of these names of one weight the files have for it; they may leave its first part out, or add one.

        Weights that are tied have several names and are stored under one of them; GPT-2's files lack "transformer.".
        """
        for name in names:
            shorter = name.partition(".")[2]
            for stored in (name, shorter):
                if stored in self.places:
                    return stored
            longer = next((key for key in self.places if key.partition(".")[2] == name), None)
            if longer is not None:
                return longer
        return None

    def config(self) -> dict[str, Any]:
        """What config.json says.

        Raises:
            ModelError: There is none.
        """
        path = self.folder / "config.json"
        if not path.is_file():
            raise ModelError(f"the folder {self._name!r} has no config.json")
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def rewritten(
        self, folder: Path, change: Callable[[str, Tensor], Tensor], dtype: torch.dtype | None = None
    ) -> None:
        """Copy the model to ``folder``, each tensor as ``change`` gives it; everything else as it is.

        Args:
            folder: Complete or absent, whenever one looks. One that holds something else is refused.
            change: (name, tensor) -> a tensor of the same shape and of the dtype that it is stored in.
            dtype: Store every tensor of floating point in this one, and hand it to ``change`` so; None changes none.

        Raises:
            ModelError: The folder holds something else, or ``change`` gave another shape or dtype.
        """
        by_file: dict[Path, list[str]] = {}
        for name, place in self.places.items():
            by_file.setdefault(place.file, []).append(name)
        with replaced(folder, marker=MEMO) as beside:
            for other in self.folder.iterdir():
                if other.is_file() and other.suffix != ".safetensors":
                    shutil.copy(other, beside)
            memo = beside / MEMO
            if not memo.exists():
                memo.write_text(json.dumps({"schema": 1, "source": self._name}) + "\n", encoding="utf-8")
            if dtype is not None:
                _note_dtype(beside / "config.json", dtype)
            for file, names in by_file.items():
                _write(beside / file.name, self._changed(names, change, dtype), self._sizes(names, dtype))

    def _sizes(self, names: list[str], dtype: torch.dtype | None) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {name: (_target(self.places[name].dtype, dtype), self.places[name].shape) for name in names}

    def _changed(
        self, names: list[str], change: Callable[[str, Tensor], Tensor], dtype: torch.dtype | None
    ) -> Iterator[Tensor]:
        for name in names:
            given = self[name].to(_target(self.places[name].dtype, dtype))
            shape, kind = given.shape, given.dtype
            found = change(name, given)
            if found.shape != shape or found.dtype != kind:
                raise ModelError(f"{name} was {tuple(shape)} {kind} and came back {tuple(found.shape)} {found.dtype}")
            del given
            yield found
            del found


def _target(stored: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and stored.is_floating_point else stored


def _bytes(tensor: Tensor) -> memoryview:
    found: Any = tensor.reshape(-1).contiguous().view(torch.uint8).numpy()
    return memoryview(found)


def _header(file: Path) -> dict[str, Place]:
    """The format: eight bytes with the length of a JSON text, the text, and then the bytes of the tensors."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            head = json.loads(stream.read(min(length, file.stat().st_size)))
        rows = {name: row for name, row in head.items() if name != "__metadata__"}
        found = {
            name: Place(file, 8 + length + row["data_offsets"][0], DTYPES[row["dtype"]], tuple(row["shape"]))
            for name, row in rows.items()
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file} is damaged, or stores numbers in a way that is not known here ({error})") from error
    return dict(sorted(found.items(), key=lambda item: item[1].start))


def _write(file: Path, tensors: Iterable[Tensor], sizes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in sizes.items():
        start, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        head[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            stream.write(_bytes(tensor))
            del tensor  # before the next one is read


def _note_dtype(path: Path, dtype: torch.dtype) -> None:
    """A config names the dtype of its weights; loaders may go by it."""
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
