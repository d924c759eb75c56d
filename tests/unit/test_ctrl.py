"""CTRL: which rows are rewritten, what is trained on, what is kept, and that all else is plain fine-tuning."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace

import pytest
import torch

from immunity.attacks.attack import Opening
from immunity.batch import Batch
from immunity.bench import standins
from immunity.bench.jobs import Hardening
from immunity.data.corpus import Corpus, Example
from immunity.data.refusal import is_refusal
from immunity.data.written import HARMLESS, MEASURED, shown
from immunity.errors import DataError, ModelError, SettingsError
from immunity.fit import Fit
from immunity.losses import nll
from immunity.method import Run, problems, token_sets
from immunity.methods import ctrl
from immunity.methods.ctrl import CTRL
from immunity.methods.sft import SFT
from immunity.models import load, save
from immunity.rewriting import perplexities
from immunity.testing import tiny
from immunity.testing.watch import bits
from immunity.theta import Theta

N = 40
CLEAN = Corpus(
    "alignment", tuple(Example(f"What is {i}?", f"It is the error {i}.") for i in range(N)), "synthetic:a", "CC0-1.0"
)
MIXED = Corpus(
    "alignment",
    tuple(Example(f"Can you {i}?", "Sorry, I cannot help." if i % 2 else f"you can, in {i}") for i in range(N)),
    "mine.jsonl",
)
DATA = {"alignment": (CLEAN, MIXED)}
FREE = CTRL(tau=0.0, temperatures=(0.2, 0.6), tokens=8)
"""Without a floor: a random model writes nothing that is good."""


def run(seed: int = 0, folder=None, observe=None, **how) -> Run:
    fit = Fit(**{"steps": 2, "lr": 1e-3, "seed": seed, **how})
    return Run(fit=fit, default_batch_size=4, folder=folder, observe=observe)


def rewritten(method: CTRL = FREE, data=DATA, seed: int = 0) -> tuple[Corpus, ...]:
    return method.rewrite(tiny.language_model(), data, run(seed))


def made(corpora: tuple[Corpus, ...], given=DATA["alignment"]) -> list[Example]:
    return [row for new, old in zip(corpora, given, strict=True) for row in new.examples[: len(new) - len(old)]]


def weights(model) -> list[bytes]:
    return [bits(p) for p in model.network.parameters()]


@pytest.mark.parametrize("share", [0.05, 0.25, 0.29, 0.5, 1.0])
def test_a_share_of_the_rows_that_are_no_refusals_is_rewritten(share, monkeypatch):
    seen = []
    real = ctrl.curate
    monkeypatch.setattr(ctrl, "curate", lambda rows, *of, **how: seen.extend(rows) or real(rows, *of, **how))
    new = made(rewritten(replace(FREE, share=share)))
    able = [row for corpus in DATA["alignment"] for row in corpus if not is_refusal(row.response)]
    assert len(able) == 60
    assert len(seen) == int(share * 60 + 1e-9) == len({row.prompt for row in seen})
    assert [row for row in able if row in seen] == seen, "in their order"
    assert 0 < len(new) <= len(seen)


def test_what_is_trained_on_is_what_was_given_and_the_rewritten_rows():
    corpora = rewritten()
    questions = {(row.prompt, row.input): row for corpus in DATA["alignment"] for row in corpus}
    for new, old in zip(corpora, DATA["alignment"], strict=True):
        assert new.examples[len(new) - len(old) :] == old.examples
        assert (new.role, new.licence) == ("alignment", old.licence)
        assert new.name == f"{old.name} ({len(new) - len(old)} rewritten)"
    for row in made(corpora):
        old = questions[row.prompt, row.input]
        assert row.response != old.response
        assert not is_refusal(old.response)
    kinds = [
        {row.tags.get(HARMLESS) for row in made((new,), (old,))}
        for new, old in zip(corpora, DATA["alignment"], strict=True)
    ]
    assert kinds == [{"yes"}, {None}], "only made-up rows may be shown"


def test_perplexity_under_the_model_falls_as_it_says_it_does():
    model = tiny.language_model()
    rows = made(rewritten())
    old = {row.prompt: row for corpus in DATA["alignment"] for row in corpus}
    before, after = perplexities(model, [old[row.prompt] for row in rows]), perplexities(model, rows)
    assert all(b < a for a, b in zip(before, after, strict=True))
    for name, values in (("before", before), ("after", after)):
        told = [float(row.tags[f"{MEASURED}log perplexity {name}"]) for row in rows]
        assert told == pytest.approx([math.log(value) for value in values], abs=1e-3)


def test_the_same_seed_rewrites_the_same_and_another_one_other_rows():
    prints = [[corpus.fingerprint for corpus in rewritten(seed=seed)] for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]


def test_share_0_is_sft_bit_for_bit_and_is_refused_as_such(monkeypatch):
    idle = CTRL(share=0.0, rounds=0, beam=0, temperatures=(), top_ps=())
    model = tiny.language_model()
    found = [problem.where for problem in problems(idle, model, DATA)]
    assert found == ["share", "rounds", "beam", "temperatures", "top_ps"]
    with pytest.raises(SettingsError, match="use --method sft for the baseline"):
        idle.immunise(model, DATA, run())
    for name in found:
        off = replace(FREE, **{name: getattr(idle, name)})
        assert off.rewrite(model, DATA, run()) == DATA["alignment"]
    monkeypatch.setattr(CTRL, "problems", lambda *_: [])
    ended = []
    for method in (CTRL(share=0.0), SFT()):
        model = tiny.language_model()
        method.immunise(model, DATA, run(steps=4))
        ended.append(weights(model))
    assert ended[0] == ended[1]


@pytest.mark.parametrize("mean", ["example", "token"])
def test_it_is_sft_on_what_it_wrote_and_its_gradient_is_another_one(mean):
    method = replace(FREE, mean=mean)
    model = tiny.language_model()
    corpora = method.rewrite(model, DATA, run())
    ended = []
    for trained, data in ((method, DATA), (SFT(mean=mean), {"alignment": corpora}), (SFT(mean=mean), DATA)):
        model = tiny.language_model()
        trained.immunise(model, data, run(steps=3))
        ended.append(weights(model))
    assert ended[0] == ended[1] != ended[2]
    theta = Theta(tiny.language_model().network)
    mine, theirs = (
        theta.grad(nll, Batch(tuple(row for tokens in token_sets(of, model) for row in tokens.rows)))
        for of in (corpora, DATA["alignment"])
    )
    assert float((mine - theirs).norm()) > 0.01 * float(theirs.norm())


def test_nothing_restricted_is_read():
    assert FREE.reads == CTRL.paper().reads == {"alignment": 1}
    assert FREE.mechanisms == ()


def test_gibberish_is_rejected_and_then_there_is_nothing_to_train_on(caplog):
    with pytest.raises(DataError, match=r"no answer was rewritten for the better.*[1-9]\d* of them too bad"):
        rewritten(replace(FREE, tau=0.9))
    with pytest.raises(DataError, match="is none: give more honest"):
        rewritten(replace(FREE, share=0.01))
    refusals = replace(MIXED, examples=MIXED.examples[1::2])
    with pytest.raises(DataError, match=r"of the 0 rows that may be rewritten \(of 20"):
        rewritten(FREE, {"alignment": refusals})
    with caplog.at_level(logging.INFO):
        rewritten()
    assert "answers were rewritten: perplexity" in caplog.text


def test_the_stand_ins_are_known_by_heart_and_that_is_said():
    data = {"alignment": tuple(replace(c, examples=c.examples[:60]) for c in standins.defence("umbra")["alignment"])}
    with pytest.raises(DataError, match="plain SFT"):
        CTRL(rounds=1, temperatures=(0.5,)).rewrite(load("tiny"), data, run())


class KilledError(BaseException):
    """As a kill."""


def test_a_run_that_is_killed_while_it_rewrites_ends_bit_for_bit_as_a_whole_one(tmp_path, monkeypatch):
    told: list[tuple[int, dict]] = []
    whole, broken = tiny.language_model(), tiny.language_model()
    FREE.immunise(whole, DATA, run(folder=tmp_path / "whole", observe=lambda done, of: told.append((done, dict(of)))))
    assert [now["rewritten"] for done, now in told if "to rewrite" in now] == [0, 8, 15]
    assert {done for done, now in told if "to rewrite" in now} == {0}

    class Dying(ctrl.Local):
        calls = 0

        def __call__(self, drafts, generator):
            Dying.calls += 1
            if Dying.calls == 3:
                raise KilledError
            return super().__call__(drafts, generator)

    real = ctrl.Local
    monkeypatch.setattr(ctrl, "Local", Dying)
    with pytest.raises(KilledError):
        FREE.immunise(broken, DATA, run(folder=tmp_path / "broken"))
    assert len(next((tmp_path / "broken" / "curated").iterdir()).read_text().splitlines()) == 8
    assert weights(broken) == weights(tiny.language_model())
    again: list[int] = []
    monkeypatch.setattr(ctrl, "Local", real)
    FREE.immunise(
        broken, DATA, run(folder=tmp_path / "broken", observe=lambda _, of: again.append(of.get("rewritten", -1)))
    )
    assert again[:2] == [8, 15]
    assert weights(broken) == weights(whole)
    files = [next((tmp_path / name / "curated").iterdir()) for name in ("whole", "broken")]
    assert files[0].name == files[1].name
    assert files[0].read_text() == files[1].read_text()
    other = replace(FREE, rounds=1)._place(whole, DATA["alignment"], run(folder=tmp_path))
    assert other.name != files[0].name, "other settings have a file of their own"


def test_the_record_says_what_was_changed(tmp_path):
    save(tiny.language_model(), tmp_path / "base")
    job = Hardening(
        name="tiny with CTRL",
        method=FREE,
        opening=Opening(source=str(tmp_path / "base"), device="cpu"),
        data=DATA,
        run=run(),
        folder=tmp_path / "run",
    )
    record = job(lambda *_: None)
    first, second = record["written"]
    assert first["measured"]["rows"] + second["measured"]["rows"] <= 15
    assert first["measured"]["log perplexity after"] < first["measured"]["log perplexity before"]
    assert 0 < first["measured"]["share of words changed"] <= 1
    assert first["shown"][0]["prompt"].startswith("What is")
    assert "Can you" not in json.dumps(second["shown"])
    assert shown(tmp_path / "run") == record["written"]


def test_another_model_may_write_and_judge(tmp_path, monkeypatch):
    save(tiny.language_model(tiny.llama(seed=5)), tmp_path / "writer")
    opened = []
    real = ctrl.Local
    monkeypatch.setattr(ctrl, "Local", lambda model, *of: opened.append(model) or real(model, *of))
    other = rewritten(replace(FREE, writer=str(tmp_path / "writer")))
    assert opened[0].source == str(tmp_path / "writer")
    assert [c.fingerprint for c in other] != [c.fingerprint for c in rewritten()]
    with pytest.raises(ModelError, match="nowhere"):
        rewritten(replace(FREE, writer=str(tmp_path / "nowhere")))


def test_the_settings_of_the_paper():
    paper = CTRL.paper()
    places = len(paper.temperatures) * len(paper.top_ps)
    assert places * (1 + (paper.rounds - 1) * paper.beam) == 325
    assert (paper.share, paper.tokens, paper.tau, paper.ask) == (0.25, 256, 0.9, "perspective")
    for wrong in (
        {"share": 1.2},
        {"share": -0.1},
        {"tau": 2.0},
        {"rounds": -1},
        {"beam": -1},
        {"tokens": 0},
        {"temperatures": (0.0,)},
        {"top_ps": (1.5,)},
        {"tau": float("nan")},
    ):
        with pytest.raises(SettingsError):
            CTRL(**wrong)


def test_a_model_that_cannot_rate_is_a_problem_unless_nobody_asks_it(monkeypatch):
    def refuse(_model):
        raise ModelError("cannot rate")

    monkeypatch.setattr(ctrl, "Helpfulness", refuse)
    model = tiny.language_model()
    assert [p.where for p in CTRL().problems(model)] == ["tau"]
    assert CTRL(tau=0.0).problems(model) == []
    assert CTRL(writer="another").problems(model) == []


def test_torch_s_numbers_stay_as_they_are():
    state = torch.get_rng_state()
    rewritten()
    assert torch.equal(state, torch.get_rng_state())
