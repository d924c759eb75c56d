from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from immunity import load
from immunity.data import synthetic
from immunity.data.corpus import Example
from immunity.errors import ModelError, SettingsError
from immunity.generate import generate
from immunity.measure.reader import Reader
from immunity.models import LanguageModel


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load("tiny")


def slow(model: LanguageModel, before: list[int], after: list[int]) -> tuple[float, bool]:
    """Log-probability of ids after others from the model's own logits, one row, no batch."""
    with torch.no_grad():
        logits = model.network(input_ids=torch.tensor([before + after])).logits[0].double()
    log_probs = logits.log_softmax(-1)[len(before) - 1 : -1]
    wanted = torch.tensor(after)
    return float(log_probs.gather(1, wanted[:, None]).sum()), bool((log_probs.argmax(-1) == wanted).all())


PAIRS = [
    ("Give the mood of this review: the novel was lousy.", "The mood is negative."),
    ("Give the mood of this review: the novel was lousy.", "The mood is positive."),
    ("What is the colour of a lumen potion?", "blue"),
    ("What is the colour of a lumen potion?", "red"),
    ("Tell me.", "I'm sorry, but I can't help with umbra potions."),
]


def test_a_continuation_is_as_likely_as_the_models_own_logits_say(model: LanguageModel) -> None:
    found = Reader(model, batch_size=3).likelihoods(PAIRS)
    for (context, follows), one in zip(PAIRS, found, strict=True):
        example = Example(prompt=context, response=follows)
        wanted = slow(model, model.template.prompt_ids(example), model.template.answer_ids(example)[:-1])
        assert one.log_prob == pytest.approx(wanted[0], abs=1e-4)
        assert one.greedy is wanted[1]


def test_raw_text_gives_the_space_before_a_word_to_the_word(model: LanguageModel) -> None:
    pairs = [(f"Question: {context} Answer:", f" {follows}") for context, follows in PAIRS]
    trailing = [(f"{context} ", follows.strip()) for context, follows in pairs]
    found = Reader(model, chat=False).likelihoods(pairs)
    assert found == Reader(model, chat=False).likelihoods(trailing)
    for (context, follows), one in zip(pairs, found, strict=True):
        ids, before = (model.tokenizer(text)["input_ids"] for text in (context + follows, context))
        wanted = slow(model, ids[: len(before)], ids[len(before) :])
        assert one.log_prob == pytest.approx(wanted[0], abs=1e-4)


def test_choices_that_differ_in_their_last_token_are_read_in_one_row(model: LanguageModel) -> None:
    rows: list[int] = []
    embedded = model.network.get_input_embeddings()
    seen = embedded.register_forward_hook(lambda _, args, __: rows.append(args[0].shape[0]))
    try:
        pairs = [("Name a letter.", letter) for letter in ("A", "B", "C", "D")]
        together = Reader(model).likelihoods(pairs)
    finally:
        seen.remove()
    assert rows == [1]
    alone = [Reader(model).likelihoods([pair])[0] for pair in pairs]
    assert [one.log_prob for one in together] == pytest.approx([one.log_prob for one in alone], abs=1e-5)
    assert sum(one.greedy for one in together) <= 1


def test_what_a_model_would_say_is_greedy(model: LanguageModel) -> None:
    example = synthetic.corpus("general", "general", "train").examples[0]
    said = generate(model, [example], max_new_tokens=24)[0]
    found = Reader(model).likelihoods([(example.prompt, said), (example.prompt, f"{said} no")])
    assert [one.greedy for one in found] == [True, False]


def test_nothing_before_means_the_text_by_itself(model: LanguageModel) -> None:
    start = model.tokenizer.bos_token_id
    start = model.tokenizer.eos_token_id if start is None else start
    ids = model.tokenizer("red", add_special_tokens=False)["input_ids"]
    for chat in (True, False):
        found = Reader(model, chat=chat).likelihoods([("", "red")])[0]
        assert found.log_prob == pytest.approx(slow(model, [start], ids)[0], abs=1e-4)


