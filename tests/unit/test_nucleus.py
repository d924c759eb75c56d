"""Sampling from a nucleus, and every example in its own way."""

from __future__ import annotations

import pytest
import torch

from immunity.data.corpus import Example
from immunity.generate import _nucleus, sample
from immunity.testing import tiny

ASKED = Example("how can you help?", "")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_nucleus_is_the_fewest_likeliest_tokens_and_each_example_may_have_its_own():
    probs = torch.tensor([[0.1, 0.4, 0.05, 0.25, 0.2]] * 5, dtype=torch.float64)
    tops = torch.tensor([[0.3], [0.41], [0.66], [0.9], [1.0]], dtype=torch.float64)
    kept = _nucleus(probs.log(), tops)
    assert (kept > -torch.inf).tolist() == [
        [i in nucleus for i in range(5)] for nucleus in ({1}, {1, 3}, {1, 3, 4}, {0, 1, 3, 4}, {0, 1, 2, 3, 4})
    ]
    assert torch.equal(kept[kept > -torch.inf], probs.log()[kept > -torch.inf])
    tied = _nucleus(torch.zeros(1, 4, dtype=torch.float64), torch.tensor([[0.5]], dtype=torch.float64))
    assert int((tied == 0).sum()) == 2
    network = tiny.gpt2(torch.float64, 0, tiny.VOCAB, positions=256)
    model = tiny.language_model(network)
    heat, nuclei = [0.7, 1.3, 1.0], [0.6, 0.2, 1.0]
    examples = [ASKED] * 3
    groups = sample(
        model, examples, n=300, max_new_tokens=1, temperature=heat, top_p=nuclei, generator=seeded(1), batch_size=70
    )
    with torch.no_grad():
        logits = network(input_ids=torch.tensor([model.template.prompt_ids(ASKED)])).logits[0, -1]
    for answers, t, top in zip(groups, heat, nuclei, strict=True):
        p = (logits / t).softmax(-1)
        order = p.argsort(descending=True)
        nucleus = {int(order[0])} | {int(i) for i in order[1:] if float(p[order][: (order == i).nonzero()].sum()) < top}
        assert {answer.ids[0] for answer in answers} <= nucleus
        norm = float(p[list(nucleus)].sum())
        assert [answer.log_probs[0] for answer in answers] == pytest.approx(
            [float((p[answer.ids[0]] / norm).log()) for answer in answers], abs=1e-6
        )
    same = sample(model, examples, n=3, max_new_tokens=4, temperature=0.8, generator=seeded(2))
    each = {"temperature": [0.8] * 3, "top_p": [1.0] * 3}
    assert sample(model, examples, n=3, max_new_tokens=4, **each, generator=seeded(2)) == same
