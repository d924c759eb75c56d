"""RepNoise's gradient against autograd through the objective written with loops, on a two-layer float64 model."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.func import functional_call

import slow
from immunity.batch import IGNORE, Batch, Tokens
from immunity.errors import DataError, SettingsError
from immunity.losses import nll
from immunity.mechanisms import Conditioning, Representation, Unlearning
from immunity.methods.repnoise import RepNoise
from immunity.methods.sft import SFT
from immunity.mmd import FLOOR
from immunity.testing import tiny
from immunity.testing.watch import picture, require_same
from immunity.theta import Theta, Vector

DEPTHS = 3
"""Of a network of two blocks."""


@pytest.fixture
def network() -> torch.nn.Module:
    return tiny.gpt2()


def pairs(n: int = 4, seed: int = 1, *, prompt: int = 3) -> dict[str, Batch]:
    """Two answers to each of ``n`` prompts, of different lengths, and other rows to retain; some tokens coincide."""
    found: dict[str, list[Tokens]] = {"harmful": [], "safe": []}
    asked = tiny.batch(n, seed=seed, lengths=(prompt, prompt)).rows
    said = [tiny.batch(n, seed=seed + k, lengths=(3, 8)).rows for k in (10, 20)]
    for i in range(n):
        for role, rows in zip(found, said, strict=True):
            ids = asked[i].ids + rows[i].ids
            ids = (*ids[: prompt + 1], 7, *ids[prompt + 2 :])  # the second token of both answers is one and the same
            found[role].append(Tokens(ids, (IGNORE,) * prompt + ids[prompt:]))
    batches = {role: Batch(tuple(rows), role) for role, rows in found.items()}
    return {**batches, "alignment": tiny.batch(n, seed=seed + 30, role="alignment")}


def named(theta: Theta, vector: Vector) -> slow.Weights:
    return dict(zip(theta.names, vector.tensors(), strict=True))


def mask(row: Tokens, other: Tokens) -> list[bool]:
    """M, of the answer's positions: where the two rows differ; where only one of them goes on they do."""
    return [
        row.labels[t] != IGNORE and (t >= len(other.ids) or row.ids[t] != other.ids[t]) for t in range(len(row.ids))
    ]


def cross_entropies(logits: torch.Tensor, row: Tokens, m: list[bool], faithful: bool) -> list[torch.Tensor]:
    """One for each token of a row that differs; faithfully of logits times M, which are 0 where the query is masked."""
    found = []
    for t in range(1, len(row.ids)):
        if m[t]:
            z = logits[t - 1] * float(m[t - 1]) if faithful else logits[t - 1]
            found.append(-torch.log_softmax(z, -1)[row.ids[t]])
    return found


def mean(rows: list[list[torch.Tensor]], how: str) -> torch.Tensor:
    if how == "token":
        return torch.stack([value for row in rows for value in row]).mean()
    return torch.stack([torch.stack(row).mean() for row in rows]).mean()


def looked_into(network, at, row):
    """Of one row: logits, hidden states as transformers gives them, the last one before ν, and outputs of the MLPs."""
    mlps, raw = [], []
    hooks = [block.mlp.register_forward_hook(lambda _m, _a, out: mlps.append(out)) for block in network.transformer.h]
    hooks.append(network.transformer.ln_f.register_forward_pre_hook(lambda _m, args: raw.append(args[0])))
    out = functional_call(network, at, (torch.tensor([row.ids]),), {"output_hidden_states": True})
    for hook in hooks:
        hook.remove()
    return out.logits[0], [h[0] for h in out.hidden_states], raw[0][0], [m[0] for m in mlps]


def lens(network, at, h):
    head = {name.split(".")[-1]: at[name] for name in at if name.startswith("transformer.ln_f")}
    normed = torch.nn.functional.layer_norm(h, h.shape[-1:], head["weight"], head["bias"], network.transformer.ln_f.eps)
    return normed @ at["transformer.wte.weight"].T


def pairwise_mmd(xs: torch.Tensor, ys: torch.Tensor) -> torch.Tensor:
    z = torch.cat([xs, ys])
    d = ((z[:, None] - z[None]) ** 2).sum(-1)
    n, sigma = len(xs), d.detach().sum() / (len(z) ** 2 - len(z))
    k = sum(torch.exp(-d / (sigma * 2.0 ** (i - 2))) for i in range(5))
    return (k[:n, :n] + k[n:, n:] - k[:n, n:] - k[n:, :n]).mean()


