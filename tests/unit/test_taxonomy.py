"""The taxonomy of `immunity list`: every method in its block and family, with what it costs and needs."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import get_args

import pytest
from typer.testing import CliRunner

from immunity import cli
from immunity.cli import console, prose, taxonomy
from immunity.method import Block
from immunity.methods import METHODS, PRESETS
from immunity.methods.ctrap import CTRAP
from immunity.methods.ntl import NTL
from immunity.methods.sft import SFT


def listed(*words: str, columns: int = 80) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console.out, "_width", columns)  # COLUMNS counts only before it is made
        done = CliRunner().invoke(cli.program(), ["list", *words])
    assert done.exit_code == 0
    return done.output


@pytest.fixture(scope="module")
def overview() -> str:
    return listed(columns=400).partition("\nattacks: ")[0]


def test_there_are_two_blocks_and_three_families_in_the_first():
    assert set(taxonomy.BLOCKS) == set(get_args(Block))
    assert list(taxonomy.BLOCKS)[:2] == ["raises the cost of harmful convergence", "conditional collapse"]
    assert list(taxonomy.FAMILIES)[:3] == ["adversarial meta-learning", "representation", "geometric"]


def test_every_method_stands_on_one_shelf():
    names = [name for shelf in taxonomy.shelves(METHODS) for name in shelf.names]
    assert sorted(names) == sorted(METHODS)
    shelf = {name: one for one in taxonomy.shelves(METHODS) for name in one.names}
    assert shelf["ntl"][:2] == ("raises the cost of harmful convergence", "adversarial meta-learning")
    assert shelf["ctrap"][:2] == ("conditional collapse", "")
    assert shelf["sft"][:2] == ("baseline", "")


@pytest.mark.parametrize(
    ("name", "family", "wanted"),
    [
        ("SOPHON", "bi-level", "adversarial meta-learning"),
        ("Booster", "look-ahead", "representation"),
        ("LoX", "low rank", "geometric"),
        ("VAA", "group-robust alignment", taxonomy.OTHERS),
        ("Somebody's", "geometric", "geometric"),  # a card that says it goes before the names
        ("Booster", "geometric", "geometric"),
    ],
)
def test_a_family_is_what_the_card_says_or_where_the_taxonomy_names_it(name, family, wanted):
    assert taxonomy.family(replace(NTL.card, name=name, family=family)) == wanted
    assert taxonomy.family(replace(CTRAP.card, name=name, family=family)) == ""


def test_shelves_are_in_order_without_empty_ones_and_methods_by_year():
    def kind(name, year, family="geometric"):
        return type(name, (NTL,), {"card": replace(NTL.card, name=name, year=year, family=family)})

    found = taxonomy.shelves({"b": SFT, "new": kind("new", 2030), "old": kind("old", 2000), "x": kind("x", 1, "y")})
    assert [(shelf.family, shelf.names) for shelf in found] == [
        ("geometric", ("old", "new")),
        (taxonomy.OTHERS, ("x",)),
        ("", ("b",)),
    ]


@pytest.mark.parametrize("name", METHODS)
def test_the_overview_says_paper_year_cost_roles_and_departures(overview, name):
    kind = METHODS[name]
    start = re.search(rf"^{re.escape(name)} ", overview, re.MULTILINE)
    lines = overview[start.start() :].splitlines()[:3]
    said = " ".join(" ".join(lines).split())
    assert kind.card.says in said
    assert kind.card.paper in said
    assert kind.card.arxiv in said
    assert not kind.card.arxiv or str(kind.card.year) in said
    assert f"gradients a step: {kind.card.gradients}" in said
    assert f"reads {taxonomy.roles(PRESETS[name]['default'])}" in said
    assert taxonomy.departed(kind) in said


def test_it_fits_80_columns_and_no_word_is_lost():
    shown = listed()
    assert all(len(line) <= 80 for line in shown.splitlines())
    words = set(listed(columns=400).partition("\nattacks: ")[0].split())
    assert words <= set(shown.split())


@pytest.mark.parametrize("name", METHODS)
def test_a_method_explained_has_its_departures_in_full(name):
    said = " ".join(listed(name).split())
    for point in prose.departures(METHODS[name]):
        assert prose.plain(point) in said
    assert f"data that it reads: {taxonomy.roles(PRESETS[name]['default'])}" in said


def test_departures_are_counted_point_by_point():
    assert prose.departures(SFT) == ()
    assert taxonomy.departed(SFT) == "no departure known"
    assert len(prose.departures(NTL)) == 5
    assert taxonomy.departed(NTL) == "5 departures"

    class One:
        """Says.

        Departures from the paper:
            A sentence that is
            not a list.
        """

    assert prose.departures(One) == ("A sentence that is not a list.",)
    assert taxonomy.departed(One) == "1 departure"
    assert prose.departures(type("Silent", (), {})) == ()


def test_sections_of_a_docstring():
    class Kind:
        """Lead: on a line.

        More of it.

        Attributes:
            a: First,
                and more ``code``.
            b: Second, *stressed*: see :meth:`x`.

        Source:
            Somewhere.
        """

    assert prose.sections(Kind).keys() == {"", "Attributes", "Source"}
    assert prose.sections(Kind)[""] == "Lead: on a line.\n\nMore of it."
    assert prose.described(Kind) == {"a": "First, and more code.", "b": "Second, stressed: see x."}
    assert prose.attributes(Kind)["a"] == "First, and more ``code``."
