"""lm-evaluation-harness: its tasks, asked of our models, as plain rows.

The package ``lm-eval`` (extra "eval") reads tasks, makes prompts and scores; :class:`~immunity.measure.reader.Reader`
asks the model. No server is started. Tasks that read their data from the hub need a connection, or ``HF_HUB_OFFLINE=1``
and a filled cache; tasks of a folder that name local files need neither.

Departures from lm-eval's own ``hf`` model: prompts are written in our templates, few-shot examples inside the one user
turn; decoding is greedy whatever the checkpoint's generation settings say; white space around an answer is dropped
before stop words are looked for. Asked raw, its log-likelihoods are the same.
"""

from __future__ import annotations

import difflib
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from immunity.errors import DataError, MissingExtraError, SettingsError
from immunity.measure.reader import Reader
from immunity.metrics import benchmark_results, benchmarks
from immunity.metrics.benchmarks import Row
from immunity.models import LanguageModel

_DRAWS: Final = 1000
"""Resamples for the standard errors of what is no mean, such as F1 over a whole task."""
_TOKENS: Final = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_LONGEST: Final = 256
"""Tokens of an answer where a task does not say, as in lm-eval."""
_SILENT: Final = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0", "DO_NOT_TRACK": "1"}


def known(tasks: Sequence[str], folder: Path | None = None) -> None:
    """Look whether there are such tasks, before anything is computed or fetched.

    Args:
        tasks: Names of tasks, groups or tags.
        folder: Where further tasks are described, one YAML file each; they come before those of the package.

    Raises:
        MissingExtraError: lm-eval is not installed.
        SettingsError: No task is named, or one does not exist. The message has the closest names.
    """
    _manager(tasks, folder)


def rows(
    model: LanguageModel,
    tasks: Sequence[str],
    *,
    folder: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    shots: int | None = None,
    chat: bool = True,
    batch_size: int = 16,
    window: int | None = None,
) -> list[Row]:
    """Ask a model the questions of some tasks; see :mod:`immunity.metrics.benchmarks` for what a row is.

    Args:
        model: Not changed.
        tasks: Names of tasks, groups or tags.
        folder: See :func:`known`. Python that its files name is run.
        limit: The first so many questions of each task; None: all.
        seed: Of the draw of few-shot examples.
        shots: Examples before each question; None: what the task says.
        chat: Whether a question is the user's turn of the model's template, or text as it is.
        batch_size: Rows at once.
        window: Tokens that the model reads at most; None: as many as it has positions.

    Raises:
        MissingExtraError: lm-eval is not installed.
        SettingsError: A task does not exist, or asks for what is not done here.
        DataError: A task's description or data cannot be read.
        ModelError: A question or an answer does not fit into the model.
        DivergedError: The model gives no numbers.
    """
    if limit is not None and limit < 1:
        raise SettingsError(f"limit = {limit}: ask at least one question")
    manager = _manager(tasks, folder)
    reader = Reader(model, chat=chat, batch_size=batch_size, window=window)
    with _as_found(seed):
        from lm_eval.evaluator import evaluate

        loaded = _loaded(manager, tasks, shots=shots, seed=seed, chat=chat)
        try:
            found = evaluate(_model(reader), loaded, limit=limit, bootstrap_iters=_DRAWS, apply_chat_template=chat)
        except (LookupError, TypeError, AttributeError, AssertionError) as error:
            raise DataError(f"{', '.join(tasks)}: lm-eval fails on it ({type(error).__name__}: {error})") from error
    return benchmark_results.of_lm_eval(found)


def comparison_rows(model: LanguageModel, baseline: LanguageModel, tasks: Sequence[str], **how: Any) -> list[Row]:  # noqa: ANN401 - of rows()
    """Both models on the same questions, as :func:`immunity.metrics.stability.stability` takes them.

    Args:
        model: The hardened model.
        baseline: The one before.
        tasks: See :func:`rows`.
        how: The other arguments of :func:`rows`.
    """
    return benchmarks.paired(rows(model, tasks, **how), rows(baseline, tasks, **how))


