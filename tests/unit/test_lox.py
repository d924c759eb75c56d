"""LoX against its equation: singular values, ranks, what stays as it is, and what rounding leaves of it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from immunity import cli
from immunity.bench import store
from immunity.errors import ModelError, SettingsError
from immunity.extrapolation import Applied, along, difference, extrapolate, part, push, smallest_rank
from immunity.fit import Fit
from immunity.mechanisms import LowRankEdit
from immunity.method import Run
from immunity.methods.lox import LoX
from immunity.models import LanguageModel, LoRA, attach, load, save
from immunity.stored import Stored
from immunity.testing import tiny

RUN = Run(fit=Fit(steps=1, lr=1.0))


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def aligned(network: torch.nn.Module, *, ranks: int = 4, size: float = 0.05) -> LanguageModel:
    """A frozen model that was moved away from ``network``: matrices in a few directions, vectors anyhow."""
    with torch.no_grad():
        for i, p in enumerate(network.parameters()):
            p.requires_grad_(False)
            step = drawn(*p.shape, seed=i) if p.ndim == 1 else drawn(p.shape[0], ranks, seed=i) @ drawn(
                ranks, p.shape[1], seed=100 + i
            )  # fmt: skip
            p.add_((size * step).to(p.dtype))
    return tiny.language_model(network)


@pytest.fixture
def base(tmp_path) -> str:
    save(tiny.language_model(), tmp_path / "base")
    return str(tmp_path / "base")


def edited(model: LanguageModel, method: LoX) -> dict[str, torch.Tensor]:
    method.immunise(model, {}, RUN)
    return {name: p.detach().clone() for name, p in model.network.named_parameters()}


def tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    return {name: t for file in Path(folder).glob("*.safetensors") for name, t in load_file(file).items()}


def test_the_leading_singular_values_are_1_plus_alpha_times_what_they_were(base):
    model = aligned(tiny.llama())
    before, home = tensors(base), {n: p.detach().clone() for n, p in model.network.named_parameters()}
    after = edited(model, LoX(base=base, alpha=1.25, rank=3))
    for name, weight in home.items():
        if weight.ndim == 1:
            assert torch.equal(after[name], weight)
            continue
        s = torch.linalg.svdvals((weight - before[name]).double())
        got = torch.linalg.svdvals((after[name] - before[name]).double())
        torch.testing.assert_close(got[:3], 2.25 * s[:3], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(got[3], s[3], rtol=1e-2, atol=1e-4)  # the fourth of four directions
        assert torch.linalg.matrix_rank((after[name] - weight).double(), atol=1e-4) == 3


def test_it_is_the_projection_of_the_equation():
    w, b = drawn(20, 30, seed=1), drawn(20, 30, seed=2)
    u = torch.linalg.svd(w - b).U[:, :5]
    wanted = w + 0.7 * u @ u.T @ (w - b)
    extrapolate(w, b, 0.7, 5)
    torch.testing.assert_close(w, wanted, rtol=1e-12, atol=1e-12)


def test_a_rank_as_large_as_a_matrix_is_the_whole_difference():
    w, b = drawn(12, 9, seed=1), drawn(12, 9, seed=2)
    wanted = w + 1.5 * (w - b)
    for rank in (9, 50):
        found = w.clone()
        extrapolate(found, b, 1.5, rank)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_more_than_two_dimensions_are_so_many_matrices():
    w, b = drawn(3, 8, 6, seed=1), drawn(3, 8, 6, seed=2)
    wanted = w.clone()
    for i in range(3):
        extrapolate(wanted[i], b[i], 1.0, 2)
    extrapolate(w, b, 1.0, 2)
    assert torch.equal(w, wanted)


def test_it_does_not_matter_how_many_rows_are_edited_at_once(monkeypatch):
    w, b = drawn(20, 30, seed=1), drawn(20, 30, seed=2)
    whole, rows = w.clone(), w.clone()
    first = extrapolate(whole, b, 1.0, 4)
    monkeypatch.setattr("immunity.extrapolation.ROWS", 70)
    second = extrapolate(rows, b, 1.0, 4)
    torch.testing.assert_close(rows, whole, rtol=1e-13, atol=1e-13)
    assert second.summary() == pytest.approx(first.summary())


@pytest.mark.parametrize("shape", [(1040, 1300), (1300, 1040)])
def test_a_randomised_decomposition_is_within_a_thousandth_of_the_exact_one(shape):
    low = drawn(shape[0], 12, seed=1) @ drawn(12, shape[1], seed=2) / 12
    delta = (low + 0.05 * drawn(*shape, seed=3)).float()  # what alignment leaves: a few directions, and noise
    exact, fast = (part(delta, 6, svd).matrix() for svd in ("exact", "randomised"))
    assert (exact - fast).norm() < 1e-3 * exact.norm()


def test_tied_weights_stay_tied_and_are_edited_once(tmp_path):
    save(tiny.language_model(tiny.llama(tied=True)), tmp_path / "base")
    model = aligned(tiny.llama(tied=True))
    head, table = model.network.lm_head, model.network.get_input_embeddings()
    assert head.weight is table.weight
    wanted = table.weight.detach().clone()
    extrapolate(wanted, tensors(tmp_path / "base")["model.embed_tokens.weight"], 1.25, 2)
    edited(model, LoX(base=str(tmp_path / "base"), rank=2))
    assert head.weight is table.weight
    assert torch.equal(table.weight, wanted)
    save(model, tmp_path / "out")
    again = load(str(tmp_path / "out"))
    assert again.network.lm_head.weight is again.network.get_input_embeddings().weight
    assert torch.equal(again.network.lm_head.weight, wanted)


def test_embeddings_can_be_left_out_and_then_may_differ_in_size(tmp_path):
    save(tiny.language_model(tiny.llama(vocab=400)), tmp_path / "base")
    model = aligned(tiny.llama(vocab=384))
    home = {n: p.detach().clone() for n, p in model.network.named_parameters()}
    method = LoX(base=str(tmp_path / "base"), rank=2)
    with pytest.raises(SettingsError, match=r"embed_tokens.weight is 400×32 there and 384×32 here"):
        method.immunise(model, {}, RUN)
    after = edited(model, replace(method, embeddings=False))
    for name, weight in home.items():
        same = weight.ndim == 1 or "embed" in name or "lm_head" in name
        assert torch.equal(after[name], weight) == same, name


def test_gpt2_holds_its_matrices_the_other_way_round_and_the_edit_does_not_care(tmp_path):
    network = tiny.gpt2(torch.float32, vocab=tiny.VOCAB, positions=64)
    save(tiny.language_model(network), tmp_path / "base")
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    model = aligned(network)
    home = {n: p.detach().clone() for n, p in model.network.named_parameters()}
    after = edited(model, LoX(base=str(tmp_path / "base"), rank=2))
    name = "transformer.h.0.attn.c_attn.weight"
    turned = home[name].T.contiguous()
    extrapolate(turned, before[name].T, 1.25, 2)
    torch.testing.assert_close(after[name], turned.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("size", "low", "high"), [(3e-5, 0.6, 0.93), (1e-4, 0.93, 0.985), (1e-2, 0.9999, 1.0)])
def test_what_survives_bfloat16_is_measured(size, low, high):
    w = (0.02 * drawn(300, 200, seed=1)).bfloat16()
    total = Applied(difference=1.0)
    push(w, part(size * drawn(300, 200, seed=2).float(), 200, "exact"), 1.0, total)
    assert low < total.survived < high


def test_a_run_warns_if_the_edit_does_not_survive_and_only_then(base, caplog):
    model = aligned(tiny.llama(), size=2e-5)
    half = replace(model, network=model.network.bfloat16())
    with caplog.at_level(logging.WARNING):
        edited(half, LoX(base=base, rank=2))
    assert "survives rounding to bfloat16: open the model in float32" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        edited(aligned(tiny.llama(), size=1e-3), LoX(base=base, rank=2))
    assert caplog.text == ""


def test_subtracting_in_bfloat16_loses_small_differences():
    w = 0.02 * drawn(50, 40, seed=1).float()
    b = w - 1e-5 * drawn(50, 40, seed=2).float()
    assert (difference(w, b) - (w - b)).norm() == 0
    assert (difference(w, b, "bfloat16") - (w - b)).norm() > 0.3 * (w - b).norm()
    assert difference(w.bfloat16(), b.bfloat16()).dtype == torch.float32
    assert LoX.released() == LoX(svd="exact", subtract="bfloat16")


def test_the_diagnostic_is_1_where_the_rank_is_enough_and_falls_with_another_direction():
    delta = drawn(30, 3, seed=1) @ drawn(3, 20, seed=2)
    leading = part(delta, 3)
    assert along(delta, leading) == pytest.approx(1.0)
    assert along(delta, part(delta, 2)) < 1.0
    later = delta + drawn(30, 20, seed=5)
    assert along(later, leading) < 0.95


def test_the_rule_for_the_rank_takes_the_smallest_that_is_as_safe(base):
    model = aligned(tiny.llama(), ranks=4)
    home = {n: p.detach().clone() for n, p in model.network.named_parameters()}
    before, name = tensors(base), "model.layers.0.mlp.up_proj.weight"
    whole = home[name] - before[name]
    asked: list[float] = []

    def unsafe(at: LanguageModel) -> float:
        """How much of one matrix's difference is missing."""
        now = dict(at.network.named_parameters())
        assert torch.equal(now["model.norm.weight"], home["model.norm.weight"])
        asked.append(float((now[name] - home[name]).norm() / whole.norm()))
        return asked[-1]

    assert smallest_rank(model, Stored(base), unsafe, ranks=(8, 1, 2, 3, 4), rho=0.01) == 4
    assert len(asked) == 5
    assert asked[0] == 0.0  # the aligned model is asked first
    assert asked[1:] == sorted(asked[1:], reverse=True)
    assert all(torch.equal(p, home[n]) for n, p in model.network.named_parameters())
    with pytest.raises(SettingsError, match="try larger ranks"):
        smallest_rank(model, Stored(base), unsafe, ranks=(1, 2), rho=1e-3)
    assert all(torch.equal(p, home[n]) for n, p in model.network.named_parameters())


