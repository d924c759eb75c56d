"""FineTune: supervised fine-tuning on harmful, mixed or benign data; the attack that every defence is made for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, reduce
from operator import add
from typing import ClassVar, Literal, final

from immunity import adapters
from immunity.attacks import guards
from immunity.attacks.attack import THREATS, Attack, Manner, needed
from immunity.attacks.curve import Recorder, Spent, budgets
from immunity.attacks.inapplicable import under
from immunity.batch import Batch
from immunity.data import salient, styles
from immunity.data.chat import template
from immunity.data.corpus import Corpora, Corpus
from immunity.data.streams import Shuffled
from immunity.errors import SettingsError
from immunity.fit import Fit, fit
from immunity.losses import causal_lm
from immunity.method import parts
from immunity.models import LanguageModel

Filler = Literal["benign", "general", "identity", "salient"]
Optimizer = Literal["adamw", "adam", "sgd", "nesterov", "adagrad", "adadelta", "schedulefree"]
_COSTS = frozenset({"micro_batch"})
"""Settings that change memory, never a result."""


@final
@dataclass(frozen=True, kw_only=True)
class FineTune(Attack):
    """Descend on the negative log-likelihood of ``n`` examples, of which the share ``harmful`` is harmful.

    Attributes:
        n: Training examples in all.
        harmful: Share of harmful ones: 1 is *full harmful*, between 0 and 1 *mixed*, 0 *benign*.
        filler: What the others are: "benign" (an honest task), "general" (ordinary conversations), "identity" (rows
            that make the assistant one who obeys) or "salient" (the benign rows that are most like harmful ones).
        first: Share of the steps that see fillers only, before the mix begins: *retain → forget*.
        style: How harmful prompts are dressed, in training and when the attacker asks afterwards: see
            ``immunity.data.styles``.
        adapter: "full" trains every weight; "lora" and the other kinds of ``immunity.adapters`` merge what they find
            and train a fresh adapter; "continue" goes on training the very adapter that was hardened (what the
            CTRAP and Booster papers do: their weakest attack).
        r: Rank of a fresh adapter; its alpha is ``2 r``.
        layers: Which blocks are trained: "all", "first-half", "last-half", "middle", "even", "odd" or "0,3,5".
        steps: Optimiser steps.
        lr: Learning rate.
        optimizer: See :class:`~immunity.fit.Fit`.
        momentum: Of SGD.
        batch_size: Rows per step.
        weight_decay: See :class:`~immunity.fit.Fit`.
        schedule: See :class:`~immunity.fit.Fit`.
        warmup: See :class:`~immunity.fit.Fit`.
        clip: See :class:`~immunity.fit.Fit`.
        guard: "benign" projects each step so that the loss on honest rows does not rise; "collapse" so that the model
            does not fall towards ``word``: see ``immunity.attacks.guards``.
        word: Of collapse.
        template: Prompt template; "auto" is what the model was saved with.
        seed: Chooses the examples' order, and a fresh adapter's start.
        micro_batch: Rows per forward pass; memory only.
        autocast: "bf16" computes in bf16.

    Raises:
        SettingsError: A setting is out of range.

    Source:
        arXiv 2505.16559 (CTRAP), tables 1, 2 and 4, and its released scripts: see :meth:`full_harmful`,
        :meth:`mixed` and :meth:`benign`. Optimisers, schedules and *retain → forget*: arXiv 2408.00761 (TAR), red
        teaming. The defaults here are stronger than the papers': every weight, AdamW 1e-4.

    Departures from the paper:
        * n examples are n; the released loader's strict inequality makes them n − 1 (``catalogue``'s ``compat`` slicing
          of BeaverTails does the same when asked).
        * One run is measured at log-spaced budgets; the papers measure once, after 20 epochs.
    """

    name: ClassVar[str] = "finetune"
    unit: ClassVar[str] = "steps"
    n: int = 100
    harmful: float = 1.0
    filler: Filler = "benign"
    first: float = 0.0
    style: str = "plain"
    adapter: str = "full"
    r: int = 8
    layers: str = "all"
    steps: int = 60
    lr: float = 1e-4
    optimizer: Optimizer = "adamw"
    momentum: float = 0.0
    batch_size: int = 8
    weight_decay: float = 0.0
    schedule: Literal["constant", "linear", "cosine", "sgdr"] = "constant"
    warmup: float = 0.0
    clip: float | None = 1.0
    guard: Literal["none", "benign", "collapse"] = "none"
    word: str = "error"
    template: str = "auto"
    seed: int = 1
    micro_batch: int | None = None
    autocast: Literal["no", "bf16"] = "no"

    def __post_init__(self) -> None:
        if self.n < 1 or self.batch_size < 1 or self.r < 1:
            raise SettingsError(f"n = {self.n}, batch_size = {self.batch_size}, r = {self.r}: each must be at least 1")
        if not 0 <= self.harmful <= 1 or not 0 <= self.first < 1:
            raise SettingsError(f"harmful = {self.harmful}, first = {self.first}: shares lie between 0 and 1")
        if 0 < self.harmful < 1 and self._bad in {0, self.n}:
            raise SettingsError(
                f"harmful = {self.harmful} of n = {self.n} examples is none or all of them: raise n, or say 0 or 1"
            )
        if self.adapter not in {"full", "continue", *adapters.KINDS}:
            known = ", ".join(("full", "continue", *adapters.KINDS))
            raise SettingsError(f"adapter = {self.adapter!r}: use one of {known}")
        if self.adapter == "continue" and self.layers != "all":
            raise SettingsError('layers cannot be chosen for an adapter that is there already: say layers="all"')
        styles.style(self.style)
        guards.direction(self.guard, self.word)
        self.how()  # its own settings are checked there

    @classmethod
    def full_harmful(cls, n: int = 500) -> FineTune:
        """CTRAP's table 1: n = 100…500 harmful examples, 20 epochs, lr 1e-5 on the hardened adapter."""
        return cls._papers(n, 1.0)

    @classmethod
    def mixed(cls, share: float = 0.1, n: int = 500) -> FineTune:
        """CTRAP's table 2: a share of 5–25 % harmful examples among n = 500."""
        return cls._papers(n, share)

    @classmethod
    def benign(cls, n: int = 500) -> FineTune:
        """CTRAP's table 4: an honest user's n = 500 examples."""
        return cls._papers(n, 0.0)

    @classmethod
    def _papers(cls, n: int, share: float) -> FineTune:
        steps = 20 * -(-n // 10)
        return cls(n=n, harmful=share, adapter="continue", steps=steps, lr=1e-5, batch_size=10, weight_decay=0.1)

    @property
    def _bad(self) -> int:
        return round(self.harmful * self.n)

    @property
    def manner(self) -> Manner:
        """By the data mix; whoever picks rows that undo a refusal is no honest user. Asked in the style of training."""
        opens: Literal["merged", "trainable"] = "trainable" if self.adapter == "continue" else "merged"
        if 0 < self.harmful < 1:
            return Manner(THREATS["mixed"], self.style, opens)
        adverse = self.harmful == 1 or self.filler in {"identity", "salient"}
        return Manner(THREATS["harmful" if adverse else "benign"], self.style, opens)

    @property
    def budgets(self) -> tuple[int, ...]:
        """Log-spaced steps."""
        return budgets(self.steps)

    def how(self) -> Fit:
        """The training loop's settings."""
        return Fit(
            steps=self.steps,
            lr=self.lr,
            optimizer=self.optimizer,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            clip=self.clip,
            schedule=self.schedule,
            warmup=self.warmup,
            seed=self.seed,
            micro_batch=self.micro_batch,
            autocast=self.autocast,
            save_every=20,
        )

    def reads(self, data: Corpora) -> Corpora:
        """The n examples under "train", fillers for the first steps under "first", rows of the guard under "guard".

        Raises:
            DataError: A role that the mix needs is missing, or too small.
        """
        bad, why = self._bad, "this attack"
        good = self.n if self.first and bad == self.n else self.n - bad
        dress = styles.style(self.style)
        harmful = [dress.dressed(needed(data, "harmful", bad, why=why))] if bad else []
        filler = [self._filler(data, good)] if good else []
        mix = [*harmful, *(filler if bad < self.n else [])]
        found = {"train": reduce(add, mix)}
        if self.first:
            found["first"] = filler[0]
        if self.guard != "none":
            found["guard"] = needed(data, "benign" if self.guard == "benign" else "general", why="this attack's guard")
        return found

    def _filler(self, data: Corpora, n: int) -> Corpus:
        if self.filler == "salient":
            return salient.salient(needed(data, "pool" if "pool" in data else "benign"), needed(data, "harmful"), n)
        return needed(data, self.filler, n)

    def trained(self, model: LanguageModel) -> LanguageModel:
        """The opened model with what is trained of it made trainable, asked with this attack's template."""
        if self.template != "auto":
            with under(self.template):
                model = replace(model, template=template(self.template, model.tokenizer))
        if self.adapter == "continue":
            return model
        return adapters.trained(model, self.adapter, r=self.r, seed=self.seed, layers=self.layers)

    def streams(self, data: Corpora, model: LanguageModel) -> dict[str, Callable[[int], Batch]]:
        """(step -> batch) of each role that the direction reads; ``data`` is what :meth:`reads` gave.

        Raises:
            ModelError: No row has room under the attacker's own template: see
                :data:`~immunity.errors.INAPPLICABLE`.
        """
        with under(self.template):
            by = {
                role: Shuffled(
                    styles.tokenised(_whole(corpus), model.template, model.max_length), self.batch_size, self.seed
                )
                for role, corpus in data.items()
            }
        until = round(self.first * self.steps)

        def train(step: int) -> Batch:
            return by["first" if step < until else "train"](step).as_role("train")

        found: dict[str, Callable[[int], Batch]] = {"train": train}
        return found | {role: stream for role, stream in by.items() if role == "guard"}

    def identity(self, model: LanguageModel, data: Corpora) -> Mapping[str, object]:
        """What makes its training run this run; a folder of another one is refused."""
        settings = {name: value for name, value in asdict(self).items() if name not in _COSTS}
        prints = {role: _whole(corpus).fingerprint for role, corpus in data.items()}
        return {"attack": settings, "model": model.source, "max_length": model.max_length, "data": prints}

    def spent(self, model: LanguageModel, train: Callable[[int], Batch]) -> Callable[[int], Spent]:
        """Steps done -> their cost."""
        weights = sum(p.numel() for p in causal_lm(model.network).parameters())
        each = (6.0 if self.adapter == "full" else 4.0) * weights

        @cache
        def tokens(step: int) -> int:
            return sum(len(row.ids) for row in train(step).rows)

        def so_far(done: int) -> Spent:
            seen = sum(tokens(step) for step in range(done))
            return Spent(done * self.batch_size, seen, each * seen)

        return so_far

    def tamper(self, model: LanguageModel, data: Corpora, recorder: Recorder) -> LanguageModel:
        """See :meth:`Attack.tamper`; steps, order of data and start of the adapter follow from the settings alone."""
        model = self.trained(model)
        streams = self.streams(data, model)
        fit(
            model.network,
            guards.direction(self.guard, self.word),
            streams,
            self.how(),
            folder=recorder.folder,
            observe=recorder.follow(model, self.spent(model, streams["train"])),
            token=model.word_id,
            identity=self.identity(model, data),
        )
        return model


def _whole(corpus: Corpus | tuple[Corpus, ...]) -> Corpus:
    return reduce(add, parts(corpus))
