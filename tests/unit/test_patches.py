"""Patches on linear layers: what W + V U gives, on every family, and no trace left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from immunity.blocks import blocks
from immunity.errors import ModelError, SettingsError
from immunity.hidden import Port, reading, replacing
from immunity.losses import causal_lm, nll
from immunity.models import LoRA, attach
from immunity.patches import Patch, patched, sizes
from immunity.testing import tiny
from immunity.testing.watch import picture, require_same
from immunity.theta import Theta

BATCH = tiny.batch(3)


def llama():
    return tiny.llama()


def gpt2():
    return tiny.gpt2(torch.float32)


def adapted(network: nn.Module):
    network = attach(tiny.language_model(network), LoRA(r=4)).network
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return network


def wrapped():
    return adapted(tiny.llama())


def wrapped_gpt2():
    return adapted(tiny.gpt2(torch.float32, vocab=tiny.VOCAB))


MAKERS = [llama, gpt2, wrapped, wrapped_gpt2]
FAMILIES = pytest.mark.parametrize("make", MAKERS)


def drawn(network: nn.Module, n: int, targets: str = "all-linear", r: int = 2) -> dict[str, Patch]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: Patch(
            0.1 * torch.randn(n, r, size.n_in, generator=generator),
            0.1 * torch.randn(n, size.n_out, r, generator=generator),
        )
        for name, size in sizes(network, targets).items()
    }


def checkpointing(network: nn.Module) -> nn.Module:
    enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    return network.train()


def weight_of(network: nn.Module, name: str) -> torch.Tensor:
    module = causal_lm(network).get_submodule(name)
    return (module.get_base_layer() if hasattr(module, "get_base_layer") else module).weight


@FAMILIES
@pytest.mark.parametrize("targets", ["attention", "all-linear"])
def test_each_linear_layer_of_a_block_is_found_once_in_its_own_size(make, targets):
    network = make()
    found = sizes(network, targets)
    gpt = "c_attn" in next(iter(found))
    assert len(found) == 2 * {("attention", True): 2, ("all-linear", True): 4, ("attention", False): 4}.get(
        (targets, gpt), 7
    )
    for name, size in found.items():
        assert "lora" not in name
        assert "base_layer" not in name
        with torch.no_grad(), reading(network, [Port(name, "input"), Port(name, "output")]) as seen:
            network(input_ids=BATCH.padded().input_ids)
        assert (seen[Port(name, "input")].shape[-1], seen[Port(name, "output")].shape[-1]) == size[:2]
        assert size.norm == pytest.approx(float(weight_of(network, name).detach().norm()), rel=1e-5)


@FAMILIES
def test_a_patched_network_is_one_with_other_weights(make):
    network = make()
    patches = drawn(network, 1)
    with torch.no_grad(), patched(network, patches):
        got = nll(network, BATCH)
    plain = nll(network, BATCH).detach()
    with torch.no_grad():
        for name, (u, v) in patches.items():
            weight, change = weight_of(network, name), (v @ u)[0]
            weight.add_(change if "c_" not in name else change.T)
        want = nll(network, BATCH)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert (want - plain).abs().min() > 1e-3


@FAMILIES
def test_every_example_has_the_patch_that_is_its_own(make):
    network = make()
    patches = drawn(network, 3)
    with torch.no_grad():
        with patched(network, patches):
            together = nll(network, BATCH)
        for i, row in enumerate(BATCH.rows):
            with patched(network, {name: Patch(u[i : i + 1], v[i : i + 1]) for name, (u, v) in patches.items()}):
                alone = nll(network, type(BATCH)((row,)))
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)


@FAMILIES
def test_afterwards_the_network_is_as_it_was_bit_for_bit_also_after_an_exception(make):
    network = make()
    before = picture(network)
    plain = nll(network, BATCH)
    patches = drawn(network, 1)
    for _ in range(3):
        with patched(network, patches):
            assert not torch.equal(nll(network, BATCH), plain)
        require_same(before, network, "after a patch")
    with pytest.raises(KeyboardInterrupt), patched(network, patches):
        raise KeyboardInterrupt
    wrong = dict(patches)
    wrong[next(reversed(wrong))] = Patch(torch.zeros(1, 2, 5), torch.zeros(1, 5, 2))
    with pytest.raises(ModelError, match="does not fit"), patched(network, wrong):
        nll(network, BATCH)
    require_same(before, network, "after exceptions")
    assert torch.equal(nll(network, BATCH), plain)


@pytest.mark.parametrize(
    ("u", "v"),
    [((1, 2, 9), (1, 32, 2)), ((1, 2, 32), (1, 9, 2)), ((2, 2, 32), (2, 32, 2)), ((4, 2, 32), (4, 32, 2))],
)
def test_a_patch_that_does_not_fit_is_refused(u, v):
    network, name = llama(), "model.layers.0.self_attn.q_proj"
    with (
        pytest.raises(ModelError, match=f"{name} maps .* does not fit"),
        patched(network, {name: Patch(torch.zeros(u), torch.zeros(v))}),
    ):
        nll(network, BATCH)


@FAMILIES
def test_gradients_are_the_same_under_checkpointing_also_after_the_with(make):
    def grads(network):
        patches = {name: Patch(*(t.requires_grad_() for t in patch)) for name, patch in drawn(network, 3).items()}
        leaves = [t for patch in patches.values() for t in patch]
        with patched(network, patches), reading(network, [Port(next(iter(patches)), "output")]) as seen:
            value = nll(network, BATCH).sum() + seen.popitem()[1].square().mean()
        trained = [p for p in network.parameters() if p.requires_grad]
        return torch.autograd.grad(value, leaves + trained, allow_unused=True)

    plain, again = grads(make().train()), grads(checkpointing(make()))
    assert any(bool(g.abs().sum() > 0) for g in plain if g is not None)
    for a, b in zip(plain, again, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_checkpointing_that_is_not_done_block_by_block_is_refused():
    network = llama()
    network.model.gradient_checkpointing = True
    with pytest.raises(ModelError, match="turn gradient checkpointing off"), patched(network, drawn(network, 1)):
        pass


@FAMILIES
def test_it_works_under_bf16_and_for_weights_in_bf16(make):
    network = make()
    patches = drawn(network, 3)
    with torch.no_grad(), patched(network, patches):
        want = nll(network, BATCH)
        with torch.autocast("cpu", torch.bfloat16):
            got = nll(network, BATCH)
    torch.testing.assert_close(got, want, rtol=0.1, atol=0.1)
    half = network.bfloat16()
    with torch.no_grad(), patched(half, patches):
        torch.testing.assert_close(nll(half, BATCH), want, rtol=0.1, atol=0.1)


def test_gradients_of_the_weights_are_those_under_the_patch():
    network = tiny.gpt2()
    patches = {name: Patch(u.double(), v.double()) for name, (u, v) in drawn(network, 1).items()}
    with patched(network, patches):
        got = Theta(network).grad(nll, BATCH)
    with torch.no_grad():
        for name, (u, v) in patches.items():
            weight_of(network, name).add_((v @ u)[0].T)
    want = Theta(network).grad(nll, BATCH)
    assert (got - want).norm() < 1e-10 * want.norm()


def test_what_cannot_be_patched_is_said():
    network = llama()
    with pytest.raises(SettingsError, match="use attention or all-linear"):
        sizes(network, "some")
    for name, words in (
        ("model.layers.0.self_attn.z_proj", "'z_proj' is not found"),
        ("lm_head", "lies in no block"),
        ("model.layers.7.mlp", "'7' is not found"),
    ):
        with pytest.raises(ModelError, match=words), reading(network, [Port(name, "input")]):
            pass
    with (
        pytest.raises(ModelError, match=r"output of model.layers.0.mlp.up_proj has the shape .* must be equal"),
        replacing(network, {Port("model.layers.0.mlp.up_proj", "output"): lambda y: y[..., :1]}),
    ):
        nll(network, BATCH)
    layer = network.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ModelError, match=r"up_proj holds its weight as .*without quantisation"):
        sizes(network, "all-linear")
    for block in blocks(network):
        block.self_attn.q_proj = block.self_attn.k_proj = block.self_attn.v_proj = nn.Identity()
        block.self_attn.o_proj = nn.Identity()
    with pytest.raises(ModelError, match="no linear layer of the kind 'attention'"):
        sizes(network)
