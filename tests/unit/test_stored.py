"""Saved weights read a tensor at a time, and copied with changes: what safetensors itself says is the truth."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from immunity.errors import ModelError
from immunity.models import LoRA, attach, load, save
from immunity.stored import Stored
from immunity.testing import tiny

TENSORS = {
    "model.a": torch.randn(5, 7),
    "model.b": torch.randn(3).bfloat16(),
    "c": torch.tensor(4.0),
    "d": torch.arange(6).reshape(2, 3),
    "e": torch.randn(2, 0),
    "f": torch.randn(4, 2).double(),
    "g": torch.tensor([True, False]),
    "h": torch.randn(9).half(),
}


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "model"
    place.mkdir()
    names = list(TENSORS)
    save_file({n: TENSORS[n] for n in names[:3]}, place / "model-00001-of-00002.safetensors", {"format": "pt"})
    save_file({n: TENSORS[n] for n in names[3:]}, place / "model-00002-of-00002.safetensors")
    (place / "config.json").write_text('{"dtype": "bfloat16", "vocab_size": 5}')
    (place / "tokenizer.json").write_text("{}")
    return place


def test_every_tensor_is_what_safetensors_reads(folder):
    stored = Stored(str(folder))
    assert set(stored.places) == set(TENSORS)
    for name, wanted in TENSORS.items():
        found = stored[name]
        assert found.dtype == wanted.dtype == stored.places[name].dtype
        assert tuple(found.shape) == stored.places[name].shape
        assert torch.equal(found, wanted)
    assert stored.config()["vocab_size"] == 5
    with pytest.raises(ModelError, match="no tensor 'z'"):
        stored["z"]


def test_a_weight_is_found_under_any_of_its_names_with_or_without_the_first_part(folder):
    stored = Stored(str(folder))
    assert stored.called(["lm_head", "model.a"]) == "model.a"
    assert stored.called(["transformer.c"]) == "c"
    assert stored.called(["b"]) == "model.b"
    assert stored.called(["q", "model.q"]) is None


def test_a_copy_has_what_was_changed_and_all_the_rest(folder, tmp_path):
    out = tmp_path / "out"
    Stored(str(folder)).rewritten(out, lambda name, t: t * 2 if name == "model.a" else t)
    for file in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        for name, found in load_file(out / file).items():
            wanted = TENSORS[name] * 2 if name == "model.a" else TENSORS[name]
            assert found.dtype == wanted.dtype
            assert torch.equal(found, wanted)
    assert (out / "tokenizer.json").read_text() == "{}"
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    Stored(str(folder)).rewritten(out, lambda _, t: t, torch.float32)  # it may be replaced, being ours
    found = {name: t for file in out.glob("*.safetensors") for name, t in load_file(file).items()}
    assert {n: t.dtype for n, t in found.items()} == {
        n: torch.float32 if t.is_floating_point() else t.dtype for n, t in TENSORS.items()
    }
    assert torch.equal(found["model.b"], TENSORS["model.b"].float())
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"


def test_nothing_is_left_of_a_copy_that_fails_and_nothing_foreign_is_overwritten(folder, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ModelError, match="came back"):
        Stored(str(folder)).rewritten(out, lambda _, t: t[:1] if t.ndim else t)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ModelError, match="did not write"):
        Stored(str(folder)).rewritten(out, lambda _, t: t)
    assert (out / "mine.txt").read_text() == "mine"


def test_what_is_no_whole_model_is_refused(folder, tmp_path):
    with pytest.raises(ModelError, match="no folder"):
        Stored("somebody/some-model")
    with pytest.raises(ModelError, match="not a folder"):
        Stored(str(tmp_path / "missing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        Stored(str(tmp_path / "empty"))
    save(tiny.language_model(), tmp_path / "base")
    save(attach(load(str(tmp_path / "base")), LoRA(r=2)), tmp_path / "adapter")
    with pytest.raises(ModelError, match="is an adapter"):
        Stored(str(tmp_path / "adapter"))


@pytest.mark.parametrize("damage", ["text", "cut", "huge"])
def test_a_damaged_file_is_an_error_that_names_it(folder, damage):
    file = folder / "model-00001-of-00002.safetensors"
    data = file.read_bytes()
    broken = {"text": data[:8] + b"x" + data[9:], "cut": data[:-4], "huge": b"\xff" * 8 + data[8:]}[damage]
    file.write_bytes(broken)
    with pytest.raises(ModelError, match=r"model-00001-of-00002.safetensors"):
        stored = Stored(str(folder))
        for name in stored.places:
            stored[name]