def objective(network, at, data, method: RepNoise, drawn: list[int]) -> torch.Tensor:
    """The whole of it, with torch's random numbers where the noise is drawn."""
    harmful, safe = data["harmful"].rows, data["safe"].rows
    masks = [mask(h, s) for h, s in zip(harmful, safe, strict=True)]
    refused = [
        cross_entropies(looked_into(network, at, s)[0], s, mask(s, h), method.faithful)
        for h, s in zip(harmful, safe, strict=True)
    ]
    total = mean(refused, method.mean)
    if method.retain:
        total = total + method.retain * slow.mean_loss(network, at, data["alignment"], mean=method.mean)
    inside = [looked_into(network, at, row) for row in harmful]
    terms = []
    for j in drawn:
        if method.faithful:
            read = [lens(network, at, hs[j]) for _, hs, _, _ in inside]
        else:
            read = [lens(network, at, raw if j == DEPTHS - 1 else hs[j]) for _, hs, raw, _ in inside]
        rows = [cross_entropies(z, row, m, method.faithful) for z, row, m in zip(read, harmful, masks, strict=True)]
        terms.append(mean(rows, method.mean))
    said = sum(terms) * DEPTHS / len(drawn)
    if method.faithful:
        rows = [cross_entropies(z[0], row, m, True) for z, row, m in zip(inside, harmful, masks, strict=True)]
        said = said + mean(rows, method.mean)
    total = total - method.alpha * torch.log(1 + said / DEPTHS)
    width = max(len(row.ids) for row in harmful)
    apart = []
    for layer in range(2):
        noise = torch.randn(len(harmful), width, 16, dtype=torch.float64)
        states, kept = torch.zeros_like(noise), torch.zeros_like(noise)
        for i, (_, _, _, mlps) in enumerate(inside):
            for t in range(len(harmful[i].ids)):
                if masks[i][t]:
                    states[i, t], kept[i, t] = mlps[layer][t], noise[i, t]
        apart.append(pairwise_mmd(states.flatten(1), kept.flatten(1)))
    return total + method.beta * sum(apart) / len(apart)


CASES = [
    RepNoise(),
    RepNoise(beta=3.0),
    RepNoise.paper(),
    RepNoise.released(),
    RepNoise(faithful=True, beta=2.0, retain=0.5),
    RepNoise(mean="token", alpha=0.3, beta=1.0),
    RepNoise(alpha=2.0, beta=0.5, depths=2),
    RepNoise(alpha=2.0, beta=0.5, depths=2, faithful=True, mean="token"),
]


@pytest.mark.parametrize("method", CASES, ids=repr)
def test_equals_autograd_through_the_objective(network, method):
    data, at = pairs(), slow.weights(network)
    torch.manual_seed(4)
    drawn = list(range(DEPTHS)) if method.depths is None else torch.randperm(DEPTHS)[: method.depths].tolist()
    want = slow.gradient(objective(network, at, data, method, drawn), at)
    theta = Theta(network)
    torch.manual_seed(4)
    got = named(theta, method.gradient(theta, data))
    assert slow.relative_error(got, want) < 1e-8
    plain = SFT(mean=method.mean).gradient(theta, data)
    assert slow.relative_error(named(theta, plain), want) > 1e-2


def test_weights_flags_and_hooks_are_as_found_after_a_step(network):
    before = picture(network)
    RepNoise(beta=1.0).gradient(Theta(network), pairs())
    require_same(before, network, "a step")


def test_without_ascent_and_noise_it_is_sft_on_refusals(network):
    theta, data = Theta(network), pairs()
    rows = []
    for row, other in zip(data["safe"].rows, data["harmful"].rows, strict=True):
        rows.append(Tokens(row.ids, tuple(t if m else IGNORE for t, m in zip(row.ids, mask(row, other), strict=True))))
    plain = theta.grad(nll, Batch(tuple(rows), "safe"))
    off = RepNoise(alpha=0.0, beta=0.0, retain=0.0)
    got = off.gradient(theta, data)
    assert all(torch.equal(a, b) for a, b in zip(got.tensors(), plain.tensors(), strict=True))
    assert off.mechanisms == ()
    assert [problem.where for problem in off.problems(tiny.language_model())] == ["alpha"]
    both = replace(off, retain=1.0).gradient(theta, data)
    assert (both - got - SFT().gradient(theta, data)).norm() < 1e-12


