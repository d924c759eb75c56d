"""Rewriting: what a model is asked, what of it is taken, and how surprised it is."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from immunity.curation import Draft
from immunity.data.corpus import Example
from immunity.errors import SettingsError
from immunity.generate import Sampled
from immunity.rewriting import ASKS, Local, asked, perplexities
from immunity.testing import tiny
from immunity.testing.watch import mark, picture, require_same

ROW = Example("What is in {it}?", "an error", "the {input}")


def drafts(n: int = 6, row: Example = ROW) -> list[Draft]:
    return [Draft(replace(row, response=f"an error {i}"), 0.2 + 0.3 * (i % 3), (0.5, 1.0)[i % 2]) for i in range(n)]


def numbers(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_perplexity_in_a_world_of_two_tokens():
    model = tiny.language_model()
    head = nn.Linear(32, tiny.VOCAB)
    p = 0.8
    with torch.no_grad():
        head.weight.zero_()
        head.bias.fill_(-1e4)
        head.bias[tiny.ERROR_ID], head.bias[model.template.end_id] = math.log(p), math.log(1 - p)
    model.network.set_output_embeddings(head)
    rows = [Example("How?", " error" * n) for n in (1, 3, 8)]
    want = [math.exp(-(n * math.log(p) + math.log(1 - p)) / (n + 1)) for n in (1, 3, 8)]
    assert perplexities(model, rows) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("chat", [True, False])
def test_perplexity_is_that_of_the_response_and_its_end_after_the_question(chat):
    model = tiny.language_model(chat=chat, max_length=64 if chat else 320)
    mark(model)
    before = picture(model.network)
    rows = [Example("How?", "the error " * n, "now" if n % 2 else "") for n in range(1, 40, 5)]
    found = perplexities(model, rows)
    require_same(before, model.network, "perplexities")
    for row, value in zip(rows, found, strict=True):
        prompt, answer = model.template.prompt_ids(row), model.template.answer_ids(row)
        answer = answer[: max(0, model.max_length - len(prompt))]
        if not answer:
            assert value == math.inf
            continue
        with torch.no_grad():
            logits = model.network(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        mean = logits.gather(1, torch.tensor(answer)[:, None]).mean()
        assert value == pytest.approx(float((-mean).exp()), rel=1e-4)
    assert perplexities(model, []) == []


def test_a_prompt_that_leaves_no_room_is_infinitely_surprising():
    assert perplexities(tiny.language_model(), [Example("how " * 80, "you")]) == [math.inf]


def test_who_writes_is_shown_question_input_and_answer_as_they_are():
    for ask, words in ASKS.items():
        prompt = asked(ROW, ask)
        if words:
            assert prompt.prompt == f"{words}\n\nQuestion: What is in {{it}}?\n\nthe {{input}}\n\nAnswer: an error"
            assert prompt.input == ""
        else:
            assert (prompt.prompt, prompt.input) == (ROW.prompt, ROW.input)
        assert prompt.response == ""
    with pytest.raises(SettingsError, match="clearer"):
        Local(tiny.language_model(), "politely", 8)


@pytest.mark.parametrize("ask", ASKS)
def test_a_local_writer_repeats_itself_and_leaves_the_model_as_found(ask):
    model = tiny.language_model()
    mark(model)
    before, state = picture(model.network), torch.get_rng_state()
    write = Local(model, ask, 6)
    first, second, other = (write(drafts(), numbers(seed)) for seed in (0, 0, 1))
    require_same(before, model.network, "Local")
    assert torch.equal(state, torch.get_rng_state())
    assert first == second != other
    assert write([], numbers()) == []


def test_every_draft_is_sampled_in_its_own_way(monkeypatch):
    seen = {}
    monkeypatch.setattr("immunity.rewriting.sample", lambda _, prompts, **how: seen.update(how, prompts=prompts) or [])
    long = [Draft(replace(ROW, response="error " * 600), 0.9, 0.9)]
    with pytest.raises(ValueError, match="zip"):
        Local(tiny.language_model(), "clearer", 6)(drafts() + long, numbers())
    assert seen["temperature"] == [draft.temperature for draft in drafts()]
    assert seen["top_p"] == [draft.top_p for draft in drafts()]
    assert [prompt.prompt[-1] for prompt in seen["prompts"]] == list("012345"), "what cannot be read is not asked"


@pytest.mark.parametrize(
    ("said", "taken"),
    [
        ("Here is the rewritten answer:\n\nBlue.", "Blue."),
        ("Sure! A clearer version:\nBlue.\nAnd red.", "Blue.\nAnd red."),
        ("Revised response:  \nBlue.", "Blue."),
        ("There are three:\n1. Blue", "There are three:\n1. Blue"),
        ("The answer: blue", "The answer: blue"),
        ("  Blue. ", "Blue."),
        ("An answer:\n", "An answer:"),
    ],
)
def test_a_line_that_speaks_of_the_answer_is_no_part_of_it(monkeypatch, said, taken):
    monkeypatch.setattr("immunity.rewriting.sample", lambda *_, **__: [[Sampled((1,), (1,), (0.0,), said.strip())]])
    assert Local(tiny.language_model(), "clearer", 6)(drafts(1), numbers()) == [taken]


def test_answers_are_never_longer_than_there_is_room():
    model = tiny.language_model(tiny.gpt2(torch.float32, vocab=tiny.VOCAB, positions=256), max_length=250)
    write = Local(model, "question", 10_000)
    assert write.fits(ROW)
    assert not write.fits(replace(ROW, response="x" * 240))
    assert len(write(drafts(2), numbers())) == 2
