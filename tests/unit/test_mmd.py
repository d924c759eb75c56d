"""MMD: against its definition written with loops, its bounds, what it does not depend on, and what it costs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from immunity.mmd import FLOOR, mmd2, noise_mmd2, pooled, squared_distances
from immunity.testing import tiny


def cloud(n: int, d: int, seed: int, shift: float = 0.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype) + shift


def naive(x: torch.Tensor, y: torch.Tensor, kernel: str = "five", sigma: torch.Tensor | None = None) -> torch.Tensor:
    """The definition, over an [N, N, d] tensor of differences; ``sigma`` with its graph unless it is given."""
    z = torch.cat([x, y])
    d = ((z[:, None] - z[None, :]) ** 2).sum(-1)
    sigma = d.sum() / (len(z) ** 2 - len(z)) if sigma is None else sigma
    k = torch.exp(-d) if kernel == "one" else sum(torch.exp(-d / (sigma * 2.0**i)) for i in range(-2, 3))
    n = len(x)
    return k[:n, :n].mean() + k[n:, n:].mean() - k[:n, n:].mean() - k[n:, :n].mean()


def squared_mean(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """σ: the mean of the squared distances of all pairs of different rows, by a loop."""
    z = torch.cat([x, y]).detach()
    pairs = [((z[a] - z[b]) ** 2).sum() for a in range(len(z)) for b in range(len(z)) if a != b]
    return torch.stack(pairs).mean()


SIZES = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 9), st.integers(0, 10**6))
SHIFTS = st.sampled_from([0.0, 0.3, 3.0, 100.0])


@given(SIZES, SHIFTS, st.sampled_from(["five", "one"]))
@settings(deadline=None, max_examples=40)
def test_equals_the_definition_and_so_does_its_gradient(sizes, shift, kernel):
    n, m, d, seed = sizes
    x, y = cloud(n, d, seed).requires_grad_(), cloud(m, d, seed + 1, shift).requires_grad_()
    got = mmd2(x, y, kernel)
    want = naive(x, y, kernel, squared_mean(x, y))
    assert got.item() == pytest.approx(want.item(), abs=1e-10)
    for a, b in zip(torch.autograd.grad(got, (x, y)), torch.autograd.grad(want, (x, y)), strict=True):
        assert (a - b).abs().max() < 1e-10


@given(SIZES, SHIFTS)
@settings(deadline=None, max_examples=40)
def test_symmetric_bounded_and_blind_to_scale(sizes, shift):
    n, m, d, seed = sizes
    x, y = cloud(n, d, seed), cloud(m, d, seed + 1, shift)
    value = float(mmd2(x, y))
    assert 0.0 <= value < 10.0
    assert float(mmd2(y, x)) == pytest.approx(value, abs=1e-12)
    for scale in (1e-3, 7.0):
        assert float(mmd2(scale * x, scale * y)) == pytest.approx(value, abs=1e-9)


def test_equal_clouds_are_at_the_floor_and_far_ones_at_the_ceiling():
    same = torch.stack([mmd2(cloud(32, 256, s), cloud(32, 256, s + 100)) for s in range(8)]).mean()
    assert float(same) == pytest.approx(2 * FLOOR / 32, rel=0.05)
    assert float(same) == pytest.approx(0.2, abs=0.02)
    far = mmd2(1e-6 * cloud(32, 8, 0), 1e-6 * cloud(32, 8, 1, 1e9))
    assert float(far) == pytest.approx(7.71, abs=0.005)
    assert pytest.approx(5 - sum(math.exp(-(2.0**-i)) for i in range(-2, 3))) == FLOOR


def test_no_gradient_runs_through_the_bandwidth():
    x, y = cloud(5, 4, 0).requires_grad_(), cloud(5, 4, 1, 1.0)
    (found,) = torch.autograd.grad(mmd2(x, y), x)
    (through,) = torch.autograd.grad(naive(x, y), x)  # sigma with its graph
    (fixed,) = torch.autograd.grad(naive(x, y, sigma=squared_mean(x, y)), x)
    assert (found - fixed).norm() < 1e-12
    assert (found - through).norm() > 1e-2 * fixed.norm()  # the test can tell


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_equal_rows_give_0_and_a_finite_gradient(dtype, value):
    x = torch.full((3, 5), value, dtype=dtype, requires_grad=True)
    apart = mmd2(x, x.detach().clone())
    assert apart.item() == 0.0
    assert torch.equal(torch.autograd.grad(apart, x)[0], torch.zeros_like(x))


def test_two_equal_rows_among_others_have_no_distance_and_a_finite_gradient():
    x = cloud(4, 64, 0, 1e3, torch.float32)
    x = torch.cat([x, x[:1]]).requires_grad_()
    d = squared_distances(x)
    assert bool((d >= 0).all())
    assert torch.equal(d.diagonal(), torch.zeros(5))
    assert bool(torch.autograd.grad(mmd2(x, x[1:3]), x)[0].isfinite().all())


def test_what_all_states_share_does_not_drown_what_tells_them_apart():
    """In fp32 a common offset of 1e3 has a square of 1e8 for each feature: uncentred, distances of 2 would be lost."""
    x, y = cloud(8, 512, 0), cloud(8, 512, 1, 0.1)
    single = mmd2((x + 1e3).float(), (y + 1e3).float())
    assert single.dtype == torch.float32
    assert float(single) == pytest.approx(float(mmd2(x, y)), rel=1e-4)


def test_half_precision_and_autocast_compute_in_fp32():
    x, y = cloud(8, 64, 0, dtype=torch.bfloat16), cloud(8, 64, 1, 0.5, torch.bfloat16)
    want = mmd2(x.float(), y.float())
    with torch.autocast("cpu", torch.bfloat16):
        got = mmd2(x, y)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_memory_is_that_of_the_states_and_of_one_matrix():
    x, y = cloud(16, 1000, 0).requires_grad_(), cloud(16, 1000, 1).requires_grad_()
    sizes = []
    for of in (mmd2, naive):
        with Largest() as largest:
            of(x, y).backward()
        sizes.append(largest.elements)
    assert sizes == [32 * 1000, 32 * 32 * 1000]


class TestNoise:
    def test_is_the_mmd_to_noise_of_matching_shape_flattened(self):
        h = cloud(4, 6 * 5, 0).reshape(4, 6, 5)
        mask = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) < 0.5
        torch.manual_seed(2)
        got = noise_mmd2(h, mask)
        torch.manual_seed(2)
        noise = torch.randn_like(h)
        want = mmd2((h * mask[..., None]).flatten(1), (noise * mask[..., None]).flatten(1))
        assert float(got) == pytest.approx(float(want), abs=1e-12)

    def test_left_out_positions_have_no_say_even_as_nan(self):
        h, mask = cloud(4, 12, 0).reshape(4, 6, 2), torch.ones(4, 6, dtype=torch.bool)
        mask[:, 4:] = False
        values = []
        for filler in (0.0, 1e6, math.nan):
            torch.manual_seed(0)
            values.append(float(noise_mmd2(h.masked_fill(~mask[..., None], filler), mask)))
        assert len(set(values)) == 1

    @pytest.mark.parametrize("rows", [4, 8])
    def test_noise_is_at_the_floor_and_fresh_at_every_call(self, rows):
        torch.manual_seed(0)
        h = cloud(rows, 50 * 40, 7).reshape(rows, 50, 40)
        first, second = float(noise_mmd2(h)), float(noise_mmd2(h))
        assert first != second
        assert first == pytest.approx(2 * FLOOR / rows, rel=0.05)

    @pytest.mark.parametrize(("scale", "outwards"), [(0.5, True), (2.0, False)])
    def test_descent_leads_to_unit_variance(self, scale, outwards):
        h = (scale * cloud(8, 600, 7)).reshape(8, 30, 20).requires_grad_()
        torch.manual_seed(0)
        (g,) = torch.autograd.grad(noise_mmd2(h), h)
        assert (float((-g * h.detach()).sum()) > 0) == outwards


class TestPooled:
    def test_response_is_the_mean_over_its_tokens(self):
        batch = tiny.batch(5)
        labels = batch.padded().labels
        h = cloud(5, labels.shape[1] * 3, 0).reshape(5, -1, 3)
        found = pooled(h, labels)
        for i, row in enumerate(batch.rows):
            at = [t for t in range(len(row.ids)) if row.labels[t] != -100]
            assert torch.allclose(found[i], torch.stack([h[i, t] for t in at]).mean(0), atol=1e-14)

    def test_prompt_is_the_last_token_before_the_response(self):
        batch = tiny.batch(5)
        labels = batch.padded().labels
        h = cloud(5, labels.shape[1] * 3, 0).reshape(5, -1, 3)
        found = pooled(h, labels, "prompt")
        for i, row in enumerate(batch.rows):
            first = next(t for t in range(len(row.ids)) if row.labels[t] != -100)
            assert torch.equal(found[i], h[i, first - 1])
        whole = torch.arange(6).reshape(1, 6)  # no prompt at all
        assert torch.equal(pooled(h[:1, :6], whole, "prompt"), h[:1, 0])

    @pytest.mark.parametrize("over", ["response", "prompt"])
    def test_pads_change_nothing_even_as_nan(self, over):
        labels = torch.tensor([[-100, -100, 5, 6, -100, -100]])
        h = cloud(6, 3, 0).reshape(1, 6, 3)
        wild = h.clone()
        wild[:, 4:] = math.nan
        assert torch.equal(pooled(wild, labels, over), pooled(h[:, :4], labels[:, :4], over))

    def test_half_precision_is_averaged_in_fp32(self):
        h = torch.full((1, 300, 1), 1.0 + 2**-7, dtype=torch.bfloat16)
        assert pooled(h, torch.ones(1, 300, dtype=torch.int64)).dtype == torch.float32
        assert float(pooled(h, torch.ones(1, 300, dtype=torch.int64))) == pytest.approx(1.0078125, rel=1e-6)