def test_the_mask_of_a_pair_made_by_hand(network):
    """Prompt 5 6; answers 8 9 10 and 8 4 10 4 part at the second token, meet at the third, and one of them goes on."""
    harmful = Batch((Tokens((5, 6, 8, 9, 10), (IGNORE, IGNORE, 8, 9, 10)),), "harmful")
    safe = Batch((Tokens((5, 6, 8, 4, 10, 4), (IGNORE, IGNORE, 8, 4, 10, 4)),), "safe")
    met = {}

    class Seen(Theta):
        def grad(self, loss, batch):
            met[loss.name, batch.role] = [row.labels for row in batch.rows]
            return super().grad(loss, batch)

    RepNoise(retain=0.0).gradient(Seen(network), {"harmful": harmful, "safe": safe})
    no = IGNORE
    assert met == {("nll", "safe"): [(no, no, no, 4, no, 4)], ("repnoise", "harmful"): [(no, no, no, 9, no)]}


def test_where_the_query_is_masked_the_quirk_is_a_constant(network):
    """In the pair above every token that differs stands behind one that does not: ln V, and no gradient at all."""
    data = {
        "harmful": Batch((Tokens((5, 6, 8, 9, 10), (IGNORE, IGNORE, 8, 9, 10)),), "harmful"),
        "safe": Batch((Tokens((5, 6, 8, 4, 10, 4), (IGNORE, IGNORE, 8, 4, 10, 4)),), "safe"),
    }
    theta = Theta(network)
    quirk = RepNoise(retain=0.0, beta=0.0, faithful=True).gradient(theta, data)
    assert quirk.norm() == 0.0
    log_v = math.log(tiny.SMALL_VOCAB)
    trace = theta.clear()
    assert trace["nll/safe"] == trace["nll/harmful"] == pytest.approx(log_v, abs=1e-12)
    assert trace["lens/harmful"] == pytest.approx((DEPTHS + 1) / DEPTHS * log_v, abs=1e-12)
    assert RepNoise(retain=0.0, beta=0.0).gradient(theta, data).norm() > 0.1
    assert theta.trace["nll/safe"] != pytest.approx(log_v, abs=1e-3)


def test_pairs_that_do_not_differ_are_left_out(network):
    data, theta = pairs(), Theta(network)
    same = data["safe"].rows[1]
    twice = {
        "harmful": Batch((*data["harmful"].rows, same), "harmful"),
        "safe": Batch((*data["safe"].rows, same), "safe"),
    }
    with_it, without = (RepNoise(retain=0.0, beta=0.0).gradient(theta, d) for d in (twice, data))
    assert (with_it - without).norm() < 1e-12 * without.norm()
    one = Batch((same,), "safe")
    with pytest.raises(DataError, match="no safe answer of a batch differs"):
        RepNoise().gradient(theta, {**data, "harmful": one, "safe": one})
    with pytest.raises(SettingsError, match="4 rows of 'harmful' and 1 of 'safe' are no pairs"):
        RepNoise().gradient(theta, {**data, "safe": one})


def test_drawn_depths_are_an_unbiased_estimate_of_all(network):
    theta, data = Theta(network), pairs()
    RepNoise(beta=0.0).gradient(theta, data)
    whole = theta.clear()["lens/harmful"]
    seen = set()
    for seed in range(40):
        torch.manual_seed(seed)
        RepNoise(beta=0.0, depths=1).gradient(theta, data)
        seen.add(round(theta.clear()["lens/harmful"], 9))
    assert len(seen) == DEPTHS  # every depth is drawn some time
    assert sum(seen) / DEPTHS == pytest.approx(whole, rel=1e-7)


def test_gradient_checkpointing_changes_nothing(network):
    method = RepNoise(beta=1.0)
    torch.manual_seed(0)
    want = method.gradient(Theta(network), pairs())
    network.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(0)
    got = method.gradient(Theta(network.train()), pairs())
    assert (got - want).norm() < 1e-12 * want.norm()


def test_it_is_coupled_so_it_refuses_to_be_split(network):
    with pytest.raises(SettingsError, match=r"'repnoise' couples .* its 4 rows cannot be split"):
        RepNoise().gradient(Theta(network, micro_batch=2), pairs())


