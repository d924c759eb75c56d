"""AbliterateSearch: abliteration whose strength in each block is searched for, by Optuna."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, Literal, NamedTuple

import torch
from torch import Tensor

from immunity.attacks.attack import THREATS, Attack, Manner
from immunity.attacks.curve import Recorder, budgets
from immunity.attacks.probing import Reader
from immunity.attacks.refusing import Aim, Seen, best, prompts_of, split_of
from immunity.data.corpus import Corpora
from immunity.errors import MissingExtraError, SettingsError
from immunity.hidden import sites
from immunity.models import LanguageModel
from immunity.weights import Kept, Writer, without, writers

_KINDS: Final = ("attention", "mlp")


class Kernel(NamedTuple):
    """How strongly the blocks around one of them are edited.

    Attributes:
        most: At the centre; above 1 the direction is turned over.
        centre: Block, not a whole number.
        least: At the distance ``reach``; linear between the two, nothing beyond.
        reach: In blocks.
    """

    most: float
    centre: float
    least: float
    reach: float

    def share(self, layer: int) -> float:
        """Of the direction that is taken out of what block ``layer`` writes."""
        away = abs(layer - self.centre)
        return 0.0 if away > self.reach else self.most + away / self.reach * (self.least - self.most)


class Plan(NamedTuple):
    """One trial.

    Attributes:
        block: Not a whole number: whose direction is used everywhere; None takes each block's own.
        kernels: One for each kind of writer.
    """

    block: float | None
    kernels: Mapping[str, Kernel]


@dataclass(frozen=True, kw_only=True)
class AbliterateSearch(Attack):
    """Abliteration with a kernel over blocks for attention and one for MLPs, and the direction's block, all searched.

    W ← W − a r rᵀ W with a from the kernel. Each trial is scored on the attacker's own held-out prompts by how far
    refusing falls and by the KL on harmless ones; the best trial so far is measured.

    Attributes:
        trials: Edits tried.
        startup: Of them drawn at random, before the tree-structured Parzen estimator takes over.
        n: See :class:`~immunity.attacks.abliterate.Abliterate`.
        held: See there.
        harmless: See there.
        kl_limit: See there: of all trials the one that refuses least within it is the best.
        batch_size: Prompts per forward pass; memory only.
        seed: Of the search, and of which prompts are held out.

    Raises:
        SettingsError: A setting is out of range.

    Source:
        heretic, src/heretic/main.py: a kernel for each kind of writer, the direction's block, 200 trials of which 60 at
        random, refusals and KL as objectives; re-derived from a description, none of its code was read for this.

    Departures from the paper:
        * Refusing is the log-odds of refusals' first tokens, a smooth number; there answers are searched for words.
        * The best trial is picked by the KL limit.
        * That each block may take its own direction is searched too; that it is so there was not verified.
        * The ranges of the search are ours: every block may be the centre, and give the direction.
        * Each block's state is read at the last position of the prompt only; embeddings are not edited.
        * The search is not resumed: a killed run searches again, with the same seed.
    """

    name: ClassVar[str] = "abliterate-search"
    unit: ClassVar[str] = "trials"
    trials: int = 200
    startup: int = 60
    n: int = 128
    held: int = 32
    harmless: Literal["benign", "general"] = "benign"
    kl_limit: float = 0.1
    batch_size: int = 16
    seed: int = 1

    def __post_init__(self) -> None:
        counts = {"trials": self.trials, "startup": self.startup, "n": self.n, "held": self.held}
        for name, value in {**counts, "batch_size": self.batch_size}.items():
            if value < 1:
                raise SettingsError(f"{name} = {value}: it must be at least 1")
        if not self.kl_limit > 0 or self.seed < 0:
            raise SettingsError(f"kl_limit = {self.kl_limit}, seed = {self.seed}: above 0; not negative")
        if self.harmless not in {"benign", "general"}:
            raise SettingsError(f"harmless = {self.harmless!r}: use benign or general")

    @property
    def manner(self) -> Manner:
        """Restricted prompts are read."""
        return Manner(THREATS["harmful"])

    @property
    def budgets(self) -> tuple[int, ...]:
        """Log-spaced trials."""
        return budgets(self.trials)

    def reads(self, data: Corpora) -> Corpora:
        """The prompts of both kinds, without their responses.

        Raises:
            DataError: A role is missing, or has a single row.
        """
        return prompts_of(data, self.harmless, self.n + self.held)

    def tamper(self, model: LanguageModel, data: Corpora, recorder: Recorder) -> LanguageModel:
        """See :meth:`Attack.tamper`.

        Raises:
            MissingExtraError: Optuna is not installed.
            ModelError: The writers of the residual stream cannot be found.
            DivergedError: Logits are not finite.
        """
        optuna = _optuna()
        recorder.reached(0, model)
        written = [writer for writer in writers(model.network) if writer.kind in _KINDS]
        kept = Kept([tensor for writer in written for tensor in (writer.weight, writer.bias) if tensor is not None])
        reader = Reader(model, self.batch_size)
        split = split_of(reader, data, self.harmless, held=self.held / (self.n + self.held), seed=self.seed)
        aim = Aim.of(reader, split)
        places = sites(model.network, "output")
        means = [reader.mean_states(prompts, places, 1)[:, 0] for prompts in (split.harmful, split.harmless)]
        directions = _unit(means[0] - means[1])  # [L, D]
        plans: list[Plan] = []
        seen: list[Seen] = []
        with _silent(optuna):
            study = self._study(optuna)
            for k in range(1, self.trials + 1):
                trial = study.ask()
                plans.append(proposed(trial, len(places)))
                apply(written, directions, plans[-1])
                seen.append(aim.look())
                study.tell(trial, list(_finite(seen[-1])))
                kept.restore()
                at = best(seen, self.kl_limit)
                if k in self.budgets:
                    apply(written, directions, plans[at])
                trace = {"refusal": seen[at].refusal, "kl": seen[at].kl, "best_trial": at + 1.0}
                recorder.reached(k, model, reader.spent, trace)
                if k < self.trials:
                    kept.restore()
        return replace(model, pristine=False)

    def _study(self, optuna: Any) -> Any:  # noqa: ANN401 - an optional package
        sampler = optuna.samplers.TPESampler(seed=self.seed, n_startup_trials=self.startup)
        return optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)


def proposed(trial: Any, layers: int) -> Plan:  # noqa: ANN401 - a trial of optuna's
    """A plan from a trial's suggestions, for a network of ``layers`` blocks."""
    last = layers - 1
    own = trial.suggest_categorical("direction", ["one", "each block's"]) != "one"
    block = trial.suggest_float("block", 0.0, float(last))
    kernels = {}
    for kind in _KINDS:
        most = trial.suggest_float(f"{kind} most", 0.5, 2.0)
        kernels[kind] = Kernel(
            most=most,
            centre=trial.suggest_float(f"{kind} centre", 0.0, float(last)),
            least=most * trial.suggest_float(f"{kind} least", 0.0, 1.0),
            reach=trial.suggest_float(f"{kind} reach", 1.0, max(1.0, float(last))),
        )
    return Plan(None if own else block, kernels)


