"""One block by itself, edits at some positions: what is kept, what moves, what is merged, what is left as found."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from immunity.adapters import trained as opened
from immunity.batch import IGNORE
from immunity.blocks import blocks
from immunity.blockwise import Block, LowRank, coordinates, prompts, trainable_linear, treatable
from immunity.errors import ModelError
from immunity.fit import Fit
from immunity.hidden import Site, calls, reading, replacing
from immunity.interventions import descend, fresh, low_rank, trained
from immunity.losses import Loss, nll, response_states
from immunity.models import LoRA, attach
from immunity.patches import patched
from immunity.testing import tiny
from immunity.testing.watch import InjectedError, mark, picture, require_same
from immunity.theta import Theta
from immunity.transforms import edited

BATCH = tiny.batch(4, seed=3, role="harmful", lengths=(6, 14))
ROWS = prompts(BATCH)


def gpt2():
    return tiny.gpt2(torch.float32)


def adapted():
    return attach(tiny.language_model(), LoRA(r=2)).network


FAMILIES = pytest.mark.parametrize("make", [tiny.llama, gpt2, adapted])


def edit(network, seed=0, size=0.3):
    draw = torch.Generator().manual_seed(seed)
    width = network.config.hidden_size
    w1, w2 = (size * torch.randn(2, width, generator=draw) for _ in range(2))
    return low_rank(w1, w2, torch.zeros(2))


def nothing(h):
    return h


def kept(network, layer=0, **how):
    block, theta = Block(network, layer), Theta(network, **how)
    block.keep(theta, ROWS)
    return block, theta


def test_prompts_keep_the_prompt_and_one_token_of_the_answer():
    for row, whole in zip(ROWS.rows, BATCH.rows, strict=True):
        n = whole.labels.count(IGNORE)
        assert row.ids == whole.ids[: n + 1]
        assert row.labels == whole.labels[: n + 1]


@FAMILIES
@pytest.mark.parametrize("layer", [0, 1])
def test_a_block_called_again_gives_what_it_gave_and_its_own_answer_to_other_states(make, layer):
    network = make()
    places = (Site(layer, "attention"), Site(layer, "mlp"), Site(layer, "output"))
    f = edit(network)
    with torch.no_grad():
        with calls(network, layer) as called, reading(network, places) as first:
            response_states(network, BATCH)
        clean = dict(first)
        with replacing(network, {Site(layer, "input"): f}), reading(network, places) as other:
            response_states(network, BATCH)
        attacked = dict(other)
        args, kwargs = called[-1]
        for states, wanted in ((args[0], clean), (f(args[0]), attacked)):
            with reading(network, places) as again:
                blocks(network)[layer](states, *args[1:], **kwargs)
            for place in places:
                torch.testing.assert_close(again[place], wanted[place], atol=1e-6, rtol=1e-5)


@FAMILIES
def test_without_an_edit_and_without_a_change_the_loss_is_0_bit_for_bit(make):
    network = make()
    block, theta = kept(network)
    assert theta.value(block.neutral([nothing], reg=1.0), ROWS) == 0.0
    assert theta.value(block.neutral([edit(network)], reg=1.0), ROWS) > 0.0


@pytest.mark.parametrize("make", [tiny.llama, gpt2])
@pytest.mark.parametrize("quirks", [False, True])
def test_merged_it_computes_what_it_computed_as_a_patch_and_the_released_code_does_not(make, quirks):
    network = make()
    torch.manual_seed(0)
    low = LowRank(network, 1, 2, quirks=quirks)
    with torch.no_grad():
        for p in low.factors.values():
            p.add_(0.2 * torch.randn(p.shape))
    with torch.no_grad(), patched(network, low.patches()):
        wanted = network(torch.tensor([BATCH.rows[0].ids])).logits
    low.merge()
    with torch.no_grad():
        found = network(torch.tensor([BATCH.rows[0].ids])).logits
    assert torch.allclose(found, wanted, atol=1e-4) != quirks


def test_the_quirk_doubles_attention_alone_and_starts_from_noise():
    network = tiny.llama()
    torch.manual_seed(0)
    low = LowRank(network, 0, 2, quirks=True)
    for name, patch in low.patches().items():
        share = patch.v / low.factors[f"{name}.v"]
        assert torch.allclose(share, torch.full_like(share, 0.5 if "self_attn" in name else 1.0))
    assert all(bool(p.any()) for p in low.factors.values())
    assert low.factors["model.layers.0.self_attn.q_proj.u"].std() < 0.03
    start = LowRank(network, 0, 2).factors
    assert not any(p.any() for name, p in start.items() if name.endswith(".v")), "Δ is 0"


@pytest.mark.parametrize("make", [tiny.llama, gpt2])
def test_a_patch_is_on_every_linear_layer_of_its_block_and_nowhere_else(make):
    network = make()
    low = LowRank(network, 1, 2)
    layers = {name.rpartition(".")[0] for name in low.factors}
    assert layers == set(trainable_linear(network, 1)) == set(low.patches())
    assert all(".1." in name for name in layers)
    assert len(layers) == (7 if make is tiny.llama else 4)
    with pytest.raises(ModelError, match="no block 9"):
        trainable_linear(network, 9)


@FAMILIES
def test_no_gradient_leaves_the_block_and_the_intervention_is_a_constant(make):
    network = make()
    w1, w2 = (nn.Parameter(0.1 * torch.ones(2, network.config.hidden_size)) for _ in range(2))
    block, _ = kept(network, layer=1)
    for p in network.parameters():
        p.grad = None
    block.neutral([low_rank(w1, w2, torch.zeros(2))], 1.0)(network, ROWS).sum().backward()
    inside = set(coordinates(network, 1))
    moved = {name for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved
    assert moved <= inside
    assert w1.grad is None
    assert w2.grad is None


def test_training_it_makes_the_edit_get_through_less_and_leaves_the_rest_alone():
    network = tiny.llama()
    block, theta = kept(network)
    f, low = edit(network, size=0.1), LowRank(network, 0, 4)
    start = theta.value(block.neutral([f], 0.0), ROWS)

    descend(network, block.neutral([f], 0.3, low.patches), [ROWS], Fit(steps=60, lr=1e-2), low.factors)
    low.merge()
    assert theta.value(block.neutral([f], 0.0), ROWS) < 0.3 * start
    assert theta.value(block.neutral([nothing], 0.0), ROWS) < 0.3 * start


@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_change_nothing(size):
    network = tiny.gpt2()
    w = torch.randn(2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    f = low_rank(w, w, torch.zeros(2, dtype=torch.float64))
    whole, split = (
        theta.grad(block.neutral([f], 0.5), ROWS) for block, theta in (kept(network), kept(network, micro_batch=size))
    )
    assert (whole - split).norm() < 1e-9 * whole.norm()


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_checkpointing_it_is_the_same(reentrant):
    network = tiny.llama()
    f = edit(network)
    w1, w2 = (nn.Parameter(0.1 * torch.randn(2, 32, generator=torch.Generator().manual_seed(k))) for k in (1, 2))
    attacked = edited(nll, {Site(1, "input"): low_rank(w1, w2, torch.zeros(2))}, "prompt")

    def found():
        block, theta = kept(network)
        trained = Theta(network, trainable={"w1": w1, "w2": w2})
        return theta.grad(block.neutral([f], 0.5), ROWS), trained.grad(attacked, BATCH)

    wanted = found()
    network.train()
    network.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for a, b in zip(found(), wanted, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


@FAMILIES
def test_keeping_and_edits_leave_everything_as_found_also_after_an_exception(make):
    network = make()
    mark(tiny.language_model(network))
    before = picture(network)
    block, theta = kept(network)
    assert theta.trace == {}
    theta.value(block.neutral([edit(network)], 1.0), ROWS)
    theta.value(edited(nll, {Site(0, "input"): edit(network)}, "prompt"), BATCH)
    require_same(before, network, "a block by itself")

    def fail(_h):
        raise InjectedError

    for loss, rows in ((block.neutral([fail], 1.0), ROWS), (edited(nll, {Site(0, "input"): fail}), BATCH)):
        with pytest.raises(InjectedError):
            theta.value(loss, rows)
        require_same(before, network, "an exception in an edit")
    with pytest.raises(InjectedError), calls(network, 0):
        raise InjectedError
    require_same(before, network, "an exception while calls are noted")


def test_an_edit_acts_at_its_positions_alone():
    network, place = tiny.llama(), Site(0, "input")
    seen = []

    def look(inner, rows):
        with reading(inner, [place]) as found:
            response_states(inner, rows)
        seen.append(found[place])
        return torch.zeros(len(rows))

    loss = Loss("look", look)
    with torch.no_grad():
        loss(network, BATCH)
        edited(loss, {place: lambda h: h + 1.0}, "prompt")(network, BATCH)
        edited(loss, {place: lambda h: h + 1.0})(network, BATCH)
    padded = BATCH.padded()
    there, asked = padded.attention_mask.bool(), padded.labels != IGNORE
    for added, here in ((seen[1] - seen[0], there & ~asked), (seen[2] - seen[0], there)):
        torch.testing.assert_close(added, here[..., None].float().expand_as(added))


def test_a_trained_intervention_does_what_it_was_trained_for_and_nothing_else_moves():
    model = tiny.language_model(tiny.llama(seed=1))
    before, place = picture(model.network), Site(0, "input")
    torch.manual_seed(0)
    w1, w2 = fresh(model, 32, 2)
    assert w1.any()
    assert not w2.any(), "it does nothing yet"
    found = trained(model, place, [BATCH], 2, Fit(steps=30, lr=1e-2))
    require_same(before, model.network, "training an intervention")
    theta = Theta(model.network)
    assert theta.value(edited(nll, {place: found}, "prompt"), BATCH) < theta.value(nll, BATCH) - 0.05


def test_which_blocks_can_be_treated():
    assert treatable(tiny.llama(layers=3)) == (0, 1, 2)
    assert treatable(adapted()) == (0, 1)
    model = opened(tiny.language_model(tiny.llama(layers=3)), "full", r=1, seed=0, layers="1,2")
    assert treatable(model.network) == (1, 2)
    assert treatable(tiny.llama().requires_grad_(False)) == ()