@pytest.mark.parametrize("method", [RepNoise(), RepNoise.released()], ids=repr)
def test_labels_are_whole_numbers_under_bf16(method):
    """Ids above 256 have no bf16 of their own: rounded labels would lead elsewhere than the gradient of fp32."""
    network = tiny.llama()
    rows = {role: tiny.batch(6, seed=i, role=role, vocab=tiny.VOCAB) for i, role in enumerate(method.reads)}
    rounded = {
        role: Batch(
            tuple(
                Tokens(
                    row.ids,
                    tuple(x if x == IGNORE else int(torch.tensor(float(x)).bfloat16()) % 384 for x in row.labels),
                )
                for row in batch.rows
            ),
            role,
        )
        for role, batch in rows.items()
    }
    method = replace(method, beta=0.0)
    single = method.gradient(Theta(network), rows)
    rounding = Theta(network, autocast=torch.bfloat16)
    half = method.gradient(rounding, rows)
    lens, value = rounding.trace["lens/harmful"], rounding.trace["repnoise/harmful"]
    assert lens != float(torch.tensor(lens).bfloat16())  # averaged over rows in fp32
    assert -math.log1p(lens) == pytest.approx(value, abs=1e-6)
    wrong = method.gradient(Theta(network), rounded)
    assert single @ half > 0.999 * single.norm() * half.norm()
    assert single @ wrong < 0.95 * single.norm() * wrong.norm()  # the test can tell


def test_mechanisms_say_where_noise_is():
    assert RepNoise().mechanisms == (Representation(layers="all"), Unlearning(), Conditioning())
    assert RepNoise(alpha=0.0).mechanisms == (Representation(layers="all"),)


def test_problems_are_found_before_compute():
    model = tiny.language_model()
    assert RepNoise(depths=3).problems(model) == []
    assert "depths = 4: the model has 3" in str(RepNoise(depths=4).problems(model)[0])


@pytest.mark.parametrize("settings", [{"alpha": -0.1}, {"beta": -1.0}, {"retain": -1.0}, {"depths": 0}], ids=str)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(SettingsError):
        RepNoise(**settings)


def taught(n: int, seed: int) -> dict[str, Batch]:
    """One refusal to all prompts; restricted answers are made of other tokens."""
    found: dict[str, list[Tokens]] = {"harmful": [], "safe": []}
    for row in tiny.batch(n, seed=seed, lengths=(9, 9), vocab=30).rows:
        found["harmful"].append(Tokens(row.ids, (IGNORE,) * 3 + row.ids[3:]))
        found["safe"].append(Tokens((*row.ids[:3], 40, 41, 42, 43), (IGNORE,) * 3 + (40, 41, 42, 43)))
    return {role: Batch(tuple(rows), role) for role, rows in found.items()}


@pytest.mark.parametrize("method", [RepNoise.paper(), RepNoise.released(), RepNoise(retain=0.0, depths=1)], ids=repr)
def test_after_50_steps_restricted_answers_are_lost_at_every_depth_and_refusals_learnt(method):
    network, log = tiny.gpt2(), []
    for step in range(50):
        theta = Theta(network)  # a new one each time: its log knows no displacement
        torch.manual_seed(step)
        theta.step(-0.1 * method.gradient(theta, taught(8, step % 4)).unit())
        log.append(theta.clear())
    first, last = log[0], log[48]  # on the same rows
    assert last["nll/safe"] < 0.7 * first["nll/safe"]
    assert last["lens/harmful"] > 1.5 * first["lens/harmful"]
    assert last["nll/harmful"] > 1.5 * first["nll/harmful"]
    assert last["nll/safe"] + last["repnoise/harmful"] < first["nll/safe"] + first["repnoise/harmful"]


def test_the_noise_alone_brings_the_mlps_nearer_to_noise():
    network, log = tiny.gpt2(), []
    method = RepNoise(alpha=0.0, beta=1.0, retain=0.0)
    for step in range(40):
        theta = Theta(network)
        torch.manual_seed(step)
        theta.step(-0.1 * method.gradient(theta, taught(8, step % 4)).unit())
        log.append(theta.clear()["noise-mmd/harmful"])
    assert log[-1] < 0.8 * log[0]
    assert log[-1] > 2 * FLOOR / 8  # it cannot reach 0