def _manager(tasks: Sequence[str], folder: Path | None) -> Any:  # noqa: ANN401 - lm-eval is optional
    """lm-eval's index of tasks: of the folder alone if that has them all, because its own takes seconds to read."""
    for name, value in _SILENT.items():
        os.environ.setdefault(name, value)
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingExtraError('benchmarks by lm-eval need the package: pip install "immunity[eval]"') from error
    if not tasks:
        raise SettingsError("no task is named")
    if folder is not None:
        if not folder.is_dir():
            raise SettingsError(f"{folder}: no such folder of tasks")
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        if set(tasks) <= set(manager.all_subtasks):
            return manager
    manager = _everything() if folder is None else TaskManager(include_path=str(folder))
    names = list(manager.all_tasks)
    for task in tasks:
        if task not in names:
            close = difflib.get_close_matches(task, names, n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else f"; lm-eval has {len(names):,} of them"
            raise SettingsError(f"no task, group or tag is called {task!r}{hint}")
    return manager


@cache
def _everything() -> Any:  # noqa: ANN401
    """The index of lm-eval's own tasks, once for a process."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _loaded(manager: Any, tasks: Sequence[str], *, shots: int | None, seed: int, chat: bool) -> Any:  # noqa: ANN401
    """The tasks with their data.

    Raises:
        DataError: lm-eval cannot read one of them.
        SettingsError: One asks for what is not done here.
    """
    try:
        loaded = manager.load(list(tasks))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{', '.join(tasks)}: lm-eval cannot read it ({type(error).__name__}: {said}). "
            "Data from the hub need a connection or a filled cache; paths in a description start where you are"
        ) from error
    for name, task in loaded["tasks"].items():
        _check(name, task, chat=chat)
        if shots is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=shots)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    return loaded


def _check(name: str, task: Any, *, chat: bool) -> None:  # noqa: ANN401
    how = task.get_config("generation_kwargs") or {}
    why = ""
    if task.get_config("unsafe_code"):
        why = "runs code that the model wrote"
    elif how.get("do_sample") or float(how.get("temperature") or 0.0) > 0.0:
        why = "wants sampled answers, and only greedy ones are given here"
    elif chat and task.get_config("gen_prefix"):
        why = "begins the answer itself, which a chat template has no place for: ask it raw"
    if why:
        raise SettingsError(f"the task {name} {why}; leave it out")


def _model(reader: Reader) -> Any:  # noqa: ANN401
    """What lm-eval asks: its own interface around a reader."""
    from lm_eval.api.model import LM

    class Ours(LM):  # type: ignore[misc]
        """A reader with lm-eval's names."""

        tokenizer_name = reader.model.source

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            return list(reader.likelihoods([request.args for request in requests]))

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            return reader.rolling([request.args[0] for request in requests])

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            return _answers(reader, [request.args for request in requests])

        def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], **_: object) -> str:
            return "\n\n".join(turn["content"].strip() for turn in chat_history)

    return Ours()


def _answers(reader: Reader, asked: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Answers to (prompt, settings); those with the same settings together."""
    groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
    for i, (_, how) in enumerate(asked):
        until = how.get("until") or []
        stops = (until,) if isinstance(until, str) else tuple(until)
        tokens = next((int(how[key]) for key in _TOKENS if how.get(key) is not None), _LONGEST)
        groups.setdefault((tokens, stops), []).append(i)
    said = [""] * len(asked)
    for (tokens, stops), chosen in groups.items():
        texts = reader.answers([asked[i][0] for i in chosen], max_new_tokens=tokens, until=stops)
        for i, text in zip(chosen, texts, strict=True):
            said[i] = text
    return said


@contextmanager
def _as_found(seed: int) -> Iterator[None]:
    """Random numbers of Python, numpy and torch from a seed; afterwards the caller's are as they were."""
    python, numbers = random.getstate(), np.random.get_state()  # noqa: NPY002 - what lm-eval draws from
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)  # noqa: NPY002
