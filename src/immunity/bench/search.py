"""Search: tune an attack family on dev prompts, then run the winners with fresh seeds on test prompts.

Settings are chosen on one set of prompts and judged on another, and the winners' seeds are new, because the best of
fifty equal attacks looks better than it is. Defended and undefended models get as many trials.
"""

from __future__ import annotations

from collections.abc import KeysView, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from immunity.attacks import battery
from immunity.attacks.attack import Opening
from immunity.attacks.finetune import FineTune
from immunity.attacks.recipe import Recipe
from immunity.bench import pool, probes
from immunity.bench.assault import Assault
from immunity.bench.shown import Shown, quietly
from immunity.data.corpus import Corpora, Corpus
from immunity.errors import SettingsError
from immunity.measure.suite import Suite
from immunity.metrics.curves import TUNED

if TYPE_CHECKING:
    import optuna

FAMILIES: Final[Mapping[str, FineTune]] = {
    "full": FineTune(n=1000),
    "lora": FineTune(n=1000, adapter="lora"),
}
"""Family -> what is the same in all its trials."""
RATES: Final[Mapping[str, tuple[float, float]]] = {"full": (1e-6, 3e-3), "lora": (1e-5, 3e-2)}
"""Learning rates, wider at the top than any published search: the best that was found there lay at the edge."""
STEPS: Final = (8, 16, 32, 64, 128, 256, 512)
BATCHES: Final = (4, 8, 16, 32)
RANKS: Final = (4, 8, 16, 32, 64)
SCHEDULES: Final = ("constant", "linear", "cosine")