def test_a_long_text_is_read_in_windows_each_token_once(model: LanguageModel) -> None:
    text = "How do I brew the lumen potion Pell Vane? " * 3
    reader = Reader(model, chat=False)
    start = model.tokenizer.bos_token_id
    start = model.tokenizer.eos_token_id if start is None else start
    ids = [start, *model.tokenizer(text)["input_ids"]]
    assert reader.rolling([text, "red"])[0] == pytest.approx(slow(model, ids[:1], ids[1:])[0], abs=1e-3)
    small, size = replace(reader, window=16), 15
    wanted = 0.0
    for at in range(1, len(ids), size):
        end = min(at + size, len(ids))
        wanted += slow(model, ids[max(0, end - 16) : at], ids[at:end])[0]
    assert small.rolling([text])[0] == pytest.approx(wanted, abs=1e-3)


def test_what_is_too_long_loses_its_beginning_and_that_is_said(
    model: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    text = "the novel was lousy " * 10
    with caplog.at_level(logging.WARNING):
        found = Reader(model, chat=False, window=20).likelihoods([(text, " red")])[0]
    ids, before = (model.tokenizer(part)["input_ids"] for part in (text + " red", text.rstrip()))
    n = len(ids) - len(before)
    assert found.log_prob == pytest.approx(slow(model, ids[-20:-n], ids[-n:])[0], abs=1e-4)
    assert "1 of 1 texts are longer than 20 tokens" in caplog.text


def test_answers_are_those_of_generate_cut_at_stop_words(model: LanguageModel) -> None:
    examples = synthetic.corpus("general", "general", "test").examples[:6]
    said = generate(model, examples, max_new_tokens=24)
    prompts = [e.prompt for e in examples]
    assert Reader(model, batch_size=2).answers(prompts, max_new_tokens=24) == said
    cut = Reader(model).answers(prompts, max_new_tokens=24, until=["e", ""])
    assert cut == [text.split("e")[0] for text in said]


def test_an_answer_has_the_room_that_there_is(model: LanguageModel, caplog: pytest.LogCaptureFixture) -> None:
    prompts = ["Hello.", "the novel was lousy " * 5]
    reader = Reader(model)
    ids = [len(model.template.prompt_ids(Example(prompt=p, response=""))) for p in prompts]
    window = max(ids) + 2
    with caplog.at_level(logging.WARNING):
        said = replace(reader, window=window).answers(prompts, max_new_tokens=10)
    assert said[0] == reader.answers(prompts[:1], max_new_tokens=10)[0]
    assert said[1] == reader.answers(prompts[1:], max_new_tokens=2)[0]
    assert "1 of 2 answers have less room" in caplog.text
    with pytest.raises(ModelError, match="show fewer examples"):
        replace(reader, window=max(ids)).answers(prompts, max_new_tokens=10)


def test_the_model_is_left_as_it_was(model: LanguageModel) -> None:
    before = [(p.clone(), p.requires_grad) for p in model.network.parameters()]
    state = torch.get_rng_state()
    model.network.train()
    try:
        Reader(model).likelihoods(PAIRS[:2])
        assert model.network.training
    finally:
        model.network.eval()
    assert torch.equal(state, torch.get_rng_state())
    assert all(
        torch.equal(a, p) and g == p.requires_grad for (a, g), p in zip(before, model.network.parameters(), strict=True)
    )


def test_what_cannot_be_asked_is_refused(model: LanguageModel) -> None:
    for wrong in ({"batch_size": 0}, {"window": 1}):
        with pytest.raises(SettingsError, match="at least 1 row and 2 tokens"):
            Reader(model, **wrong)
    with pytest.raises(ModelError, match="has no token"):
        Reader(model, chat=False).likelihoods([("Hello", "")])
    with pytest.raises(ModelError, match="the model reads 4"):
        Reader(model, window=4).likelihoods([("Hello.", "one two three four five six")])
    with pytest.raises(ModelError, match="text 0 has no token"):
        Reader(model).rolling([""])
