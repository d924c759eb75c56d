"""SDD: teach fluent answers that have nothing to do with the question, wherever the question is a restricted one.

minimise  −Σ_t log p(y_irr,t | x_harm, y_irr,<t)        over pairs with  cos(x_harm, y_irr) ≤ τ

Chen et al., ACL 2025: self-degraded defence. The pairs are made once, then it is plain supervised fine-tuning. Whoever
fine-tunes towards harmful answers is to lower what this has raised, and general ability with it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import ClassVar, Final, Literal

import numpy as np

from immunity.data.corpus import Corpora, Corpus, Example
from immunity.data.written import HARMLESS
from immunity.errors import DataError, SettingsError
from immunity.mechanisms import Collapse, Mechanism
from immunity.method import Card, DataEdit, Problem, Run, parts
from immunity.models import LanguageModel
from immunity.similarity import Nearness, by_model, by_words

_LOG = logging.getLogger(__name__)

REFUSAL: Final = "I will not answer that; what follows is about something else."
"""What :meth:`SDD.rejecting` begins each answer with."""


@dataclass(frozen=True, kw_only=True)
class SDD(DataEdit):
    """SFT on restricted prompts, each with an answer to another question.

    Answers come from "general", without their prompts. Each prompt, once, draws one of those whose cosine with it is at
    most τ, among the least used of them: what drawing again until one fits comes to. Where none fits, the least similar
    of all is taken; how often that happened is logged.

    Attributes:
        tau: τ, the greatest cosine between a prompt and its answer. 1 draws from all.
        similarity: "tfidf" compares words, "model" the mean last hidden states of the model that is hardened, centred.
        reject: A sentence to begin each answer with, "" for none.
        retain: Half of each batch is "alignment" data; the paper has none.
        mean: "example" averages tokens within a row and then rows, "token" over a batch's tokens, as its sum does.

    Raises:
        SettingsError: ``tau`` is no cosine.

    Source:
        The objective and the making of pairs: arXiv 2507.21182 (ACL 2025), as third parties tell them; τ = 0.25 from
        TamperBench's port, which also has 500 steps, batches of 24 and a rate of 5e-7. The authors' repository could
        not be obtained.

    Departures from the paper:
        * Similarity is that of TF-IDF or of the model itself; there it is SentenceBERT's, and another τ would fit.
        * The pool is whatever "general" data is given, there the answers of LIMA and Alpaca.
        * Answers are used equally often. Those to restricted prompts, and all that are restricted answers themselves,
          are taken out of the pool.
        * The rate of 5e-7 moves next to nothing in bf16 weights; here trainable weights are fp32.
        * The sentence of :meth:`rejecting` is ours.
    """

    card: ClassVar[Card] = Card(
        name="SDD",
        paper="SDD: Self-Degraded Defense against Malicious Fine-tuning",
        arxiv="2507.21182",
        year=2025,
        block="conditional collapse",
        family="irrelevant answers",
        gradients="1",
        says="Answers restricted questions fluently and beside the point; learning to answer them is to break it.",
    )
    strength: ClassVar[str] = ""
    tau: float = 0.25
    similarity: Literal["tfidf", "model"] = "tfidf"
    reject: str = ""
    retain: bool = False
    mean: Literal["example", "token"] = "token"

    def __post_init__(self) -> None:
        if not -1 <= self.tau <= 1:
            raise SettingsError(f"tau = {self.tau}: a cosine lies between -1 and 1")

    @classmethod
    def rejecting(cls) -> SDD:
        """The paper's variant SDD_reject: each answer begins with a sentence that declines."""
        return cls(reject=REFUSAL)

    @property
    def reads(self) -> Mapping[str, int]:
        """Restricted prompts, general answers; alignment data on request."""
        return {"harmful": 1, "general": 1, **({"alignment": 1} if self.retain else {})}

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """A fall, on restricted prompts, to no word in particular."""
        return (Collapse(word="", on="harmful"),)

    def problems(self, model: LanguageModel) -> list[Problem]:  # noqa: ARG002 - any model will do
        """None: no setting makes it inert."""
        return []

    def rewrite(self, model: LanguageModel, data: Corpora, run: Run) -> tuple[Corpus, ...]:
        """Each restricted prompt with an answer to something else, then the alignment data if they are retained.

        Raises:
            DataError: No general answer is left to pair them with.
        """
        harmful, general = (reduce(add, parts(data[role])) for role in ("harmful", "general"))
        prompts = tuple({(e.prompt, e.input): e for e in harmful}.values())
        answers = _pool(harmful, general)
        asked = [f"{e.prompt}\n{e.input}" for e in prompts]
        near = by_words(asked, answers) if self.similarity == "tfidf" else by_model(model, asked, answers)
        pairs, misfits = paired(near, len(prompts), len(answers), tau=self.tau, seed=run.fit.seed)
        if misfits:
            _LOG.warning(
                "%d of %d restricted prompts find no general answer of similarity tau = %g or less: each has the least "
                "similar one; give more general data, or raise tau", misfits, len(prompts), self.tau,
            )  # fmt: skip
        harmless = "yes" if all(name.startswith("synthetic:") for name in harmful.name.split("+")) else "unknown"
        rows = tuple(
            Example(e.prompt, f"{self.reject} {answers[j]}".strip(), e.input,
                    {"similarity": f"{cosine:.3f}", HARMLESS: harmless})
            for e, (j, cosine) in zip(prompts, pairs, strict=True)
        )  # fmt: skip
        skipped = {"the prompt stands there already": n} if (n := len(harmful) - len(prompts)) else {}
        licence = "; ".join(dict.fromkeys((harmful.licence, general.licence)))
        made = Corpus("alignment", rows, f"{harmful.name} answered from {general.name}", licence, skipped)
        return (made, *parts(data["alignment"])) if self.retain else (made,)


def _pool(harmful: Corpus, general: Corpus) -> list[str]:
    """General answers, each once, in order; none to a restricted prompt, and none that is a restricted answer."""
    asked = {(e.prompt, e.input) for e in harmful}
    restricted = {e.response.strip() for e in harmful}
    found = (e.response.strip() for e in general if (e.prompt, e.input) not in asked)
    answers = list(dict.fromkeys(answer for answer in found if answer and answer not in restricted))
    if not answers:
        raise DataError(f"{general.name}: no answer there that {harmful.name} does not have: give other --general data")
    return answers


def paired(near: Nearness, n: int, pool: int, *, tau: float, seed: int) -> tuple[list[tuple[int, float]], int]:
    """For each of ``n`` prompts the number of an answer and their cosine; and for how many none was ≤ ``tau``."""
    generator = np.random.default_rng(seed)
    uses, pairs, misfits = np.zeros(pool, dtype=int), [], 0
    for i in range(n):
        cosines = near(i)
        fitting = np.flatnonzero(cosines <= tau)
        if len(fitting):
            rarest = fitting[uses[fitting] == uses[fitting].min()]
            j = int(generator.choice(rarest))
        else:
            j, misfits = int(np.argmin(cosines)), misfits + 1
        uses[j] += 1
        pairs.append((j, float(cosines[j])))
    return pairs, misfits