def test_from_folder_to_folder_it_is_the_same_model(base, tmp_path):
    model = aligned(tiny.llama())
    save(model, tmp_path / "aligned")
    for embeddings in (True, False):
        method = LoX(base=base, rank=2, embeddings=embeddings)
        found = method.streamed(str(tmp_path / "aligned"), tmp_path / "out")
        fresh = load(str(tmp_path / "aligned"))
        wanted = edited(fresh, method)
        got = dict(load(str(tmp_path / "out")).network.named_parameters())
        assert all(torch.equal(got[n], t) for n, t in wanted.items())
        assert found["edit/survived"] == pytest.approx(1.0, abs=1e-4)
        assert found["edit/leading"] < 1.0
    assert load(str(tmp_path / "out")).source
    with pytest.raises(ModelError, match="the same matrices"):
        LoX(base=base).streamed(base, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(SettingsError, match="alpha = 0"):
        LoX(base=base, alpha=0.0).streamed(base, tmp_path / "none")


def test_all_problems_are_reported_at_once(base, tmp_path):
    model = aligned(tiny.llama())
    assert [p.where for p in LoX(alpha=0.0).problems(model)] == ["alpha", "base"]
    assert LoX(base=base).problems(model) == []
    assert "merge it" in str(LoX(base=base).problems(attach(load(base), LoRA(r=2)))[0])
    save(tiny.language_model(tiny.llama(layers=1)), tmp_path / "short")
    assert "is missing there" in str(LoX(base=str(tmp_path / "short")).problems(model)[0])
    assert "every matrix is equal" in str(LoX(base=base).problems(load(base))[0])


def test_its_mechanism_is_a_low_rank_edit_and_its_settings_have_a_range():
    assert LoX(rank=9).mechanisms == (LowRankEdit(k=9),)
    assert LoX(alpha=0.0).mechanisms == ()
    assert (LoX().alpha, LoX().rank, LoX.paper().svd) == (1.25, 6, "exact")
    for settings in ({"alpha": -0.1}, {"rank": 0}):
        with pytest.raises(SettingsError, match="must"):
            LoX(**settings)


def test_the_command_saves_a_plain_model_and_says_what_it_did(base, tmp_path):
    model = aligned(tiny.llama())
    save(model, tmp_path / "aligned")
    words = ["immunise", str(tmp_path / "aligned"), "--method", "lox", "--set", f"base={base}", "--set", "rank=3"]
    done = CliRunner().invoke(cli.program(), [*words, "--out", str(tmp_path / "out")], env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    assert "edit/survived" in done.output
    record = store.record(tmp_path / "out")
    assert record["steps"] == 1
    assert record["saved"] == "model"
    assert record["mechanisms"] == [{"mechanism": "low-rank-edit", "k": 3}]
    assert record["identity"]["base"]
    wanted = edited(load(str(tmp_path / "aligned")), LoX(base=base, rank=3))
    got = dict(load(str(tmp_path / "out" / "model")).network.named_parameters())
    assert all(torch.equal(got[n], t) for n, t in wanted.items())
    nothing = CliRunner().invoke(cli.program(), [*words[:4], "--out", str(tmp_path / "no")], env={"COLUMNS": "120"})
    assert nothing.exit_code == 2
    assert "--set base=FOLDER" in nothing.output
    lora = [*words, "--adapter", "lora", "--out", str(tmp_path / "lora")]
    refused = CliRunner().invoke(cli.program(), lora, env={"COLUMNS": "120"})
    assert refused.exit_code == 2
    assert "trains no adapter" in refused.output
