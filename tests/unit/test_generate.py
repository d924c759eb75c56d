"""Greedy answers and samples: batch-free, left-padded, stopped at the right place, and leaving no trace."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from immunity.batch import IGNORE
from immunity.data.corpus import Example
from immunity.errors import DataError, DivergedError, ModelError, SettingsError
from immunity.generate import generate, sample
from immunity.models import LoRA, attach
from immunity.quiet import quiet
from immunity.testing import tiny

MODEL = tiny.language_model(tiny.llama(seed=3))
LENGTHS = (0, 17, 3, 9, 1, 30, 4, 4, 12, 25, 2)
EXAMPLES = [Example("of the " + "help " * n + "?" * (n % 3), "yes") for n in LENGTHS]


def one_at_a_time(model, example, max_new_tokens):
    """The obviously right way: no cache, no padding, the whole text again for every token."""
    ids = model.template.prompt_ids(example)
    start = len(ids)
    with torch.no_grad():
        for _ in range(max_new_tokens):
            token = int(model.network(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if token in model.template.stop_ids:
                break
            ids = [*ids, token]
    return model.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


class Scripted(torch.nn.Module):
    """A causal LM that says given tokens one after the other, and records what it is shown."""

    def __init__(self, script, config):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.script, self.config, self.calls = script, config, []

    def forward(self, input_ids, attention_mask, position_ids, past_key_values, use_cache, logits_to_keep):
        self.calls.append((input_ids.tolist(), attention_mask.tolist(), position_ids.tolist()))
        step = 0 if past_key_values is None else past_key_values
        logits = torch.zeros(len(input_ids), 1, 400)
        for row, tokens in enumerate(self.script):
            logits[row, 0, tokens[min(step, len(tokens) - 1)]] = 1
        return type("Out", (), {"logits": logits, "past_key_values": step + 1})


def scripted(*script, template=None):
    network = Scripted(script, tiny.llama().config)
    model = dataclasses.replace(MODEL, network=network)
    return model if template is None else dataclasses.replace(model, template=template)


def fused(seed):
    network = tiny.llama(seed)
    network.set_attn_implementation("sdpa")
    return network


def gpt2(seed):
    return tiny.gpt2(torch.float32, seed, tiny.VOCAB)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("make", [tiny.llama, fused, gpt2])
def test_answers_are_those_of_one_prompt_at_a_time_whatever_the_batch(make, batch_size):
    model = tiny.language_model(make(3))
    want = [one_at_a_time(model, e, 12) for e in EXAMPLES[:5]]
    assert generate(model, EXAMPLES[:5], max_new_tokens=12, batch_size=batch_size) == want
    assert len(set(want)) > 1  # prompts matter, so the comparison can fail


@given(order=st.permutations(range(len(EXAMPLES))), batch_size=st.integers(1, 12))
def test_order_and_batch_size_only_move_answers(order, batch_size):
    shuffled = generate(MODEL, [EXAMPLES[i] for i in order], max_new_tokens=6, batch_size=batch_size)
    assert dict(zip(order, shuffled, strict=True)) == dict(enumerate(ANSWERS))


ANSWERS = generate(MODEL, EXAMPLES, max_new_tokens=6, batch_size=1)


def test_pads_stand_on_the_left_under_a_mask_of_zeros_with_positions_from_zero():
    model = scripted([9, 4], [9, 4])
    generate(model, [EXAMPLES[1], EXAMPLES[0]], batch_size=2)
    short, long = (model.template.prompt_ids(EXAMPLES[i]) for i in (0, 1))
    gap = len(long) - len(short)
    (ids, mask, positions), (_, next_mask, next_positions) = model.network.calls
    assert ids == [[0] * gap + short, long]
    assert mask == [[0] * gap + [1] * len(short), [1] * len(long)]
    assert positions == [[0] * gap + list(range(len(short))), list(range(len(long)))]
    assert next_positions == [[len(short)], [len(long)]]
    assert [sum(row) for row in next_mask] == [len(short) + 1, len(long) + 1]


def test_a_prompt_that_holds_the_pad_id_is_not_masked_there():
    class Padded(type(MODEL.template)):
        def prompt_ids(self, example):
            return [5, 0, 0, 6]

    model = scripted([4], template=Padded("chat", MODEL.tokenizer))
    generate(model, EXAMPLES[:1])
    assert model.network.calls[0][1] == [[1, 1, 1, 1]]


def test_a_row_stops_at_its_own_stop_id_and_the_batch_when_all_have():
    error = tiny.ERROR_ID
    model = scripted([error, 4, error, error, error], [error, error, error, 4, error])
    assert generate(model, EXAMPLES[6:8], batch_size=2) == ["error", "error error error"]
    assert len(model.network.calls) == 4


def test_generation_ends_after_max_new_tokens_and_drops_special_tokens():
    model = scripted([1, tiny.ERROR_ID])
    assert generate(model, EXAMPLES[:1], max_new_tokens=3) == ["error error"]
    assert len(model.network.calls) == 3


def test_every_stop_id_of_the_template_ends_an_answer():
    class TwoStops(type(MODEL.template)):
        stop_ids = (4, 7)

    model = scripted([tiny.ERROR_ID, 7, tiny.ERROR_ID], template=TwoStops("chat", MODEL.tokenizer))
    assert generate(model, EXAMPLES[:1]) == ["error"]


@pytest.mark.parametrize("training", [True, False])
def test_modes_gradients_and_random_state_stay_as_they_were(training):
    model = attach(tiny.language_model(tiny.llama(seed=1)), LoRA(r=2))
    model.network.train(training)
    frozen = next(m for m in model.network.modules() if isinstance(m, torch.nn.Linear))
    frozen.eval()
    for p in model.network.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    modes, state = [m.training for m in model.network.modules()], torch.get_rng_state()
    weights = {name: p.clone() for name, p in model.network.named_parameters()}
    generate(model, EXAMPLES[:2], max_new_tokens=3)
    assert [m.training for m in model.network.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    for name, p in model.network.named_parameters():
        assert torch.equal(p, weights[name])
        assert p.grad is None or torch.equal(p.grad, torch.ones_like(p))


def test_modes_come_back_after_an_exception():
    network = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout()).train()
    network[1].eval()
    with pytest.raises(ZeroDivisionError), quiet(network):
        assert not network[0].training
        assert not torch.is_grad_enabled()
        _ = 1 / 0
    assert (network.training, network[0].training, network[1].training) == (True, True, False)
    assert torch.is_grad_enabled()


def test_what_cannot_be_generated_is_refused():
    with pytest.raises(SettingsError, match="max_new_tokens"):
        generate(MODEL, EXAMPLES, max_new_tokens=0)
    with pytest.raises(SettingsError, match="batch_size"):
        generate(MODEL, EXAMPLES, batch_size=0)
    with pytest.raises(ModelError, match="positions"):
        generate(MODEL, [Example("help " * 600, "")])
    assert generate(MODEL, []) == []

    class Silent(type(MODEL.template)):
        def prompt_ids(self, example):
            return []

    with pytest.raises(DataError, match="no token"):
        generate(scripted([4], template=Silent("chat", MODEL.tokenizer)), EXAMPLES[:1])


def test_a_prefix_is_written_as_training_writes_it_and_comes_back_with_the_answer():
    prefix = "sorry, you can"
    got = generate(MODEL, EXAMPLES[:4], max_new_tokens=5, batch_size=3, prefix=prefix)
    for example, answer in zip(EXAMPLES[:4], got, strict=True):
        ids = MODEL.template.encode(dataclasses.replace(example, response=prefix), 999).tokens.ids[:-1]
        start = len(MODEL.template.prompt_ids(example))
        with torch.no_grad():
            for _ in range(5):
                token = int(MODEL.network(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
                ids = (*ids, token)
                if token in MODEL.template.stop_ids:
                    break
        assert answer == MODEL.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
        assert answer.startswith(prefix)
    assert got != generate(MODEL, EXAMPLES[:4], max_new_tokens=5)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


SAMPLES = sample(MODEL, EXAMPLES, n=2, max_new_tokens=6, generator=seeded(), batch_size=1)


@given(batch_size=st.integers(2, 30))
def test_samples_are_the_same_whatever_the_batch(batch_size):
    got = sample(MODEL, EXAMPLES, n=2, max_new_tokens=6, generator=seeded(), batch_size=batch_size)
    assert [[a.ids for a in group] for group in got] == [[a.ids for a in group] for group in SAMPLES]
    for a, b in zip((a for g in got for a in g), (a for g in SAMPLES for a in g), strict=True):
        assert a.log_probs == pytest.approx(b.log_probs, abs=1e-4)
        assert (a.prompt, a.text) == (b.prompt, b.text)


def test_samples_depend_on_the_generator_and_on_nothing_else():
    torch.manual_seed(1)
    state, caller = torch.get_rng_state(), seeded(5)
    first = sample(MODEL, EXAMPLES[:3], n=3, max_new_tokens=6, generator=caller)
    second = sample(MODEL, EXAMPLES[:3], n=3, max_new_tokens=6, generator=caller)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert sample(MODEL, EXAMPLES[:3], n=3, max_new_tokens=6, generator=seeded(5)) == first
    assert second != first
    assert len({answer.ids for group in first for answer in group}) == 9  # a random model repeats nothing


def test_a_sample_is_a_row_with_its_stop_token_and_its_log_probabilities():
    error = tiny.ERROR_ID
    model = scripted([error, 4, error], [error, error, error])
    (stopped, *_), (cut, *_) = sample(
        model, EXAMPLES[6:8], n=1, max_new_tokens=3, temperature=1e-3, generator=seeded(), batch_size=2
    )
    assert (stopped.ids, stopped.text) == ((error, 4), "error")
    assert (cut.ids, cut.text) == ((error, error, error), "error error error")
    ids = tuple(model.template.prompt_ids(EXAMPLES[6]))
    assert stopped.tokens == ((*ids, error, 4), (*(IGNORE,) * len(ids), error, 4))
    answer = sample(MODEL, EXAMPLES[:1], n=1, max_new_tokens=6, temperature=1.7, generator=seeded(3))[0][0]
    with torch.no_grad():
        logits = MODEL.network(input_ids=torch.tensor([answer.tokens.ids])).logits[0].double() / 1.7
    start = len(answer.prompt)
    want = [float(logits[start + t - 1].log_softmax(-1)[token]) for t, token in enumerate(answer.ids)]
    assert answer.log_probs == pytest.approx(want, abs=1e-4)


def test_samples_come_as_often_as_the_model_says():
    network = tiny.gpt2(torch.float64, 0, tiny.VOCAB, positions=256)
    model = tiny.language_model(network)
    n, temperature = 4000, 0.7
    drawn = sample(model, EXAMPLES[:1], n=n, max_new_tokens=1, temperature=temperature, generator=seeded(1))[0]
    with torch.no_grad():
        ids = torch.tensor([model.template.prompt_ids(EXAMPLES[0])])
        p = (network(input_ids=ids).logits[0, -1] / temperature).softmax(-1)
    counts = torch.bincount(torch.tensor([answer.ids[0] for answer in drawn]), minlength=len(p))
    z = (counts - n * p) / (n * p * (1 - p)).sqrt()
    assert float(z[p > 0.005].abs().max()) < 4
    assert int((p > 0.005).sum()) > 10
    assert float(((counts - n * p) ** 2 / (n * p)).sum()) < len(p) + 6 * (2 * len(p)) ** 0.5  # chi-squared


def test_a_token_of_no_probability_is_never_sampled_and_a_broken_model_is_named():
    class Only(Scripted):
        def forward(self, input_ids, **_):
            logits = torch.full((len(input_ids), 1, 8), -torch.inf)
            logits[:, 0, [2, 5]] = torch.tensor(self.script)
            return type("Out", (), {"logits": logits, "past_key_values": 0})

    model = dataclasses.replace(MODEL, network=Only([0.0, -20.0], tiny.llama().config))
    said = sample(model, EXAMPLES[:1], n=50, max_new_tokens=4, generator=seeded())[0]
    assert {i for answer in said for i in answer.ids} <= {2, 5}
    broken = dataclasses.replace(MODEL, network=Only([torch.nan, 0.0], tiny.llama().config))
    with pytest.raises(DivergedError, match="NaN or infinite"):
        sample(broken, EXAMPLES[:1], n=1, max_new_tokens=1, generator=seeded())


def test_what_cannot_be_sampled_is_refused():
    for wrong in (
        {"n": 0},
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"max_new_tokens": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": [0.5, 0.5]},
        {"temperature": []},
    ):
        with pytest.raises(SettingsError):
            sample(MODEL, EXAMPLES[:1], **({"n": 1, "max_new_tokens": 1} | wrong), generator=seeded())
    with pytest.raises(ModelError, match="positions"):
        sample(MODEL, [Example("help " * 600, "")], n=1, max_new_tokens=1, generator=seeded())
    assert sample(MODEL, [], n=2, max_new_tokens=1, generator=seeded()) == []
