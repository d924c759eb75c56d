"""A battery on a model and its baselines: run it, show what broke and what did not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from immunity.cli.console import bars, out
from immunity.cli.single import Task

if TYPE_CHECKING:
    from immunity.measure.suite import Suite


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is special about a battery.

    Attributes:
        battery: Its name.
        base: The model before it was hardened, if attackers have it.
        scale: Settings of the fine-tune that adaptive attacks vary, as the user wrote them.
        exhaustive: Go on with other attacks when the model is broken.
        whole_curves: Go on with an attack that has broken it.
        max_steps: Cap on the steps of each attack.
        search: Trials of a search in each family; 0 for none.
        fresh_seeds: More seeds for each family's best attack.
        phi: Tolerated share of harmful answers.
        dev: What a search measures its trials on; None halves the prompts.
    """

    battery: str
    base: str | None
    scale: list[str]
    exhaustive: bool
    whole_curves: bool
    max_steps: int | None
    search: int
    fresh_seeds: int
    phi: float
    dev: Suite | None


def run(task: Task, plan: Plan) -> int:
    """Run the battery; 0 if anything could be measured.

    Raises:
        SettingsError: A setting is out of range.
        DataError: The attacker lacks data.
    """
    from immunity.attacks.finetune import FineTune
    from immunity.bench import store
    from immunity.bench.tamper import AutoTamper
    from immunity.cli.tables import battery_tables
    from immunity.report import page
    from immunity.spec import build, pairs

    tamper = AutoTamper(
        model=task.models[0],
        baselines=task.models[1:],
        battery=plan.battery,
        folder=task.folder,
        base=plan.base,
        scale=build(FineTune(), pairs(plan.scale, "--scale")),
        data=task.data,
        suite=task.suite,
        dev=plan.dev,
        seed=task.seeds[0] if task.seeds else 1,
        repeats=task.seeds[1:],
        fresh_seeds=plan.fresh_seeds,
        phi=plan.phi,
        exhaustive=plan.exhaustive,
        whole_curves=plan.whole_curves,
        most_steps=plan.max_steps,
        search=plan.search,
        looks=task.looks,
        template=task.opening.template,
        device=task.opening.device,
        max_length=task.opening.max_length,
        workers=task.workers,
        threads=task.threads,
    )
    result = tamper.run(bars)
    written = page.write(result, task.folder / "report.html")
    battery_tables(result)
    out.print(
        f"open {written} in a browser; the numbers are in {task.folder / store.RESULT}", markup=False, soft_wrap=True
    )
    return 0 if result["curves"] else 1
