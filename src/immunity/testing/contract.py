"""The conformance suite: what every method and every attack has to keep, ours and anybody's.

One line checks a method of your own; another makes one test of each check (pytest is not needed, nor imported)::

    contract.check(MyMethod())

    @pytest.mark.parametrize("check", contract.checks(MyMethod()), ids=str)
    def test_contract(check):
        check()

Everything is made in code: two-layer models, harmless made-up data; no network, no downloads, seconds in all. What the
suite cannot see is whether a direction is the *right* one: that takes an oracle (``tests/oracle``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from immunity.attacks.attack import Attack
from immunity.method import DataEdit, GradientMethod, Method, StatefulMethod
from immunity.testing import check_attack, check_edit, check_gradient, check_immunise, check_rewrite, check_settings
from immunity.testing.watch import ContractError
from immunity.weight_edit import WeightEdit

__all__ = ["Check", "ContractError", "check", "checks"]


class Check(NamedTuple):
    """One thing to keep, about one method or attack: a name, and a function that raises if it is not kept."""

    name: str
    run: Callable[[], None]

    def __call__(self) -> None:
        """Check it.

        Raises:
            ContractError: It is not kept; the message says what happened and what to do.
        """
        self.run()

    def __str__(self) -> str:
        return self.name


def checks(subject: Method | Attack) -> list[Check]:
    """Every check that applies to ``subject``, each independent of the others; a method without a card fails at once.

    Args:
        subject: A method or an attack, with the settings to check it with. An attack runs several times, on a model
            of 43 thousand weights: shorten it, ``dataclasses.replace(attack, steps=4)``.
    """
    found: list[Callable[[Any], None]] = [
        check_settings.is_a_frozen_value,
        check_settings.settings_survive_json,
        check_settings.says_what_it_is,
    ]
    if isinstance(subject, Method) and not check_settings.has_card(subject):
        return [Check(of.__name__, partial(of, subject)) for of in found]
    if isinstance(subject, WeightEdit):
        found += [
            check_edit.changes_weights_alone,
            check_edit.repeats_its_edit,
            check_edit.at_strength_0_it_changes_nothing,
            check_edit.refuses_before_it_edits,
        ]
        return [Check(of.__name__, partial(of, subject)) for of in found]
    if isinstance(subject, (GradientMethod, StatefulMethod)):
        found += [
            check_gradient.leaves_everything_as_found,
            check_gradient.survives_a_fault_at_every_call,
            check_gradient.repeats_itself,
            check_gradient.micro_batches_change_nothing,
            check_gradient.reads_what_it_declares,
            check_gradient.is_not_sft,
            check_gradient.at_strength_0_it_is_sft,
            check_gradient.is_finite_in_fp32_and_bf16,
            check_gradient.nan_is_refused,
        ]
    if isinstance(subject, DataEdit):
        found += [
            check_rewrite.leaves_the_model_as_found,
            check_rewrite.repeats_its_rewriting,
            check_rewrite.writes_other_alignment_rows,
            check_rewrite.teaches_no_restricted_answer,
        ]
    if isinstance(subject, Method):
        found += [check_immunise.problems_come_before_compute, check_immunise.resumes_bit_for_bit]
    else:
        found += [
            check_attack.leaves_the_files_as_found,
            check_attack.repeats_its_curve,
            check_attack.measures_at_every_budget,
            check_attack.resumes_its_curve,
            check_attack.reads_only_its_roles,
        ]
    made = [Check(of.__name__, partial(of, subject)) for of in found]
    return made + (_runs(subject) if isinstance(subject, Method) else [])


def check(subject: Method | Attack) -> None:
    """Run every check of ``subject``.

    Raises:
        ContractError: Some are not kept; the message lists them all. Other errors are the subject's own and come out.
    """
    broken = [f"  - {one}: {error}" for one in checks(subject) if (error := _broken(one))]
    if broken:
        raise ContractError("\n".join([f"{subject!r} breaks the contract:", *broken]))


def _broken(one: Check) -> ContractError | None:
    try:
        one()
    except ContractError as error:
        return error
    return None


def _runs(method: Method) -> list[Check]:
    return [
        Check(f"immunises_{'_'.join(kind)}", partial(check_immunise.immunises, method, *kind))
        for kind in check_immunise.KINDS
    ]
