"""The model as it was: nothing copied over a fresh adapter, frozen weights shared otherwise, all as found after."""

from __future__ import annotations

import pytest
import torch

from immunity import losses
from immunity.batch import IGNORE
from immunity.errors import SettingsError
from immunity.losses import nll
from immunity.models import LoRA, attach
from immunity.reference import Reference, kl
from immunity.testing import tiny
from immunity.testing.watch import InjectedError, mark, picture, require_same
from immunity.theta import Theta

ROWS = tiny.batch(4)


def adapted(targets="all-linear"):
    return attach(tiny.language_model(), LoRA(r=4, targets=targets))


def train(network: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in network.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))


MAKERS = {
    "full": tiny.gpt2,
    "llama": tiny.llama,
    "lora": lambda: adapted().network,
    "bf16-lora": lambda: attach(tiny.language_model(tiny.llama(dtype=torch.bfloat16)), LoRA(r=4)).network,
}
KINDS = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@KINDS
def test_it_says_what_the_model_said_before_however_it_is_trained(make):
    network = make()
    reference, before = Reference(network), nll(network, ROWS).detach()
    then = reference.at(nll)
    assert torch.equal(then(network, ROWS), before)
    train(network)
    assert torch.equal(then(network, ROWS), before)
    assert not torch.allclose(nll(network, ROWS), before, atol=1e-3)
    assert not then(network, ROWS).requires_grad


@KINDS
def test_weights_hooks_flags_and_modes_are_as_found_also_after_a_fault(make):
    network = make()
    reference = Reference(network)
    train(network)
    next(p for p in network.parameters() if p.requires_grad).requires_grad_(False)  # peft would switch it on again
    for i, module in enumerate(network.modules()):
        module.training = i % 3 == 0
    found = picture(network)
    reference.at(nll)(network, ROWS)
    require_same(found, network, "Reference.at")

    def fails():
        with reference.standing():
            raise InjectedError("inside")

    with pytest.raises(InjectedError):
        fails()
    require_same(found, network, "Reference.standing, after a fault")
    assert torch.is_grad_enabled()


def test_over_a_fresh_adapter_nothing_is_copied():
    network = adapted().network
    reference = Reference(network)
    assert reference.copied == 0
    with reference.standing() as before:
        assert before is network


def test_an_adapter_that_was_trained_before_is_copied_and_the_base_under_it_is_shared():
    network = adapted().network
    train(network)
    reference, before = Reference(network), nll(network, ROWS).detach()
    train(network)
    assert torch.equal(reference.at(nll)(network, ROWS), before)
    trainable = [p for p in network.parameters() if p.requires_grad]
    assert reference.copied == sum(p.nbytes for p in trainable)
    with reference.standing() as copied:
        mine = {p.data_ptr() for p in network.parameters()}
        others = [p for p in copied.parameters() if p.data_ptr() not in mine]
    assert sum(p.nbytes for p in others) == reference.copied
    assert not any(p.requires_grad for p in copied.parameters())
    assert all(p.requires_grad for p in trainable)


def test_a_copy_of_all_weights_takes_no_gradients_with_it():
    model = tiny.language_model()
    mark(model)
    reference = Reference(model.network)
    with reference.standing() as copied:
        assert all(p.grad is None and not p.requires_grad for p in copied.parameters())
    assert reference.copied == sum(p.nbytes for p in model.network.parameters())
    tied = tiny.llama(tied=True)
    with Reference(tied).standing() as copied:
        assert copied.lm_head.weight is copied.model.embed_tokens.weight


def slow_kl(before, network, direction: str) -> torch.Tensor:
    out = []
    for row in ROWS.rows:
        ids = torch.tensor([row.ids])
        p, q = (model(ids).logits[0].log_softmax(-1) for model in (before, network))
        if direction == "reverse":
            p, q = q, p
        asked = [t - 1 for t in range(1, len(row.ids)) if row.labels[t] != IGNORE]
        out.append((p.exp() * (p - q)).sum(-1)[asked].mean())
    return torch.stack(out)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("micro", [None, 1])
def test_kl_is_that_of_explicit_loops_in_value_and_gradient(direction, micro, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 5 * tiny.SMALL_VOCAB)  # chunks, run again by the backward pass
    before, network = tiny.gpt2(), tiny.gpt2()
    reference = Reference(network)
    train(network)
    wanted = slow_kl(before, network, direction)
    theta = Theta(network, micro_batch=micro)
    assert theta.value(kl(reference, direction), ROWS) == pytest.approx(float(wanted.mean().detach()), rel=1e-12)
    want = torch.autograd.grad(wanted.mean(), theta.parameters)
    got = theta.grad(kl(reference, direction), ROWS).tensors()
    error = torch.stack([(a - b).norm() for a, b in zip(got, want, strict=True)]).norm()
    assert error < 1e-11 * torch.stack([b.norm() for b in want]).norm()


@KINDS
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_where_nothing_has_changed_kl_and_its_gradient_are_0(make, direction):
    network = make()
    theta, loss = (
        Theta(network, autocast=torch.bfloat16 if make is tiny.llama else None),
        kl(Reference(network), direction),
    )
    scale = theta.grad(nll, ROWS).norm()
    assert theta.value(loss, ROWS) == pytest.approx(0.0, abs=1e-6)
    assert theta.grad(loss, ROWS).norm() < 1e-5 * scale
    train(network)
    assert theta.value(loss, ROWS) > 1e-4


def test_there_are_two_directions():
    with pytest.raises(SettingsError, match="sideways"):
        kl(Reference(tiny.gpt2()), "sideways")
