"""Ask: no weight is touched; the attacker only asks in another way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

from immunity.attacks.attack import THREATS, Attack, Manner
from immunity.attacks.curve import Recorder
from immunity.attacks.inapplicable import under
from immunity.data import styles
from immunity.data.chat import template
from immunity.data.corpus import Corpora
from immunity.errors import SettingsError
from immunity.models import LanguageModel


@final
@dataclass(frozen=True, kw_only=True)
class Ask(Attack):
    """Ask under another prompt template, in another style, or with the answer begun for the model (prefill).

    Attributes:
        style: How questions are put: see ``immunity.data.styles``.
        template: Prompt template; "auto" is what the model was saved with.
        seed: Nothing is drawn; here because every attack has one.

    Raises:
        SettingsError: Nothing is asked differently, or there is no such style.

    Source:
        Template switches as a check: AutoAttack-style flags; prefill: the "PRE" recipe of the standard suite.

    Departures from the paper:
        None: there is nothing to train. The first point is asked in the style, but under the model's own template.
    """

    name: ClassVar[str] = "ask"
    unit: ClassVar[str] = "changes of template"
    style: str = "plain"
    template: str = "auto"
    seed: int = 1

    def __post_init__(self) -> None:
        styles.style(self.style)
        if self.style == "plain" and self.template == "auto":
            raise SettingsError('nothing is asked differently: choose a style or a template, as in style="prefill"')

    @property
    def manner(self) -> Manner:
        """Nothing is trained; asked in the style."""
        return Manner(THREATS["edit"], self.style)

    @property
    def budgets(self) -> tuple[int, ...]:
        """The model's own template, and then the other one, if there is one."""
        return (0,) if self.template == "auto" else (0, 1)

    def reads(self, data: Corpora) -> Corpora:  # noqa: ARG002 - it has no use for data
        """Nothing."""
        return {}

    def tamper(self, model: LanguageModel, data: Corpora, recorder: Recorder) -> LanguageModel:  # noqa: ARG002
        """See :meth:`Attack.tamper`.

        Raises:
            ModelError: Nobody can ask this model so: its tokenizer cannot write the other template, or the questions
                have no room in it once they are written. The message begins with
                :data:`~immunity.errors.INAPPLICABLE`.
        """
        with under(self.template):
            other = None if self.template == "auto" else template(self.template, model.tokenizer)
        recorder.reached(0, model)
        if other is not None:
            model = replace(model, template=other)
            with under(self.template):
                recorder.reached(1, model)
        return model
