"""Inspect: its tasks, asked of our models, as plain rows.

The package ``inspect-ai`` (extra "inspect", Python 3.11 or later) reads tasks, solves and scores; a model provider made
here answers with :class:`~immunity.measure.reader.Reader`, greedily. No server is started: the control endpoint, which
Inspect opens by default, is off. Tools, pictures and conversations of several turns are refused, because models are
asked in templates of one turn.
"""

from __future__ import annotations

import difflib
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from immunity.errors import DataError, ImmunityError, MissingExtraError, SettingsError
from immunity.measure.reader import Reader
from immunity.metrics import benchmark_results, benchmarks
from immunity.metrics.benchmarks import Row
from immunity.models import LanguageModel

_LONGEST: Final = 256
"""Tokens of an answer where a task does not say."""
_BROKEN: Final = (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, SyntaxError, RuntimeError)
"""What a task's own Python may raise."""
_WAIT: Final = 0.01
"""Seconds that a question waits for others, to be asked in one batch with them."""


def known(tasks: Sequence[str], folder: Path | None = None) -> list[str]:
    """What Inspect calls the tasks; looked up before anything is computed or fetched.

    Args:
        tasks: Names of functions marked ``@task`` in files of the folder, or PACKAGE/NAME of an installed package such
            as inspect_evals.
        folder: Where tasks are written, in Python.

    Raises:
        MissingExtraError: inspect-ai is not installed.
        SettingsError: No task is named, or one does not exist. The message has the closest names.
    """
    try:
        from inspect_ai import list_tasks
    except ImportError as error:
        raise MissingExtraError(
            'benchmarks by Inspect need the package, and Python 3.11: pip install "immunity[inspect]"'
        ) from error
    if not tasks:
        raise SettingsError("no task is named")
    if folder is not None and not folder.is_dir():
        raise SettingsError(f"{folder}: no such folder of tasks")
    place = None if folder is None else folder.resolve()
    found = [] if place is None else list_tasks(root_dir=place)
    here = {one.name: f"{place}/{one.file}@{one.name}" for one in found}
    return [here[task] if task in here else _installed(task, sorted(here)) for task in tasks]


def _installed(task: str, names: Sequence[str]) -> str:
    package, _, name = task.partition("/")
    if name and find_spec(package.replace("-", "_")) is not None:
        return task
    if name:
        raise SettingsError(f"the task {task!r} is one of the package {package}, which is not installed")
    close = difflib.get_close_matches(task, names, n=3)
    has = f"the folder has {', '.join(names)}" if names else "name a folder of tasks, or PACKAGE/NAME"
    raise SettingsError(f"no task is called {task!r}; {f'did you mean {close[0]}?' if close else has}")


def rows(
    model: LanguageModel,
    tasks: Sequence[str],
    *,
    folder: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    window: int | None = None,
    logs: Path | None = None,
) -> list[Row]:
    """Ask a model the questions of some tasks; see :mod:`immunity.metrics.benchmarks` for what a row is.

    Args:
        model: Not changed.
        tasks: See :func:`known`. They are Python, and it is run.
        folder: Where they are written.
        limit: The first so many questions of each task; None: all.
        seed: What tasks that draw are given.
        batch_size: Rows at once.
        window: Tokens that the model reads at most; None: as many as it has positions.
        logs: Where Inspect's own logs go, for its viewer; None: nowhere.

    Raises:
        MissingExtraError: inspect-ai is not installed.
        SettingsError: A task does not exist.
        DataError: A task failed; the message has its reason.
    """
    if limit is not None and limit < 1:
        raise SettingsError(f"limit = {limit}: ask at least one question")
    wanted = known(tasks, folder)
    reader = Reader(model, batch_size=batch_size, window=window)
    from inspect_ai import eval as ask
    from inspect_ai._util.error import PrerequisiteError  # its public functions raise it, and it is no built-in error

    with _as_found(), tempfile.TemporaryDirectory() as nowhere:
        try:
            found = ask(
                wanted,
                model=_model(reader),
                limit=limit,
                seed=seed,
                log_dir=str(nowhere if logs is None else logs.resolve()),
                display="none",
                log_level="error",
                log_realtime=False,
                ctl_server=False,
                score_display=False,
                max_tasks=1,
                max_connections=batch_size,
            )
        except (*_BROKEN, PrerequisiteError) as error:
            raise DataError(f"{', '.join(tasks)}: Inspect cannot run it ({type(error).__name__}: {error})") from error
        for log in found:
            if log.status != "success":
                why = log.error.message if log.error is not None else log.status
                raise DataError(f"{log.eval.task}: Inspect ended with {log.status}: {why}")
        return benchmark_results.of_inspect([log.model_dump(mode="json") for log in found])


