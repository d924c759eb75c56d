"""The lens against full logits, forward passes that end early, and what a depth's logits cost."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from immunity.batch import IGNORE
from immunity.early import final_norm
from immunity.errors import ModelError
from immunity.hidden import Site, reading
from immunity.lens import check_norm, passed, saying, stream
from immunity.models import LoRA, attach
from immunity.testing import tiny
from immunity.testing.watch import picture, require_same


@pytest.mark.parametrize("network", [tiny.gpt2(), tiny.llama(), tiny.llama(tied=True)], ids=["gpt2", "llama", "tied"])
def test_equals_the_cross_entropy_of_full_logits_and_so_does_its_gradient(network):
    padded = tiny.batch(3).padded()
    keep = padded.labels[:, 1:] != IGNORE
    with reading(network, stream(network)) as seen:
        out = network(padded.input_ids, attention_mask=padded.attention_mask, output_hidden_states=True)
    norm, head = final_norm(network), network.get_output_embeddings()
    for j, site in enumerate(stream(network)):
        h = seen[site]
        if j < 2:
            assert torch.equal(h, out.hidden_states[j])
        logits = head(norm(h))
        want = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), padded.labels[:, 1:], reduction="none")[keep]
        got = saying(network, h, padded.labels, norm)
        assert torch.allclose(got, want, rtol=1e-5 if h.dtype == torch.float32 else 1e-12)
        a, b = (torch.autograd.grad(x.mean(), head.weight, retain_graph=True)[0] for x in (got, want))
        assert torch.allclose(a, b, atol=1e-6 if h.dtype == torch.float32 else 1e-12)
    own = saying(network, out.hidden_states[-1], padded.labels)
    assert torch.allclose(own, saying(network, seen[Site(1, "output")], padded.labels, norm), rtol=1e-5)
    assert own.dtype == out.logits.dtype


def test_the_forward_pass_keeps_no_logits():
    network, padded, sizes = tiny.llama(vocab=2048), tiny.batch(4).padded(), []

    def pack(t: torch.Tensor) -> torch.Tensor:
        sizes.append(t.numel())
        return t

    h = torch.randn(*padded.input_ids.shape, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        saying(network, h, padded.labels, final_norm(network))
    assert max(sizes, default=0) <= h.numel()


def test_a_pass_ends_behind_the_last_block_that_is_read():
    network = tiny.llama(layers=4)
    padded, ran = tiny.batch(3).padded(), []
    hooks = [
        block.mlp.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(network.model.layers)
    ]
    before = picture(network)
    places = stream(network, 2)
    early = passed(network, padded, places)
    assert ran == [0, 1]
    with reading(network, places) as whole:
        network(padded.input_ids, attention_mask=padded.attention_mask)
    assert all(torch.equal(early[site], whole[site]) for site in places)
    ran.clear()
    passed(network, padded, stream(network))
    assert ran == [0, 1, 2, 3]
    require_same(before, network, "passes")
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("wrapped", [False, True])
def test_early_ends_and_checkpointing_give_the_same_gradient(wrapped):
    model = tiny.language_model(tiny.llama(layers=4))
    network = attach(model, LoRA(r=2)).network if wrapped else model.network
    padded = tiny.batch(3).padded()
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad and "layers.0" in name}

    def gradient() -> tuple[torch.Tensor, ...]:
        h = passed(network, padded, [Site(1, "output")])[Site(1, "output")]
        return torch.autograd.grad(h.square().mean(), list(trained.values()), allow_unused=True)

    want = gradient()
    network.gradient_checkpointing_enable({"use_reentrant": False})
    network.train()
    got = gradient()
    assert all(
        (a is None) == (b is None) and (a is None or torch.allclose(a, b)) for a, b in zip(got, want, strict=True)
    )


def test_a_fault_in_a_pass_comes_out_and_leaves_no_hook():
    network, padded = tiny.llama(layers=3), tiny.batch(2).padded()
    before = picture(network)
    with pytest.raises(IndexError):
        passed(network, padded._replace(input_ids=padded.input_ids + 10**6), stream(network, 1))
    require_same(before, network, "a fault")


def test_what_lies_between_the_last_block_and_the_head_must_be_the_norm():
    network, padded = tiny.llama(), tiny.batch(2).padded()
    last = Site(1, "output")
    with reading(network, [last]) as seen, torch.no_grad():
        out = network.model(padded.input_ids).last_hidden_state
    check_norm(network.model.norm, seen[last], out)
    with pytest.raises(ModelError, match="is not all that lies between the last block and the head"):
        check_norm(network.model.norm, seen[last], 1.01 * out)
