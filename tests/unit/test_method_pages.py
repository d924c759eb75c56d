"""The pages of docs/methods are what the docstrings and cards say now, and they say it whole."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import fields
from pathlib import Path

import pytest

from immunity.cli.prose import departures
from immunity.methods import METHODS, PRESETS

SCRIPT = Path(__file__).parents[2] / "scripts" / "method_pages.py"


def load():
    spec = importlib.util.spec_from_file_location("method_pages", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


made = load()


def test_committed_pages_are_up_to_date():
    assert made.stale() == [], "run `make docs` and look at what changed"


def test_a_page_that_was_changed_is_missing_or_has_no_method_is_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(made, "FOLDER", tmp_path)
    monkeypatch.setattr(made.sys, "argv", ["method_pages.py"])
    assert set(made.stale()) == {"README.md", *(f"{name}.md" for name in METHODS)}
    made.main()
    assert made.stale() == []
    (tmp_path / "gone.md").write_text("# Gone\n", encoding="utf-8")
    (tmp_path / "ntl.md").write_text("# NTL\n", encoding="utf-8")
    (tmp_path / "sft.md").unlink()
    assert made.stale() == ["gone.md", "ntl.md", "sft.md"]
    monkeypatch.setattr(made.sys, "argv", ["method_pages.py", "--check"])
    with pytest.raises(SystemExit, match=r"out of date: gone\.md, ntl\.md, sft\.md; run `make docs`"):
        made.main()
    assert (tmp_path / "gone.md").exists()  # a check changes nothing
    monkeypatch.setattr(made.sys, "argv", ["method_pages.py"])
    made.main()
    assert made.stale() == []
    assert not (tmp_path / "gone.md").exists()


@pytest.mark.parametrize("name", METHODS)
def test_a_page_has_every_setting_preset_role_and_departure(name):
    page, kind, presets = made.page(name), METHODS[name], PRESETS[name]
    for one in fields(kind):
        assert re.search(rf"^\| `{one.name}` \| \S.* \|$", page, re.MULTILINE), one.name
    for preset in presets:
        assert preset in page
    for role in presets["default"].reads:
        assert re.search(rf"^\| `{role}` \| \d+ \| \S", page, re.MULTILINE), role
        assert f"--{role} " in page
    lines = page.partition("## Departures from the paper\n\n")[2].partition("\n\n## ")[0].splitlines()
    assert sum(line.startswith("* ") for line in lines) == len(departures(kind))
    assert f"--method {name}" in page
    if kind.card.arxiv:
        assert f"https://arxiv.org/abs/{kind.card.arxiv}" in page


def test_no_mark_of_a_docstring_is_left_and_rows_are_whole():
    for name, text in made.pages().items():
        assert ":meth:" not in text, name
        assert not re.search(r"(?<!`)``(?!`)", text), name
        heads = {line.count("|") - line.count(r"\|") for line in text.splitlines() if line.startswith("| ---")}
        widths = [line.count("|") - line.count(r"\|") for line in text.splitlines() if line.startswith("| ")]
        assert set(widths) == heads, name


def test_the_index_has_every_method_once_under_its_block():
    index = made.index()
    assert sorted(re.findall(r"^\| \[.*?\]\((.*?)\.md\)", index, re.MULTILINE)) == sorted(METHODS)
    blocks = re.split(r"^## ", index, flags=re.MULTILINE)
    inside = {block.partition("\n")[0]: block for block in blocks}
    assert "(ctrap.md)" in inside["Conditional collapse"]
    assert "(ntl.md)" in inside["Raises the cost of harmful convergence"].partition("### Adversarial meta-learning")[2]
    assert "(sft.md)" in inside["Baseline"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (":meth:`paper` and ``x < 1``", "`paper` and `x < 1`"),
        ('"an <word>"', r'"an \<word>"'),
        ("in [0, 1]", r"in \[0, 1\]"),
        ("L_A, log p(e | y_<t)", r"L_A, log p(e | y\_\<t)"),
        (":class:`~immunity.fit.Fit`", "`immunity.fit.Fit`"),
    ],
)
def test_docstrings_become_markdown(text, wanted):
    assert made.markdown(text) == wanted
