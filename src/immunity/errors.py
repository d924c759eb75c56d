"""Errors a user can act on. Each also inherits the standard-library error that it refines."""

from __future__ import annotations

from typing import Final

INAPPLICABLE: Final = "does not apply to this model"
"""How the error begins of what there is no way to do to a model, whoever tries: it is skipped, and has not failed."""


class ImmunityError(Exception):
    """Base of every error that this library raises on purpose."""


class SettingsError(ImmunityError, ValueError):
    """A setting is missing, contradictory or out of range. The message names it and says what to change."""


class DataError(ImmunityError, ValueError):
    """A data file, row or field cannot be used. The message names the file, the line and the field."""


class ModelError(ImmunityError, ValueError):
    """A model or tokenizer cannot be found, loaded, or used in the way that was asked."""


class PrecisionError(ImmunityError, ValueError):
    """Weights are in a precision in which a simulated step or a finite difference would be noise."""


class DivergedError(ImmunityError, ArithmeticError):
    """A loss or a gradient became NaN or infinite. The message names the step and the loss."""


class ResumeError(ImmunityError, RuntimeError):
    """A run folder holds another run's state, so going on from it would mix two runs."""


class MissingExtraError(ImmunityError, ImportError):
    """An optional dependency is needed. The message gives the command that installs it."""


class OutOfMemoryError(ImmunityError, MemoryError):
    """There is not enough memory for what was asked. The message gives the estimate and what to change."""
