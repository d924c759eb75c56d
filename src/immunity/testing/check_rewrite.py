"""Checks of an edit of data: that it only writes, repeats itself, and teaches no restricted answer."""

from __future__ import annotations

import torch

from immunity.data.corpus import Corpora, Corpus
from immunity.fit import Fit
from immunity.method import DataEdit, Run, parts
from immunity.testing.watch import Watched, corpus, made, mark, picture, require, require_same

RESTRICTED = ("harmful", "heldout")
"""Roles whose answers nobody may be taught."""


def leaves_the_model_as_found(method: DataEdit) -> None:
    """Rewriting changes nothing of the model, nor torch's random numbers, and reads what it declares and no more."""
    model, name = made(), type(method).__name__
    mark(model)
    before, state = picture(model.network), torch.get_rng_state()
    data = Watched(_data(method), f"{name}.rewrite")
    method.rewrite(model, data, _run())
    require_same(before, model.network, f"{name}.rewrite")
    require(torch.equal(state, torch.get_rng_state()), f"{name}.rewrite moves torch's random numbers: use its own")
    idle = sorted(set(method.reads) - data.read)
    require(not idle, f"{name}.rewrite never reads the role {', '.join(idle)} that it declares")


def repeats_its_rewriting(method: DataEdit) -> None:
    """The same model, data and seed give the same rows, in the same order."""
    first, second = (_written(method) for _ in range(2))
    require(
        [c.fingerprint for c in first] == [c.fingerprint for c in second],
        f"{type(method).__name__}.rewrite writes other rows when called again: draw from run.fit.seed alone",
    )


def writes_other_alignment_rows(method: DataEdit) -> None:
    """What it writes has the role "alignment", and is not what it was given."""
    name, found = type(method).__name__, _written(method)
    require(bool(found), f"{name}.rewrite writes no corpus")
    roles = {c.role for c in found} - {"alignment"}
    require(
        not roles, f"{name}.rewrite writes the role {', '.join(roles)}: what is trained on has the role 'alignment'"
    )
    given = {(e.prompt, e.input, e.response) for c in _given(method) for e in c}
    new = [e for c in found for e in c if (e.prompt, e.input, e.response) not in given]
    require(bool(new), f"{name}.rewrite writes nothing but rows that it was given: it does nothing")


def teaches_no_restricted_answer(method: DataEdit) -> None:
    """No answer of a restricted role is among those that are trained on."""
    restricted = {e.response for c in _given(method) if c.role in RESTRICTED for e in c}
    found = [e.response for c in _written(method) for e in c if e.response in restricted]
    require(not found, f"{type(method).__name__}.rewrite teaches {len(found)} restricted answers, as they were given")


def _data(method: DataEdit) -> dict[str, Corpus | tuple[Corpus, ...]]:
    return {role: corpus(role) for role in method.reads}


def _given(method: DataEdit) -> list[Corpus]:
    return [c for of in _data(method).values() for c in parts(of)]


def _written(method: DataEdit) -> tuple[Corpus, ...]:
    data: Corpora = _data(method)
    return method.rewrite(made(), data, _run())


def _run() -> Run:
    return Run(fit=Fit(steps=1, lr=1e-3, seed=3), default_batch_size=3)