def comparison_rows(model: LanguageModel, baseline: LanguageModel, tasks: Sequence[str], **how: Any) -> list[Row]:  # noqa: ANN401 - of rows()
    """Both models on the same questions, as :func:`immunity.metrics.stability.stability` takes them.

    Args:
        model: The hardened model.
        baseline: The one before.
        tasks: See :func:`known`.
        how: The other arguments of :func:`rows`.
    """
    return benchmarks.paired(rows(model, tasks, **how), rows(baseline, tasks, **how))


@dataclass
class _Desk:
    """Questions that come one by one, answered together.

    Attributes:
        answers: (prompts, tokens, stops) -> answers.
    """

    answers: Callable[[list[str], int, tuple[str, ...]], list[str]]
    waiting: dict[int, tuple[str, int, tuple[str, ...]]] = field(default_factory=dict)
    done: dict[int, str | ImmunityError] = field(default_factory=dict)
    taken: int = 0

    async def ask(self, prompt: str, tokens: int, stops: tuple[str, ...]) -> str:
        """The answer, after a moment in which others may come."""
        import anyio

        ticket, self.taken = self.taken, self.taken + 1
        self.waiting[ticket] = (prompt, tokens, stops)
        await anyio.sleep(_WAIT)
        if ticket not in self.done:
            self._serve()
        found = self.done.pop(ticket)
        if isinstance(found, ImmunityError):
            raise found
        return found

    def _serve(self) -> None:
        waiting, self.waiting = self.waiting, {}
        for tokens, stops in dict.fromkeys((t, s) for _, t, s in waiting.values()):
            tickets = [i for i, (_, t, s) in waiting.items() if (t, s) == (tokens, stops)]
            try:
                said: Sequence[str | ImmunityError] = self.answers([waiting[i][0] for i in tickets], tokens, stops)
            except ImmunityError as error:
                said = [error] * len(tickets)
            self.done.update(zip(tickets, said, strict=True))


def _model(reader: Reader) -> Any:  # noqa: ANN401 - inspect-ai is optional
    """What Inspect asks: a provider of its own kind in front of a reader."""
    from inspect_ai.model import GenerateConfig, ModelAPI, ModelOutput, get_model, modelapi

    def answers(prompts: list[str], tokens: int, stops: tuple[str, ...]) -> list[str]:
        return reader.answers(prompts, max_new_tokens=tokens, until=stops)

    desk, name = _Desk(answers), reader.model.source

    class Ours(ModelAPI):  # type: ignore[misc]
        """A reader with Inspect's names."""

        async def generate(self, input: Sequence[Any], tools: Sequence[Any], tool_choice: object, config: Any) -> Any:  # noqa: ANN401, ARG002
            _refuse(input, tools, config)
            prompt = "\n\n".join(turn.text.strip() for turn in input)
            text = await desk.ask(prompt, config.max_tokens or _LONGEST, tuple(config.stop_seqs or ()))
            return ModelOutput.from_content(model=name, content=text)

        def max_tokens(self) -> int:
            return _LONGEST

        def max_connections(self) -> int:
            return reader.batch_size

    modelapi(name="immunity")(Ours)
    return get_model(f"immunity/{name}", config=GenerateConfig(), memoize=False)


def _refuse(turns: Sequence[Any], tools: Sequence[Any], config: Any) -> None:  # noqa: ANN401
    """Say what cannot be asked.

    Raises:
        SettingsError: It is asked for.
    """
    roles = [turn.role for turn in turns]
    why = ""
    if tools:
        why = "gives the model tools"
    elif roles.count("user") != 1 or set(roles) - {"system", "user"}:
        why = "is a conversation of several turns"
    elif any(not isinstance(turn.content, str) and any(part.type != "text" for part in turn.content) for turn in turns):
        why = "shows more than text"
    elif (config.temperature or 0.0) > 0.0 or (config.num_choices or 1) > 1:
        why = "wants sampled answers, and only greedy ones are given here"
    if why:
        raise SettingsError(f"the task {why}; leave it out")


@contextmanager
def _as_found() -> Iterator[None]:
    """Inspect sets up logging for the whole process; afterwards it is as it was."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        for handler in [h for h in root.handlers if h not in handlers]:
            root.removeHandler(handler)
        for handler in [h for h in handlers if h not in root.handlers]:
            root.addHandler(handler)
        root.setLevel(level)