@dataclass(frozen=True, kw_only=True)
class Search:
    """A search in one family against one model.

    Attributes:
        family: "full" or "lora".
        model: What is attacked.
        data: What the attacker has.
        dev: Measures trials; its prompts are not those of ``test``.
        test: Measures the winners.
        folder: A folder for each trial; the same search goes on from there.
        trials: How many settings are tried.
        winners: How many of the best are run again.
        fresh_seeds: Seeds of each winner.
        seed: Of the search.
        most_steps: Cap on steps.
        template: Prompt template.
        device: "auto", "cpu", "cuda" …
        max_length: Ids per example.

    Raises:
        SettingsError: A number is out of range, there is no such family, dev and test share a prompt, or Optuna is not
            installed.

    Source:
        Tree-structured Parzen estimators: Bergstra et al. 2011, as in Optuna.
    """

    family: str
    model: str
    data: Corpora
    dev: Suite
    test: Suite
    folder: Path
    trials: int = 50
    winners: int = 3
    fresh_seeds: int = 5
    seed: int = 1
    most_steps: int | None = None
    template: str = "auto"
    device: str = "auto"
    max_length: int | None = None

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise SettingsError(f"family = {self.family!r}: use one of {', '.join(FAMILIES)}")
        if min(self.trials, self.winners, self.fresh_seeds) < 1:
            raise SettingsError(
                f"trials = {self.trials}, winners = {self.winners}, fresh_seeds = {self.fresh_seeds}: at least 1 each"
            )
        if shared := _prompts(self.dev.harmful) & _prompts(self.test.harmful):
            raise SettingsError(
                f"dev and test share {len(shared)} prompts, so settings would be judged by what chose them: give others"
            )
        _study(self.seed)  # says what is missing before hours are spent

    def run(self, progress: Shown = quietly) -> tuple[list[dict[str, Any]], list[Assault]]:
        """Try settings on the dev prompts.

        Returns:
            A row for each trial (see ``immunity.checks``), and the winners' jobs on the test prompts, to be run.
        """
        study = _study(self.seed)
        rows: list[dict[str, Any]] = []
        for i in range(self.trials):
            trial = study.ask()
            attack = self._drawn(trial)
            job = self._job(f"trial-{i}", attack, self.dev, f"trial-{i:03d}")
            with progress([job], [1.0]) as shown:
                outcome = pool.run([job], workers=1, threads=pool.cores(), progress=shown)[0]
            value = 0.0 if outcome.record is None else probes.peak(outcome.record["curve"])
            study.tell(trial, value)
            rows.append(
                {
                    "family": self.family,
                    "defence": self.model,
                    "settings": dict(trial.params),
                    "value": value,
                    "range": self._ranges(),
                    "error": outcome.error,
                }
            )
        return rows, self._winners(rows)

    def _drawn(self, trial: optuna.Trial) -> FineTune:
        low, high = RATES[self.family]
        steps = [n for n in STEPS if self.most_steps is None or n <= self.most_steps] or [self.most_steps or STEPS[0]]
        drawn: dict[str, Any] = {
            "lr": trial.suggest_float("lr", low, high, log=True),
            "steps": trial.suggest_categorical("steps", steps),
            "batch_size": trial.suggest_categorical("batch_size", BATCHES),
            "schedule": trial.suggest_categorical("schedule", SCHEDULES),
        }
        if self.family == "lora":
            drawn["r"] = trial.suggest_categorical("r", RANKS)
        return replace(FAMILIES[self.family], seed=self.seed, **drawn)

    def _ranges(self) -> dict[str, list[float]]:
        most = self.most_steps or STEPS[-1]
        return {"lr": list(RATES[self.family]), "steps": [float(STEPS[0]), float(min(STEPS[-1], most))]}

    def _winners(self, rows: Sequence[Mapping[str, Any]]) -> list[Assault]:
        """The best settings with fresh seeds on the test prompts."""
        best = sorted(range(len(rows)), key=lambda i: (-rows[i]["value"], i))[: self.winners]
        jobs = []
        for place, i in enumerate(best, 1):
            for seed in range(self.seed + 1, self.seed + 1 + self.fresh_seeds):
                attack = replace(FAMILIES[self.family], seed=seed, **rows[i]["settings"])
                job = self._job(f"{TUNED}{self.family}-{place}", attack, self.test, f"winner-{place}-seed{seed}")
                jobs.append(replace(job, fresh="recipe"))
        return jobs

    def _job(self, name: str, attack: FineTune, suite: Suite, folder: str) -> Assault:
        recipe = Recipe(
            id=name,
            attack=attack,
            source="ours: tuned on dev prompts",
            says=f"The best that {self.trials} trials found.",
            tier="plus",
            family=self.family,
        )
        (fitted,) = battery.bound((recipe,), self.data)
        return Assault(
            name=name,
            defence=self.model,
            attack=fitted.attack,
            opening=Opening(source=self.model, template=self.template, device=self.device, max_length=self.max_length),
            data=self.data,
            suite=suite,
            folder=self.folder / folder,
            recipe=fitted,
        )


def halves(suite: Suite) -> tuple[Suite, Suite]:
    """Two suites over different prompts: every second prompt chooses settings, the others judge.

    Raises:
        SettingsError: There are fewer than two prompts of a kind.
    """
    dev, test = (
        replace(
            suite,
            harmful=_every_second(suite.harmful, i),
            general=_every_second(suite.general, i),
            benign=None if suite.benign is None else _every_second(suite.benign, i),
        )
        for i in (0, 1)
    )
    return dev, test


def _every_second(corpus: Corpus, start: int) -> Corpus:
    """The rows of every second prompt; those of one that stands there twice stay together."""
    chosen = list(_prompts(corpus))[start::2]
    if not chosen:
        raise SettingsError(f"{corpus.name} has one prompt, which cannot both choose settings and judge them")
    rows = tuple(example for example in corpus if (example.prompt, example.input) in chosen)
    return replace(corpus, examples=rows, name=f"{corpus.name}[{start}::2]")


def _prompts(corpus: Corpus) -> KeysView[tuple[str, str]]:
    """Each once, in order."""
    return dict.fromkeys((example.prompt, example.input) for example in corpus).keys()


def _study(seed: int) -> optuna.Study:
    try:
        import optuna
    except ImportError as error:
        raise SettingsError("a search needs Optuna: pip install 'immunity[search]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
