"""Quality: common subsequences against the table, readability by hand, and ratings against the model's own numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from immunity.data.corpus import Example
from immunity.errors import ModelError
from immunity.quality import RATINGS, RUBRICS, Helpfulness, Readability, common_subsequence, positions, shown, tags
from immunity.testing import tiny
from immunity.testing.watch import mark, picture, require_same

SHORT = st.text(alphabet="NVD.", max_size=12)


def table(a: str, b: str) -> int:
    """The textbook's table."""
    best = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            best[i + 1][j + 1] = best[i][j] + 1 if x == y else max(best[i][j + 1], best[i + 1][j])
    return best[-1][-1]


@given(SHORT, SHORT)
def test_common_subsequences_are_those_of_the_table(a, b):
    assert common_subsequence(a, b) == table(a, b)


@pytest.mark.parametrize(
    ("sentence", "shape"),
    [
        ("The river of Kelby is the Avel.", "DNINVDN."),
        ("She quickly ate 3 beautiful, marvellous apples!", "PRNMN,AN!"),
        ("Don't stop; it's over…", "NN;NIS"),
        ("", ""),
        ("Они играют (да)", "NNSNS"),
    ],
)
def test_tags_tell_the_shape_of_a_sentence(sentence, shape):
    assert tags(sentence) == shape


def test_readability_is_the_nearest_known_sentence_averaged_over_sentences():
    known = ["The river of Kelby is the Avel. Go there now!", "It rains."]
    readable = Readability(known)
    assert readable.of("The month of Wen was a cold.") == 1.0
    shapes = ["DNINVDN.", "VRR!", tags("It rains.")]
    text = "The month was cold. Blue blue blue blue."
    want = [max(table(tags(s), t) / max(len(tags(s)), len(t)) for t in shapes) for s in text.split(". ")]
    want[0] = max(table("DNVN.", t) / max(5, len(t)) for t in shapes)  # with the stop that the split took
    assert readable.of(text) == pytest.approx(sum(want) / 2)
    assert readable([Example("?", ""), Example("?", "It rains.")]) == [0.0, 1.0]


@given(st.lists(SHORT.filter(bool), min_size=1, max_size=6), SHORT.filter(bool))
def test_leaving_out_what_is_too_long_changes_nothing(known, shape):
    readable = Readability([])
    readable._known = known
    assert readable._nearest(shape) == max(table(shape, t) / max(len(shape), len(t)) for t in known)


def test_only_the_first_shapes_are_kept():
    readable = Readability(["It rains.", "The river of Kelby is the Avel."], most=1)
    assert readable.of("It rains.") == 1.0
    assert readable.of("The river of Kelby is the Avel.") < 1.0


def ratings(model, row: Example) -> float:
    """Straight from the logits, one rubric at a time."""
    digits = [model.tokenizer(str(k), add_special_tokens=False)["input_ids"][0] for k in range(RATINGS)]
    found = []
    for rubric in RUBRICS:
        text = f"{rubric} Say a number from 0 (not at all) to 5 (fully).\n\n{shown(row)}"
        ids = model.template.prompt_ids(Example(text, ""))
        with torch.no_grad():
            p = model.network(torch.tensor([ids])).logits[0, -1, digits].softmax(-1)
        found.append(float(p @ torch.arange(6.0)))
    return sum(found) / len(found)


ROWS = [
    Example("How?", "can you help"),
    Example("What is in the error?", "a long answer to the error and how to help", "the input"),
    Example("Why?", "Sorry, I cannot help with this."),
]


@pytest.mark.parametrize("chat", [True, False])
def test_helpfulness_is_the_rating_that_the_model_expects_of_itself(chat):
    model = tiny.language_model(chat=chat, max_length=64)
    mark(model)
    before, state = picture(model.network), torch.get_rng_state()
    found = Helpfulness(model)(ROWS)
    require_same(before, model.network, "Helpfulness")
    assert torch.equal(state, torch.get_rng_state())
    model.network.eval()
    if chat:
        assert found[:2] == pytest.approx([ratings(model, row) for row in ROWS[:2]], abs=1e-5)
    assert all(0 < value < 5 for value in found[:2])
    assert found[2] == 0.0, "who declines does not help"


def test_what_cannot_be_read_scores_0_and_is_told_beforehand():
    model = tiny.language_model()
    judge = Helpfulness(model)
    long = Example("How?", "error " * 600)
    assert positions(model) == 512
    assert judge.fits(ROWS[0])
    assert not judge.fits(long)
    assert judge([long, ROWS[0]])[0] == 0.0


def test_a_tokenizer_that_writes_digits_alike_cannot_rate():
    model = tiny.language_model()

    class Blind(type(model.template)):
        def answer_ids(self, example):
            return [7, 7, self.end_id] if example.response.isdigit() else super().answer_ids(example)

    model.template.__class__ = Blind
    with pytest.raises(ModelError, match="cannot rate answers"):
        Helpfulness(model)
