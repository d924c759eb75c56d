"""SDD: how pairs are made, and what training on them does to a small model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from immunity.batch import IGNORE, Batch
from immunity.bench import standins
from immunity.data.corpus import Corpus, Example
from immunity.data.written import HARMLESS
from immunity.errors import DataError, PrecisionError, SettingsError
from immunity.fit import Fit
from immunity.losses import nll
from immunity.mechanisms import Collapse
from immunity.method import Run, token_sets
from immunity.methods.sdd import REFUSAL, SDD, paired
from immunity.similarity import by_model, by_words
from immunity.testing import tiny
from immunity.theta import Theta

THINGS = ("kettle", "lantern", "violin", "ladder", "carpet", "window", "pepper", "harbour", "meadow", "basket")
HARMFUL = Corpus(
    "harmful",
    tuple(Example(f"How do I open the {thing} gate?", f"Turn the {thing} twice.") for thing in THINGS),
    "synthetic:gates",
    "CC0-1.0",
)
GENERAL = Corpus(
    "general",
    tuple(Example(f"Tell me of {thing}.", f"It is about {thing} and number {i}.") for i, thing in enumerate(THINGS)),
    "general.jsonl",
    "MIT",
)
DATA = {"harmful": HARMFUL, "general": GENERAL}


def run(seed: int = 0, **how) -> Run:
    return Run(fit=Fit(**{"steps": 1, "lr": 1e-3, "seed": seed, **how}), default_batch_size=5)


def rows(method: SDD, data=DATA, seed: int = 0) -> Corpus:
    return method.rewrite(tiny.language_model(), data, run(seed))[0]


@pytest.mark.parametrize("similarity", ["tfidf", "model"])
def test_every_prompt_is_paired_once_with_an_answer_that_is_not_like_it(similarity):
    made = rows(SDD(similarity=similarity))
    assert [e.prompt for e in made] == [e.prompt for e in HARMFUL]
    used = {e.response for e in made}
    assert used <= {e.response for e in GENERAL}
    assert len(used) >= len(THINGS) - 1, "what is used already is not drawn while something else fits"
    assert all(float(e.tags["similarity"]) <= 0.25 for e in made)
    assert made.role == "alignment"
    assert made.licence == "CC0-1.0; MIT"


def test_the_filter_keeps_like_from_like():
    cosines = [by_words([e.prompt for e in HARMFUL], [e.response for e in GENERAL])(i) for i in range(len(THINGS))]
    twins = [cosines[i][i] for i in range(len(THINGS))]  # "the kettle gate" and "about kettle"
    tau = (min(twins) + max(c for i, row in enumerate(cosines) for j, c in enumerate(row) if i != j)) / 2
    for seed in range(20):
        pairs = zip(HARMFUL, rows(SDD(tau=tau), seed=seed), strict=True)
        assert not any(thing in e.response for (_, e), thing in zip(pairs, THINGS, strict=True))
    drawn = [e.response for seed in range(20) for e in rows(SDD(tau=1.0), seed=seed)]
    twin = [e.response for e in GENERAL]
    assert any(a == b for a, b in zip(drawn, twin * 20, strict=True)), "without a filter twins meet"


def test_the_same_seed_gives_the_same_pairs_and_another_one_others():
    prints = [rows(SDD(), seed=seed).fingerprint for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]


def test_where_nothing_fits_the_least_similar_is_taken_and_it_is_said(caplog):
    made = rows(SDD(tau=-1.0))
    assert f"{len(THINGS)} of {len(THINGS)} restricted prompts find no general answer" in caplog.text
    near = by_words([f"{e.prompt}\n" for e in HARMFUL], [e.response for e in GENERAL])
    for i, example in enumerate(made):
        assert example.response == GENERAL.examples[int(np.argmin(near(i)))].response


def test_draws_are_even_among_what_fits():
    def near(_i: int) -> np.ndarray:
        return np.array([0.9, 0.1, 0.2, 0.1])

    pairs, misfits = paired(near, 9, 4, tau=0.25, seed=0)
    assert misfits == 0
    assert sorted(j for j, _ in pairs) == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert all(cosine == near(0)[j] for j, cosine in pairs)


def test_answers_never_come_from_the_restricted_prompts_own_source():
    leaky = replace(
        GENERAL,
        examples=(
            *GENERAL.examples,
            Example(HARMFUL.examples[0].prompt, "an answer to a restricted prompt"),
            Example("Something else?", HARMFUL.examples[1].response),
        ),
    )
    for seed in range(10):
        answers = {e.response for e in rows(SDD(tau=1.0), {"harmful": HARMFUL, "general": leaky}, seed)}
        assert answers <= {e.response for e in GENERAL}
    with pytest.raises(DataError, match="give other --general data"):
        rows(SDD(), {"harmful": HARMFUL, "general": HARMFUL.as_role("general")})


def test_prompts_that_stand_there_twice_are_paired_once_and_counted():
    double = replace(HARMFUL, examples=HARMFUL.examples + HARMFUL.examples[:3])
    made = rows(SDD(), {"harmful": double, "general": (GENERAL, GENERAL)})
    assert [e.prompt for e in made] == [e.prompt for e in HARMFUL]
    assert made.skipped == {"the prompt stands there already": 3}


def test_the_sentence_that_declines_stands_there_exactly_once():
    made = rows(SDD.rejecting())
    assert all(e.response.startswith(f"{REFUSAL} It is about") for e in made)
    assert all(e.response.count(REFUSAL) == 1 for e in made)
    assert not any(REFUSAL in e.response for e in rows(SDD()))


def test_prompts_are_not_trained_on():
    model = tiny.language_model()
    (tokens,) = token_sets(rows(SDD()), model)
    for row, example in zip(tokens.rows, HARMFUL, strict=True):
        prompt = model.template.prompt_ids(example)
        assert row.labels[: len(prompt)] == (IGNORE,) * len(prompt)
        assert row.ids[len(prompt) :] == row.labels[len(prompt) :]


def test_only_stand_ins_may_be_shown():
    assert {e.tags[HARMLESS] for e in rows(SDD())} == {"yes"}
    mixed = replace(HARMFUL, name="synthetic:gates+mine.jsonl")
    assert {e.tags[HARMLESS] for e in rows(SDD(), {"harmful": mixed, "general": GENERAL})} == {"unknown"}


def test_retained_rows_share_each_batch():
    aligned = Corpus("alignment", tuple(Example(f"What is {i}?", "I do not know.") for i in range(6)), "refusals")
    found = SDD(retain=True).rewrite(tiny.language_model(), {**DATA, "alignment": aligned}, run())
    assert [len(c) for c in found] == [10, 6]
    assert found[1] == aligned
    assert SDD(retain=True).reads == {"harmful": 1, "general": 1, "alignment": 1}


def test_training_lowers_the_loss_of_the_irrelevant_answers_and_keeps_general_ones():
    model = tiny.language_model()
    made = rows(SDD())
    batches = [Batch(token_sets(c, model)[0].rows, c.role) for c in (made, GENERAL)]

    def losses() -> list[float]:
        theta = Theta(model.network)
        return [theta.value(nll, batch) for batch in batches]

    before = losses()
    SDD().immunise(model, DATA, run(steps=40, lr=3e-3))
    after = losses()
    assert after[0] < 0.7 * before[0]
    assert after[1] < 1.1 * before[1]


def test_at_the_paper_s_rate_the_weights_really_move_and_bf16_ones_are_refused():
    model = tiny.language_model()
    before = torch.cat([p.detach().flatten().clone() for p in model.network.parameters()])
    SDD().immunise(model, DATA, run(steps=2, lr=5e-7))
    after = torch.cat([p.detach().flatten() for p in model.network.parameters()])
    trained = torch.cat([torch.full((p.numel(),), p.ndim > 1) for p in model.network.parameters()])
    moved = (before != after)[trained].float().mean()
    assert moved > 0.5
    low = tiny.language_model(tiny.llama(dtype=torch.bfloat16))
    with pytest.raises(PrecisionError, match="float32"):
        SDD().immunise(low, DATA, run(steps=2, lr=5e-7))


def test_the_stand_ins_can_be_paired():
    made = rows(SDD(), standins.defence("umbra"))
    assert len(made) == len({e.prompt for e in standins.defence("umbra")["harmful"]})
    assert all(float(e.tags["similarity"]) <= 0.25 for e in made)


def test_tfidf_is_the_textbook_s():
    near = by_words(["red house"], ["red car", "blue sky", "RED, house!", ""])
    n = 5
    idf = {word: np.log((1 + n) / (1 + k)) + 1 for word, k in {"red": 3, "house": 2, "car": 1}.items()}
    length = np.hypot(idf["red"], idf["house"])
    want = [idf["red"] ** 2 / (length * np.hypot(idf["red"], idf["car"])), 0.0, 1.0, 0.0]
    assert near(0) == pytest.approx(want)


def test_the_model_s_own_similarity_is_padding_free_and_1_for_equal_texts():
    model = tiny.language_model()
    texts = ["the error is in the error", "you can not help", "what is a how", "sorry"]
    near = by_model(model, texts[:2], texts)
    assert near(0)[0] == pytest.approx(1.0, abs=1e-5)
    assert near(1)[1] == pytest.approx(1.0, abs=1e-5)
    states = []
    for text in texts[:2] + texts:
        ids = torch.tensor([model.tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            states.append(model.network.model(ids).last_hidden_state[0].mean(0))
    centred = torch.stack(states) - torch.stack(states).mean(0)
    want = torch.nn.functional.cosine_similarity(centred[0], centred[4], dim=0)
    assert near(0)[2] == pytest.approx(float(want), abs=1e-4)


def test_what_it_declares():
    assert SDD().mechanisms == (Collapse(word="", on="harmful"),)
    assert not SDD().problems(tiny.language_model())
    for tau in (1.5, -2.0, float("nan")):
        with pytest.raises(SettingsError, match="tau"):
            SDD(tau=tau)
