"""WeightEdit: the shape of a defence that changes weights once, against another model's, and trains nothing."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, final

import torch

from immunity.data.corpus import Corpora
from immunity.method import Method, Run, problems, refuse
from immunity.models import LanguageModel
from immunity.stored import Stored


class WeightEdit(Method):
    """A method that edits weights in place: no data, no steps, no gradient.

    Attributes:
        base: A setting of each: what the model was made from, as :class:`~immunity.stored.Stored` takes it. "" is
            nobody's; :meth:`Method.problems` says so.
    """

    trains: ClassVar[bool] = False
    base: str

    @abstractmethod
    def edit(self, model: LanguageModel, before: Stored) -> Mapping[str, float]:
        """Change weights of ``model`` in place, without gradients, and say what was done, for the log.

        Args:
            model: Without an adapter; in the precision that it will be saved in.
            before: The weights of :attr:`base`, read one tensor at a time.
        """

    @property
    @final
    def reads(self) -> Mapping[str, int]:
        """No data."""
        return {}

    @final
    def immunise(self, model: LanguageModel, data: Corpora, run: Run) -> None:
        """Edit, as one step of a run.

        Raises:
            SettingsError: :func:`~immunity.method.problems` found something; the message lists all of it.
        """
        refuse(problems(self, model, data))
        if run.observe is not None:
            run.observe(0, {})
        with torch.no_grad():
            found = self.edit(model, Stored(self.base))
        if run.folder is not None:
            run.folder.mkdir(parents=True, exist_ok=True)
            (run.folder / "metrics.jsonl").write_text(json.dumps({"step": 1, **found}) + "\n", encoding="utf-8")
        if run.observe is not None:
            run.observe(1, found)
