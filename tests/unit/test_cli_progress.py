"""Progress: the time left is learnt from what was seen, and without a terminal there are plain lines."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from immunity.bench.worker import Outcome
from immunity.cli import console, pace
from immunity.errors import INAPPLICABLE


def job(title: str, steps: int, measured: frozenset[int] = frozenset()) -> SimpleNamespace:
    return SimpleNamespace(title=title, steps=steps, measured_at=measured)


class TestPace:
    def test_nothing_is_claimed_before_anything_is_seen(self):
        p = pace.Pace([1.0], [10], [frozenset()])
        assert p.left(0) is None
        p.tell(0, 0, 100.0)
        assert p.left(0) is None
        assert p.left_in_all() is None

    def test_a_resumed_run_is_not_credited_with_steps_of_before(self):
        p = pace.Pace([1.0], [100], [frozenset()])
        p.tell(0, 90, 1000.0)
        p.tell(0, 91, 1002.0)
        assert p.left(0) == pytest.approx(9 * 2.0)

    def test_measurements_are_reckoned_apart(self):
        p = pace.Pace([1.0], [10], [frozenset({0, 1, 2, 10})])
        for done, now in ((0, 0.0), (1, 7.0), (2, 14.0), (3, 15.0), (4, 16.0)):
            p.tell(0, done, now)
        assert p.left(0) == pytest.approx(5 * 1.0 + 1 * 7.0)

    def test_a_dearer_job_that_has_not_begun(self):
        p = pace.Pace([1.0, 5.0], [10, 10], [frozenset(), frozenset()])
        p.tell(0, 0, 0.0)
        p.tell(0, 1, 2.0)
        assert p.left(1) == pytest.approx(10 * 5 * 2.0)
        assert p.left_in_all() == pytest.approx(9 * 2.0 + 100.0)
        p.tell(1, 0, 2.0)
        assert p.left_in_all() == pytest.approx(100.0), "side by side, the longer one counts"

    def test_ended_jobs_need_no_time(self):
        p = pace.Pace([1.0, 1.0], [4, 4], [frozenset(), frozenset()])
        p.tell(0, 0, 0.0)
        p.tell(0, 1, 1.0)
        p.ended(1)
        assert p.left_in_all() == pytest.approx(3.0)
        p.ended(0)
        assert p.left_in_all() == 0.0
        assert p.share() == 1.0

    @given(st.lists(st.tuples(st.integers(1, 30), st.floats(0.1, 9)), min_size=1, max_size=4), st.data())
    def test_what_is_left_is_never_negative(self, jobs, data):
        steps, costs = zip(*jobs, strict=True)
        measured = [data.draw(st.frozensets(st.integers(0, n))) for n in steps]
        p = pace.Pace(costs, steps, measured)
        now = 0.0
        for i, n in enumerate(steps):
            for done in range(n + 1):
                now += 1.0
                p.tell(i, done, now)
                assert (p.left(i) or 0.0) >= -1e-9
                assert 0 <= p.share() <= 1 + 1e-9
            p.ended(i)
        assert p.left_in_all() in (None, pytest.approx(0.0))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.4, "59 s"), (61, "1 min 01 s"), (3600, "1 h 00 min"), (11240, "3 h 07 min")]
)
def test_duration(seconds, text):
    assert pace.duration(seconds) == text


class TestBars:
    def test_plain_lines_without_a_terminal(self, capsys, monkeypatch):
        monkeypatch.setattr(console, "EVERY", 0.0)
        jobs = [job("one [x]", 3), job("two", 2), job("three", 2), job("four", 2)]
        with console.bars(jobs, [1.0, 2.0, 1.0, 1.0]) as shown:
            shown.began(0)
            shown(0, 1, {})
            shown(0, 2, {"nll/a": 0.5, "nll/a@1": 9.0, "lr": 0.1})
            shown(0, 3, {"nll/a": 0.25})
            shown.ended(Outcome(None, {}), 0)
            shown.began(1)
            shown.ended(Outcome(None, {}), 1)
            shown.began(2)
            shown.ended(Outcome(None, None, "why"), 2)
            shown.began(3)
            shown.ended(Outcome(None, None, f"{INAPPLICABLE} under the template x"), 3)
        lines = capsys.readouterr().err.splitlines()
        assert lines[0] == "started   one [x]"
        assert lines[1] == "goes on   one [x]: from step 1"
        assert lines[3] == "          one [x]: step 2/3, 0 s left, nll/a 0.50"
        assert [line.partition("  (")[0] for line in lines[4:]] == [
            "finished  one [x]",
            "started   two",
            "kept      two",
            "started   three",
            "failed    three",
            "started   four",
            "skipped   four",
        ]

    def test_data_that_are_rewritten_first_have_lines_of_their_own_and_are_no_steps(self, capsys, monkeypatch):
        monkeypatch.setattr(console, "EVERY", 0.0)
        with console.bars([job("one", 3)], [1.0]) as shown:
            shown.began(0)
            for done in (8, 12, 20):
                shown(0, 0, {"rewritten": done, "to rewrite": 20})
            assert shown.pace.left(0) is None
            shown(0, 0, {})
            shown(0, 1, {"nll/a": 0.5})
            task = shown.progress.tasks[0]
            assert (task.total, task.completed) == (3, 1)
            shown.ended(Outcome(None, {}), 0)
        lines = capsys.readouterr().err.splitlines()
        assert lines[1:3] == ["          one: rewriting 8/20", "          one: rewriting 12/20, 0 s left"]
        assert not any("20/20" in line for line in lines)

    def test_an_interruption_says_how_to_go_on(self, capsys, monkeypatch):
        import signal
        import sys

        import typer

        before = signal.getsignal(signal.SIGTERM)
        monkeypatch.setattr(sys, "argv", ["immunity", "attack", "a b", "--set", "x='y'"])
        for stop, code in ((KeyboardInterrupt, 130), (console._Terminated, 143)):
            with pytest.raises(typer.Exit) as ended, console.bars([job("one", 3)], [1.0]):
                raise stop
            assert ended.value.exit_code == code
            assert """immunity attack 'a b' --set 'x='"'"'y'"'"''""" in capsys.readouterr().err
        assert signal.getsignal(signal.SIGTERM) is before
