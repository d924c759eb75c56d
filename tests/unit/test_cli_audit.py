"""immunity audit, as a user meets it: what it says first, what it writes, and how it ends."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import truths
from cheats import templated
from commands import Main, commands
from immunity.bench.audit import Audit
from immunity.bench.audited import begin
from immunity.bench.ground import stand_ins
from immunity.bench.tiers import TIERS, Pace
from immunity.cli import audit as command
from immunity.data import synthetic
from immunity.measure.judges import JUDGES
from immunity.report.audit_words import VERDICTS

CONDITIONS = ("resistance", "stability", "generalisation", "trainability")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, dict[str, Any]]]:
    """A folder with a model and a little audit of it, which the commands find done."""
    folder = tmp_path_factory.mktemp("cli")
    model = templated(folder / "copied", "real")
    with pytest.MonkeyPatch.context() as patch:
        truths.use(patch, replace(truths.FIRST, rounds=1))
        yield folder, model, Audit(model=model, baseline="tiny", folder=folder / "a", device="cpu").run()


@pytest.fixture
def main(
    done: tuple[Path, str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Main:
    """Run a command in this process, in the folder of the audit."""
    truths.use(monkeypatch, replace(truths.FIRST, rounds=1))
    return commands(monkeypatch, capsys, done[0])


def words(done: tuple[Path, str, dict[str, Any]], *more: str) -> tuple[str, ...]:
    return ("audit", done[1], "--baseline", "tiny", "--out", str(done[0] / "a"), "--device", "cpu", *more)


def test_it_says_what_it_can_show_then_prints_and_writes_the_card(
    main: Main, done: tuple[Path, str, dict[str, Any]]
) -> None:
    said = main(*words(done))
    assert said.code == 0, said.err
    folder = done[0] / "a"
    text = (folder / "scorecard.txt").read_text(encoding="utf-8")
    assert text.strip() in said.out.replace("\r", "")
    assert said.out.index("it can show") < said.out.index("it cannot show") < said.out.index(text[:20])
    for place in (text, (folder / "scorecard.md").read_text(encoding="utf-8")):
        assert all(name.lower() in place.lower() for name in CONDITIONS)
        assert "smoke" in place
    assert "weights of the model" in text
    assert "<html" in (folder / "report.html").read_text(encoding="utf-8")
    kept = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert kept["audit"] == done[2]["audit"]
    assert set(kept["audit"]["verdicts"].values()) <= set(VERDICTS)


@pytest.mark.parametrize(("more", "wanted"), [((), None), (("--adaptive",), True), (("--no-adaptive",), False)])
def test_derived_attacks_are_asked_for(
    more: tuple[str, ...],
    wanted: bool | None,
    main: Main,
    done: tuple[Path, str, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Audit] = []

    def run(self: Audit, *_: object) -> dict[str, Any]:
        seen.append(self)
        return done[2]

    monkeypatch.setattr(Audit, "run", run)
    said = main(*words(done, *more))
    assert said.code == 0, said.err
    assert [one.adaptive for one in seen] == [wanted]
    assert ("it cannot show: resistance: no attack is made against" in said.out) == (wanted is not True)


def test_the_gate_is_shut_unless_everything_passes(
    main: Main, done: tuple[Path, str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    shut = main(*words(done, "--gate"))
    assert shut.code == command.GATE == 3
    assert "IMMUNITY AUDIT" in shut.out, "the card is shown all the same"
    passed = {**done[2]["audit"], "verdicts": dict.fromkeys(CONDITIONS, "pass")}
    monkeypatch.setattr(Audit, "run", lambda *_: {**done[2], "audit": passed})
    assert main(*words(done, "--gate")).code == 0
    monkeypatch.setattr(Audit, "run", lambda *_: done[2])
    assert main(*words(done)).code == 0, "without a gate a verdict is no failure"


@pytest.mark.parametrize("one", CONDITIONS)
@pytest.mark.parametrize("verdict", ["fail", "not enough evidence"])
def test_one_condition_shuts_the_gate(one: str, verdict: str) -> None:
    passed = dict.fromkeys(CONDITIONS, "pass")
    assert command._code(passed) == 0
    assert command._code({**passed, one: verdict}) == command.GATE
    assert command._code({}) == command.GATE


def remembered(patch: pytest.MonkeyPatch, result: dict[str, Any]) -> list[Audit]:
    """The audits that are asked for from now on; none is run."""
    asked: list[Audit] = []

    def run(task: Audit, _: Any) -> dict[str, Any]:
        asked.append(task)
        return result

    patch.setattr(Audit, "run", run)
    return asked


class TestTime:
    def test_a_size_and_a_time_are_two_answers(self, main: Main, done: tuple[Path, str, dict[str, Any]]) -> None:
        said = main(*words(done, "--tier", "smoke", "--minutes", "5"))
        assert said.code == 2
        assert "--tier says how much is done" in said.err

    def test_the_largest_tier_in_time(
        self, main: Main, done: tuple[Path, str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = remembered(monkeypatch, done[2])
        monkeypatch.setattr(command, "_paced", lambda *_: Pace(step=0.01, look=0.1))
        pace = Pace(step=0.01, look=0.1)
        enough = pace.minutes(TIERS["standard"]) + 1.0
        assert main(*words(done, "--minutes", f"{enough}")).code == 0
        assert (asked[0].tier, asked[0].minutes) == ("standard", enough)

    def test_it_goes_on_with_the_tier_that_it_began_with(
        self, main: Main, done: tuple[Path, str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The machine may be slower today."""
        asked = remembered(monkeypatch, done[2])
        monkeypatch.setattr(command, "_paced", lambda *_: Pace(step=0.01, look=0.1))
        (tmp_path / "b").mkdir()
        again = ("audit", done[1], "--baseline", "tiny", "--out", str(tmp_path / "b"), "--minutes", "9")
        assert main(*again).code == 0
        begin(tmp_path / "b", {"tier": "full"}, 9.0)
        assert main(*again).code == 0
        assert main(*again[:-1], "8").code == 0
        assert [audit.tier for audit in asked] == ["smoke", "full", "smoke"]

    def test_too_little_time(
        self, main: Main, done: tuple[Path, str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(command, "_paced", lambda *_: Pace(step=60.0, look=60.0))
        said = main(*words(done, "--minutes", "1"))
        assert said.code == 2
        assert "not even the tier smoke" in said.err

    def test_the_pace_is_measured(self) -> None:
        from immunity.attacks.attack import Opening

        pace = command._paced(Opening(source="tiny", device="cpu"), stand_ins("tiny", "smollm2", "umbra"))
        assert 0 < pace.step < 10
        assert 0 < pace.look < 60


class TestRefusing:
    def test_a_tier_that_there_is_not(self, main: Main, done: tuple[Path, str, dict[str, Any]]) -> None:
        said = main(*words(done, "--tier", "huge"))
        assert said.code == 2
        assert "huge" in said.err

    def test_a_model_beside_itself(self, main: Main, done: tuple[Path, str, dict[str, Any]], tmp_path: Path) -> None:
        said = main("audit", "tiny", "--baseline", "tiny", "--out", str(tmp_path / "b"))
        assert said.code != 0
        assert "same files" in said.err

    def test_a_model_that_there_is_not(self, main: Main, tmp_path: Path) -> None:
        said = main("audit", "./nothing", "--baseline", "tiny", "--out", str(tmp_path / "b"))
        assert said.code not in {0, command.GATE}, "a gate tells a fault from a verdict"
        assert "nothing" in said.err
        assert not (tmp_path / "b" / "result.json").exists()

    def test_a_folder_of_another_audit(self, main: Main, done: tuple[Path, str, dict[str, Any]]) -> None:
        said = main(*words(done, "--domain", "gate"))
        assert said.code not in {0, command.GATE}
        assert "another" in said.err


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A user's files: rows of the stand-ins, so nothing in them can harm."""
    place, found = tmp_path_factory.mktemp("own"), {}
    for name, world, role, split, n in (
        ("--harmful", "umbra", "harmful", "train", 12),
        ("--test-harmful", "umbra", "harmful", "test", 8),
        ("--general", "general", "general", "train", 12),
        ("--test-general", "general", "general", "test", 6),
        ("--benign", "sentiment", "benign", "train", 12),
        ("--test-benign", "sentiment", "benign", "test", 6),
        ("train", "gate", "harmful", "train", 12),
        ("test", "gate", "harmful", "test", 8),
    ):
        rows = [{"prompt": e.prompt, "response": e.response} for e in synthetic.corpus(world, role, split, n)]
        path = place / f"{name.strip('-')}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        found[name] = str(path)
    return found


def own(done: tuple[Path, str, dict[str, Any]], files: dict[str, str], *more: str) -> tuple[str, ...]:
    given = [word for name, path in files.items() if name.startswith("--") for word in (name, path)]
    plain = ("audit", done[1], "--baseline", "tiny", "--out", str(done[0] / "mine"), "--device", "cpu")
    return (*plain, *given, *more)


class TestOwnData:
    def test_it_says_what_the_data_cannot_show_and_then_audits(
        self, main: Main, done: tuple[Path, str, dict[str, Any]], files: dict[str, str]
    ) -> None:
        held_out = f"gate={files['train']},{files['test']}"
        said = main(*own(done, files, "--judge", "overlap", "--second-judge", "none", "--held-out", held_out))
        assert said.code == 0, said.err
        before = said.out[: said.out.index("IMMUNITY AUDIT")]
        assert "it cannot show: generalisation: not enough evidence, as one held-out domain was given" in before
        assert (
            "it cannot show: the worst attacks on prompts that did not choose them: 8 test prompts are too few"
            in before
        )
        assert "first judge: overlap" in said.out
        kept = json.loads((done[0] / "mine" / "result.json").read_text(encoding="utf-8"))
        assert kept["audit"]["failures"] == {}
        assert {row["domain"] for row in kept["audit"]["conditions"][2]["details"]["matrix"]} == {"home"}
        page = (done[0] / "mine" / "report.html").read_text(encoding="utf-8")
        assert "Who said what is harmful" in page
        prompt = next(iter(synthetic.corpus("umbra", "harmful", "test"))).prompt
        assert prompt not in page + said.out + said.err

    def test_without_files_or_a_judge_the_stand_ins_are_not_judged(
        self, main: Main, done: tuple[Path, str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = remembered(monkeypatch, done[2])
        said = main("audit", done[1], "--baseline", "tiny", "--out", str(tmp_path), "--judge", "none")
        assert said.code == 0, said.err
        assert "no judge says what is harmful" in said.out
        assert asked[0].data.judge is None
        assert asked[0].data.home.name == "umbra"

    @pytest.mark.parametrize(
        ("left_out", "more", "says"),
        [
            (("--harmful",), (), "an audit on data of your own needs --harmful, too"),
            (("--test-harmful", "--test-general"), (), "needs --test-harmful and --test-general, too"),
            ((), ("--judge", "exact"), "--judge exact reads the key of the made-up worlds"),
            ((), ("--judge", "endpoint"), "asks a chat model: give --judge-url and --judge-model"),
            ((), ("--second-judge", "refusal"), "has nobody to agree with"),
            ((), ("--judge", "refusal", "--second-judge", "refusal"), "agrees with itself"),
            ((), ("--test-benign", "./gone.jsonl"), "no such file"),
            ((), ("--held-out", "gate=./gone.jsonl,./too.jsonl"), "no such file"),
            ((), ("--held-out", "gate=synthetic:gate", "--held-out", "gate=synthetic:gate"), "is given twice"),
            ((), ("--held-out", "gate"), "say NAME=TRAIN,TEST"),
            ((), ("--held-out", "Gate=synthetic:gate"), "cannot be called 'Gate'"),
            ((), ("--held-out", "again=TEST"), "prompts are in the domain 'home' too"),
            ((), ("--test-harmful", "EMPTY"), "the file is empty"),
        ],
    )
    def test_a_mistake_is_told_before_anything_is_computed(
        self,
        main: Main,
        done: tuple[Path, str, dict[str, Any]],
        files: dict[str, str],
        left_out: tuple[str, ...],
        more: tuple[str, ...],
        says: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        empty = tmp_path / "empty.jsonl"
        empty.touch()
        given = {name: path for name, path in files.items() if name not in left_out}
        swapped = [
            word.replace("TEST", f"{files['train']},{files['--test-harmful']}") if "again" in word else word
            for word in more
        ]
        swapped = [str(empty) if word == "EMPTY" else word for word in swapped]
        asked = remembered(monkeypatch, done[2])
        said = main(*own(done, given, *swapped))
        assert said.code == 2
        assert says in said.err
        assert not asked
        assert "it can show" not in said.out

    def test_the_help_teaches_it(self, main: Main) -> None:
        said = main("audit", "--help")
        assert said.code == 0
        plain = " ".join(re.sub(r"[│╭╮╰╯─]", " ", said.out).split())
        for word in ("--held-out", "NAME=TRAIN,TEST", "--judge", "--test-harmful", "--show-real", "two thirds of them"):
            assert word in plain
        assert "--held-out fraud=fraud.jsonl,fraud-test.jsonl" in plain


class TestListing:
    def test_the_judges_are_listed_with_what_they_need(self, main: Main) -> None:
        said = main("list")
        assert said.code == 0
        for name, kind in JUDGES.items():
            (line,) = [line for line in said.out.splitlines() if re.match(rf"{name}\s{{2,}}", line)]
            assert {"rule": "nothing", "model": "a local model", "endpoint": "an endpoint"}[kind.by] in line
            assert kind.source.split()[0].strip(",") in line

    def test_one_judge_is_explained(self, main: Main) -> None:
        for name, kind in JUDGES.items():
            said = main("list", name)
            assert said.code == 0
            plain = " ".join(said.out.split())
            for what in (kind.says, kind.scale, kind.needs, kind.source, kind.licence):
                assert " ".join(what.split()) in plain
        assert "threshold" in main("list", "beaver-dam-io").out
        assert "did you mean strongreject" in main("list", "strongrejct").err
