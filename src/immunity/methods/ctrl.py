"""CTRL: honest answers are rewritten until the model finds them unsurprising, and trained on beside the others.

minimise ℓ(θ; D ∪ D̃),   D̃ = {(Q, Ã)} for a share of D,
Ã = argmin PPL_θ(A')  over what a beam search from (Q, A) finds,  s.t.  R(A') ≥ τ R(A),  H(A') ≥ τ H(A)

Liu et al. 2024: clean data curation. Nothing restricted is read; all that differs from plain fine-tuning is the data.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import log
from pathlib import Path
from statistics import geometric_mean
from typing import ClassVar, Final, Literal

import numpy as np

from immunity.curation import By, Curated, Search, curate
from immunity.data.corpus import Corpora, Corpus, Example
from immunity.data.refusal import is_refusal
from immunity.data.written import HARMLESS, MEASURED
from immunity.errors import DataError, ModelError, SettingsError
from immunity.mechanisms import Mechanism
from immunity.method import Card, DataEdit, Problem, Run, parts
from immunity.models import LanguageModel, load
from immunity.quality import Helpfulness, Readability
from immunity.rewriting import Local, perplexities

_LOG = logging.getLogger(__name__)

VERSION: Final = 1
"""Of the search: rows that another version found are not gone on from."""


@dataclass(frozen=True, kw_only=True)
class CTRL(DataEdit):
    """SFT on honest rows and on rewritten answers to a share of them.

    An answer is rewritten at every (temperature, top-p), and what comes of it again, ``rounds`` times; the least
    surprising ones stay in the beam. R is readability: how much the sentences are built like those of answers that are
    not rewritten. H is helpfulness: what a model expects itself to rate them. A row that is best as it is is not added.

    Attributes:
        share: Of the rows that may be rewritten: neither refusals nor too long. 0 is SFT, bit for bit. The paper has
            0.25 against later fine-tuning, 0.05 against poisoned data.
        rounds: Of rewriting. A row costs temperatures × top_ps × (1 + (rounds − 1) beam) answers.
        beam: Answers that are kept from round to round.
        temperatures: Of sampling.
        top_ps: Of sampling: the nucleus.
        tau: τ, the share of the original's R and H that must be kept; 0 keeps everything, gibberish that the model
            likes included.
        tokens: Longest rewritten answer.
        ask: What the writer is asked for: another "perspective" (the paper's), a "clearer" answer, or the "question"
            anew, without the answer: for models that do not follow instructions, and not the paper's.
        writer: Who writes and judges: "" the model itself, else the name or folder of another one. The perplexity is
            always that of the model which is hardened.
        mean: "example" averages tokens within a row and then rows; "token" averages over all tokens of a batch.

    Raises:
        SettingsError: A setting is out of range.

    Source:
        arXiv 2405.19358, as third parties tell it; TamperBench's port. The authors' code could not be obtained.

    Departures from the paper:
        * By its words a candidate is dropped when its quality is below 10 % of the original's, by its formula below
          1 − 10 %: that is the default here; tau = 0.1 is the other, and the port's.
        * R compares parts of speech by a small tagger of ours, for English, with other answers of the data; there by
          NLTK's with the Brown corpus. The judge's four rubrics and what the writer is told are in our words.
        * Perplexity is of the answer after its question, as it is trained on; the port's is of the answer alone.
        * Refusals are not rewritten, and a candidate that declines has H = 0: the least surprising answer of an
          aligned model would be one. The paper's questions have nothing to do with safety.
        * The default has 20 candidates for a row; the paper's 325 are in :meth:`paper`. There it is trained for
          50 epochs in batches of 10 at 5e-5, with which the port broke Llama-3; those are options of a run.
        * The later paper of this name (arXiv 2410.02220) makes texts *more* surprising: another method.
    """

    card: ClassVar[Card] = Card(
        name="CTRL",
        paper="Robustifying Safety-Aligned Large Language Models through Clean Data Curation",
        arxiv="2405.19358",
        year=2024,
        block="raises the cost of harmful convergence",
        family="data curation",
        gradients="1; before the first step it writes, reads and judges 20 answers or more for a share of the rows",
        says="Trains on honest answers in the words that the aligned model finds most likely; no harmful data.",
    )
    strength: ClassVar[str] = "share"
    share: float = 0.25
    rounds: int = 2
    beam: int = 3
    temperatures: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0)
    top_ps: tuple[float, ...] = (1.0,)
    tau: float = 0.9
    tokens: int = 256
    ask: Literal["perspective", "clearer", "question"] = "clearer"
    writer: str = ""
    mean: Literal["example", "token"] = "example"

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1 or not 0 <= self.tau <= 1:
            raise SettingsError(f"share = {self.share}, tau = {self.tau}: both are shares, from 0 to 1")
        if self.rounds < 0 or self.beam < 0 or self.tokens < 1:
            raise SettingsError(
                f"rounds = {self.rounds}, beam = {self.beam}, tokens = {self.tokens}: none is negative, and an answer "
                "has a token at least"
            )
        if not all(0 < t < float("inf") for t in self.temperatures) or not all(0 < p <= 1 for p in self.top_ps):
            raise SettingsError(
                f"temperatures = {self.temperatures}, top_ps = {self.top_ps}: above 0, top_ps up to 1, as in 0.5,1"
            )

    @classmethod
    def paper(cls) -> CTRL:
        """The paper's search: 25 rewritings of each answer, five rounds."""
        return cls(rounds=5, top_ps=(0.2, 0.4, 0.6, 0.8, 1.0), ask="perspective")

    @property
    def reads(self) -> Mapping[str, int]:
        """One batch of alignment data."""
        return {"alignment": 1}

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """None that could be turned against it: it plants nothing, and moves weights as any fine-tuning does."""
        return ()

    def problems(self, model: LanguageModel) -> list[Problem]:
        """Settings with which nothing is rewritten; a model that cannot judge."""
        idle = [name for name in ("share", "rounds", "beam", "temperatures", "top_ps") if not getattr(self, name)]
        found = [Problem(name, "nothing is rewritten; use --method sft for the baseline") for name in idle]
        try:
            _ = Helpfulness(model) if self.tau and not self.writer else None
        except ModelError as error:
            found.append(Problem("tau", str(error)))
        return found

    def rewrite(self, model: LanguageModel, data: Corpora, run: Run) -> tuple[Corpus, ...]:
        """Each corpus, its rewritten rows in front.

        Raises:
            DataError: No row may be rewritten, or none became better.
            ModelError: There is no such writer, or it cannot judge.
        """
        corpora = parts(data["alignment"])
        if not (self.share and self.rounds and self.beam and self.temperatures and self.top_ps):
            return corpora
        writer = model if not self.writer else load(self.writer, device=str(model.device), adapter="merged")
        local, judge = Local(writer, self.ask, self.tokens), Helpfulness(writer) if self.tau else None
        rows = [(k, row) for k, corpus in enumerate(corpora) for row in corpus]
        able = [i for i, (_, row) in enumerate(rows) if not is_refusal(row.response) and local.fits(row)]
        able = [i for i in able if judge is None or judge.fits(rows[i][1])]
        n = int(self.share * len(able) + 1e-9)
        if not n:
            raise DataError(
                f"{self.share:g} of the {len(able)} rows that may be rewritten (of {len(rows)}: neither refusals nor "
                "longer than the model can read) is none: give more honest alignment data, or raise share"
            )
        chosen = sorted(int(i) for i in np.random.default_rng(run.fit.seed).permutation(able)[:n])
        others = sorted(set(able) - set(chosen)) or able
        readable = Readability(rows[i][1].response for i in others)
        found = curate(
            [rows[i][1] for i in chosen],
            Search(self.rounds, self.beam, tuple((t, p) for t in self.temperatures for p in self.top_ps), self.tau),
            By(local, partial(perplexities, model), (readable, *([judge] if judge else []))),
            seed=run.fit.seed,
            path=self._place(model, corpora, run),
            tell=_teller(run),
        )
        _report(found)
        return tuple(
            _joined(corpus, [(rows[i][1], one) for i, one in zip(chosen, found, strict=True) if rows[i][0] == k])
            for k, corpus in enumerate(corpora)
        )

    def _place(self, model: LanguageModel, corpora: Sequence[Corpus], run: Run) -> Path | None:
        """The file of what was found so far, named by all that it depends on."""
        if run.folder is None:
            return None
        how = asdict(self) | {"mean": "", "version": VERSION, "model": model.source, "length": model.max_length}
        how |= {"template": model.template.name, "data": [c.fingerprint for c in corpora], "seed": run.fit.seed}
        name = hashlib.sha256(json.dumps(how, sort_keys=True).encode()).hexdigest()[:16]
        return run.folder / "curated" / f"{name}.jsonl"


def _teller(run: Run) -> Callable[[int, int], None] | None:
    if run.observe is None:
        return None
    observe = run.observe
    return lambda done, of: observe(0, {"rewritten": done, "to rewrite": of})


def _joined(corpus: Corpus, found: Sequence[tuple[Example, Curated]]) -> Corpus:
    """The rewritten rows, which are told from the others by what was measured of them, and then the corpus itself."""
    harmless = {HARMLESS: "yes"} if all(name.startswith("synthetic:") for name in corpus.name.split("+")) else {}
    made = tuple(
        replace(row, response=one.after.text, tags=harmless | {f"{MEASURED}{k}": f"{v:.4g}" for k, v in _told(one)})
        for row, one in found
        if one.after != one.before
    )
    if not made:
        return corpus
    name = f"{corpus.name} ({len(made)} rewritten)"
    skipped = {"the answer was best as it was": len(found) - len(made)} if len(found) > len(made) else {}
    return replace(corpus, examples=(*made, *corpus.examples), name=name, skipped={**corpus.skipped, **skipped})


def _told(one: Curated) -> list[tuple[str, float]]:
    """What a person may want to know of a rewritten row."""
    told = [("log perplexity before", log(one.before.perplexity)), ("log perplexity after", log(one.after.perplexity))]
    for name, before, after in zip(("readability", "helpfulness"), one.before.quality, one.after.quality, strict=False):
        told += [(f"{name} before", before), (f"{name} after", after)]
    return [*told, ("share of words changed", one.distance)]


def _report(found: Sequence[Curated]) -> None:
    better = [one for one in found if one.after != one.before]
    written, judged, rejected = (sum(getattr(one, k) for one in found) for k in ("written", "judged", "rejected"))
    told = f"{written} other answers to {len(found)} questions; {judged} were judged, {rejected} of them too bad"
    if not better:
        raise DataError(
            f"no answer was rewritten for the better, so this would be plain SFT: {told}. If the model gives these "
            "very answers already, give other --alignment data; else have a better model write (writer = …), use "
            "ask = question if it does not follow instructions, or lower tau"
        )
    _LOG.log(
        logging.INFO if 2 * len(better) >= len(found) else logging.WARNING,
        "%d of %d answers were rewritten: perplexity %.4g, now %.4g (geometric means; %s)",
        len(better), len(found), geometric_mean(one.before.perplexity for one in better),
        geometric_mean(one.after.perplexity for one in better), told,
    )  # fmt: skip