def apply(written: Sequence[Writer], directions: Tensor, plan: Plan) -> None:
    """Take a plan's share of its direction out of every writer, in place.

    Args:
        written: Attention and MLP outputs.
        directions: A unit vector for each block's output, [L, D]; zero where there is none.
        plan: How much of which.
    """
    for writer in written:
        share = plan.kernels[writer.kind].share(writer.layer)
        if share == 0.0:
            continue
        r = directions[writer.layer] if plan.block is None else between(directions, plan.block)
        without(writer.weight, r, share)
        if writer.bias is not None:
            without(writer.bias, r, share)


def between(directions: Tensor, block: float) -> Tensor:
    """The direction [D] at a block that is not a whole number, on the line between its neighbours', of length 1."""
    low = min(int(block), len(directions) - 1)
    high = min(low + 1, len(directions) - 1)
    return _unit(torch.lerp(directions[low], directions[high], block - low))


def _unit(vectors: Tensor) -> Tensor:
    """Vectors [..., D] of length 1; those of length 0 stay."""
    lengths: Tensor = vectors.norm(dim=-1, keepdim=True)
    return vectors / lengths.clamp(min=1e-30)


def _finite(seen: Seen) -> Seen:
    """Objectives that a sampler can rank: what is not finite is worse than anything."""
    return Seen(*(value if abs(value) < 1e9 else 1e9 for value in seen))


def _optuna() -> Any:  # noqa: ANN401 - an optional package
    try:
        import optuna
    except ImportError as error:
        raise MissingExtraError("the search needs optuna: pip install 'immunity[search]'") from error
    return optuna


@contextmanager
def _silent(optuna: Any) -> Iterator[None]:  # noqa: ANN401
    """Without a line for every trial: the command line draws its own progress."""
    found = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(found)
