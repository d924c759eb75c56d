"""What a method wrote itself is kept in its run's folder, made once, and shown only where it may be."""

from __future__ import annotations

import json
from dataclasses import dataclass
from io import StringIO

import pytest
from rich.console import Console

from immunity.cli.tables import written_table
from immunity.data.corpus import Corpus, Example
from immunity.data.written import FOLDER, HARMLESS, HIDDEN, MEASURED, WIDTH, kept, shown
from immunity.errors import DataError, ResumeError
from immunity.fit import Fit
from immunity.method import Run
from immunity.methods.sdd import SDD
from immunity.testing import tiny
from immunity.testing.watch import corpus

ROW = Example("Why?", "Because.\x1b[31m\nreally", "now", {HARMLESS: "yes", "similarity": "0.1"})
MADE = Corpus("alignment", (ROW, Example("Secret?", "no")), "made", "CC0-1.0", {"too long": 2})


@dataclass
class Counted:
    calls: int = 0

    def __call__(self) -> tuple[Corpus, ...]:
        self.calls += 1
        return (MADE,)


def test_it_is_made_once_for_each_identity(tmp_path):
    write = Counted()
    for _ in range(2):
        (back,) = kept(tmp_path, {"seed": 1}, write)
        assert back == MADE
        assert dict(back.examples[0].tags) == dict(ROW.tags)
    assert write.calls == 1
    kept(tmp_path, {"seed": 2}, write)
    assert write.calls == 2
    kept(None, {"seed": 2}, write)
    assert write.calls == 3


def test_a_kill_while_writing_leaves_nothing_that_is_read(tmp_path):
    def killed() -> tuple[Corpus, ...]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path, {}, killed)
    write = Counted()
    assert kept(tmp_path, {}, write) == (MADE,)
    assert write.calls == 1


@pytest.mark.parametrize("text", ["{", "[{}]", '[{"role": "alignment", "examples": [{"no": 1}], "name": "x"}]'])
def test_a_damaged_file_is_named(tmp_path, text):
    kept(tmp_path, {}, Counted())
    (path,) = (tmp_path / FOLDER).iterdir()
    path.write_text(text)
    with pytest.raises(DataError, match=path.name):
        kept(tmp_path, {}, Counted())


def test_what_is_shown_is_one_short_line_and_nothing_that_nobody_called_harmless(tmp_path):
    long = Corpus("alignment", (Example("x" * 500, "y", "", {HARMLESS: "yes"}),), "long")
    kept(tmp_path, {}, lambda: (MADE, long))
    first, second = shown(tmp_path)
    assert first["shown"][0] == {"prompt": "Why? now", "response": "Because. [31m really"}
    assert first["shown"][1] == {"prompt": HIDDEN, "response": HIDDEN}
    assert first["skipped"] == {"too long": 2}
    assert len(second["shown"][0]["prompt"]) == WIDTH
    assert second["shown"][0]["prompt"].endswith("…")
    assert "Secret" not in json.dumps(shown(tmp_path))
    assert shown(tmp_path / "nowhere") == []


def test_what_was_measured_of_examples_is_shown_as_means(tmp_path):
    measured = tuple(Example("Why?", "So.", tags={f"{MEASURED}before": f"{n}", "gold": "3"}) for n in (1.5, 2.0, 4.0))
    kept(tmp_path, {}, lambda: (MADE, Corpus("alignment", (*measured, *MADE.examples), "both")))
    plain, both = shown(tmp_path)
    assert "measured" not in plain
    assert both["measured"] == {"rows": 3, "before": 2.5}
    console = Console(width=120, file=StringIO())
    console.print(written_table([plain, both]))
    assert "… 5 rows: both" in console.file.getvalue()
    assert "3 made, on average: before 2.5" in console.file.getvalue()


def test_the_table_shows_text_as_it_is(tmp_path):
    marked = Corpus("alignment", (Example("[bold]Why?[/nothing]", "[red]no", "", {HARMLESS: "yes"}),), "[x]")
    kept(tmp_path, {}, lambda: (marked,))
    console = Console(width=100, file=StringIO())
    console.print(written_table(shown(tmp_path)))
    text = console.file.getvalue()
    assert all(words in text for words in ("[bold]Why?[/nothing]", "[red]no", "… 1 rows: [x]"))


DATA = {role: corpus(role) for role in ("harmful", "general")}


def test_a_resumed_run_does_not_rewrite_and_other_settings_are_refused(tmp_path, monkeypatch):
    run = Run(fit=Fit(steps=2, lr=1e-3, save_every=1), default_batch_size=3, folder=tmp_path)
    SDD().immunise(tiny.language_model(), DATA, run)
    calls, real = [], SDD.rewrite
    monkeypatch.setattr(SDD, "rewrite", lambda *given: (calls.append(1), real(*given))[1])
    SDD().immunise(tiny.language_model(), DATA, run)
    assert not calls
    with pytest.raises(ResumeError, match="settings"):
        SDD(tau=0.5).immunise(tiny.language_model(), DATA, run)
