"""The audit on a user's own data: files of stand-in rows under other names, so nothing in them can harm."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import truths
from cheats import templated
from immunity.bench import own_data, tiers
from immunity.bench.audit import Audit
from immunity.bench.ground import Ground, stand_ins
from immunity.bench.own_data import own
from immunity.cli import data as sources
from immunity.cli import grounds
from immunity.data import synthetic
from immunity.data.corpus import Corpus, Example
from immunity.data.files import read
from immunity.errors import DataError, ModelError, ResumeError, SettingsError
from immunity.measure.harm import ExactJudge, Judge, OverlapJudge
from immunity.measure.judges_words import RefusalJudge
from immunity.measure.suite import Suite
from immunity.models import load
from released import Watch
from truths import FIRST, claim, condition

UNKNOWN = "not enough evidence"
LITTLE = replace(FIRST, domains=2, seeds=1, rounds=2)


def written(path: Path, made: Corpus, n: int, *, gold: bool = False) -> str:
    """Rows of a stand-in as a user's file."""
    rows = [
        {"prompt": e.prompt, "response": e.response, **({"gold": e.tags["gold"]} if gold else {})}
        for e in made.examples[:n]
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place, corpus = tmp_path_factory.mktemp("files"), synthetic.corpus
    return {
        "harmful": written(place / "asked.jsonl", corpus("umbra", "harmful"), 30),
        "test harmful": written(place / "asked-test.jsonl", corpus("umbra", "harmful", "test"), 66),
        "general": written(place / "chat.jsonl", corpus("general", "general"), 20),
        "test general": written(place / "chat-test.jsonl", corpus("general", "general", "test"), 6, gold=True),
        "benign": written(place / "task.jsonl", corpus("sentiment", "benign"), 20),
        "test benign": written(place / "task-test.jsonl", corpus("sentiment", "benign", "test"), 6),
        "other": written(place / "other.jsonl", corpus("gate", "harmful"), 20),
        "test other": written(place / "other-test.jsonl", corpus("gate", "harmful", "test"), 12),
    }


def corpora(files: dict[str, str], *roles: str) -> dict[str, Corpus]:
    return {role: read(files[role], role) for role in roles}


WORDS = OverlapJudge()


def measured(files: dict[str, str], judge: Judge | None = WORDS, **more: Any) -> Suite:
    tests = {role: read(files[f"test {role}"], role) for role in ("harmful", "general", "benign")}
    made = Suite(**tests, judge=judge, second=RefusalJudge(), max_new_tokens=8, n_samples=2)  # type: ignore[arg-type]
    return replace(made, **more)


def other(files: dict[str, str]) -> tuple[Corpus, Corpus]:
    return read(files["other"], "harmful"), read(files["test other"], "harmful")


@pytest.fixture(scope="module")
def ground(files: dict[str, str]) -> Ground:
    return own(corpora(files, "harmful", "general", "benign"), measured(files), {"gate": other(files)})


def texts(corpus: Corpus) -> set[str]:
    return {text for e in corpus for text in (e.prompt, e.response)}


class TestGround:
    def test_a_third_of_the_test_prompts_is_kept_by_a_fixed_seed(self, ground: Ground, files: dict[str, str]) -> None:
        home, whole = ground.home, read(files["test harmful"], "harmful")
        assert home.dev is not None
        first, last = (dict.fromkeys(e.prompt for e in part) for part in (home.test.harmful, home.dev.harmful))
        assert (len(home.test.harmful), len(home.dev.harmful)) == (44, 22)
        assert not first.keys() & last.keys()
        assert first.keys() | last.keys() == {e.prompt for e in whole}
        assert list(first) != [e.prompt for e in whole if e.prompt in first], "files are often sorted"
        again = own(corpora(files, "harmful"), measured(files)).home
        assert (again.test, again.dev) == (home.test, home.dev)

    def test_rows_of_one_prompt_stay_together(self) -> None:
        rows = tuple(Example(f"p{i % 61}", f"r{i}") for i in range(122))
        some = Corpus("general", tuple(Example(f"g{i}", "r") for i in range(3)), "general")
        found = own(
            {"harmful": some.as_role("harmful")}, Suite(harmful=Corpus("harmful", rows, "p"), general=some)
        ).home
        assert found.dev is not None
        assert len(found.test.harmful) == 2 * 41
        assert len(found.dev.harmful) == 2 * 20

    def test_too_few_prompts_are_all_measured_on_and_it_is_said(self, files: dict[str, str]) -> None:
        few = measured(files, harmful=read(files["test harmful"], "harmful").take(59))
        found = own(corpora(files, "harmful"), few)
        assert found.home.dev is None
        assert len(found.home.test.harmful) == 59
        assert any("59 test prompts are too few to keep a third" in line for line in found.cannot(LITTLE))
        with pytest.raises(SettingsError, match="no dev prompts"):
            found.suite("home", 3, "dev")

    def test_what_cannot_be_judged_is_said(self, ground: Ground, files: dict[str, str]) -> None:
        said = "\n".join(ground.cannot(LITTLE))
        assert "one held-out domain was given, where 3 are the least" in said
        assert "task-test.jsonl are right: it has no column gold" in said
        bare = own(corpora(files, "harmful"), measured(files, None, second=None, benign=None))
        said = "\n".join(bare.cannot(LITTLE))
        assert "no judge says what is harmful (--judge); losses and refusals are measured" in said
        assert "generalisation: not enough evidence, as no held-out domain was given (--held-out)" in said
        assert "trainability: not enough evidence, as no honest task was given (--benign and --test-benign)" in said
        assert "(--general)" in said
        assert not any("harm" in line for line in bare.supports(LITTLE))
        general = measured(files).general
        keyless = replace(general, examples=tuple(replace(e, tags={}) for e in general))
        said = "\n".join(own(corpora(files, "harmful"), measured(files, general=keyless)).cannot(LITTLE))
        assert "stability: not enough evidence" in said

    def test_domains_that_the_tier_does_not_reach_are_named(self, files: dict[str, str]) -> None:
        train, test = other(files)
        made = own(
            corpora(files, "harmful"), measured(files), {"a": (train.take(5), test.take(5)), "b": _renamed(test)}
        )
        assert "harm in b: smoke attacks 1 held-out domain" in made.cannot(LITTLE)
        assert [one.name for one in made.attacked(LITTLE)] == ["home", "a"]

    def test_its_numbers_are_of_the_prompts_that_there_are(self, ground: Ground) -> None:
        assert ground.fitted(tiers.TIERS["standard"]).prompts == 44
        assert ground.fitted(LITTLE) == LITTLE
        made = stand_ins("tiny", "smollm2", "umbra")
        assert made.fitted(tiers.TIERS["full"]) == tiers.TIERS["full"]

    def test_a_held_out_domain_is_held_out(self, files: dict[str, str]) -> None:
        mine = corpora(files, "harmful")
        for pair in ((mine["harmful"], other(files)[1]), (other(files)[0], read(files["test harmful"], "harmful"))):
            with pytest.raises(DataError, match=r"'gate': \d+ of its \d+ prompts are in the domain 'home' too"):
                own(mine, measured(files), {"gate": pair})
        with pytest.raises(DataError, match=r"domain 'b': .* in the domain 'a' too"):
            own(mine, measured(files), {"a": other(files), "b": other(files)})
        for name in ("home", "Gate", "a b", ""):
            with pytest.raises(SettingsError, match="cannot be called"):
                own(mine, measured(files), {name: other(files)})

    def test_the_exact_judge_needs_a_key_and_shows_no_prompt(self, files: dict[str, str]) -> None:
        with pytest.raises(SettingsError, match=r"asked-test\.jsonl.* has none") as refused:
            own(corpora(files, "harmful"), measured(files, ExactJudge()))
        assert not any(text in str(refused.value) for text in texts(read(files["test harmful"], "harmful")))
        with pytest.raises(DataError, match="give --harmful"):
            own({}, measured(files))

    def test_likeness(self) -> None:
        row = Example("a", "The red one")
        assert [own_data.likeness(row, said) for said in ("the RED one.", "red", "blue")] == [1.0, 0.5, 0.0]

    def test_other_judges_of_the_stand_ins_make_another_audit(self) -> None:
        usual = stand_ins("tiny", "smollm2", "gate")
        assert usual.who == {"domain": "gate"}
        assert stand_ins("tiny", "smollm2", "gate", judged_by=(ExactJudge(), OverlapJudge())).who == usual.who
        made = stand_ins("tiny", "smollm2", "gate", judged_by=(RefusalJudge(), None))
        assert made.who["judge"] == "RefusalJudge()"
        assert [row["judge"] for row in made.judged()] == ["refusal"]


def _renamed(test: Corpus) -> tuple[Corpus, Corpus]:
    rows = replace(test, examples=tuple(replace(e, prompt=f"{e.prompt} Now.") for e in test))
    return rows, replace(rows, examples=tuple(replace(e, prompt=f"{e.prompt} Please.") for e in rows))


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> str:
    return templated(tmp_path_factory.mktemp("own") / "copied", "real")


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    truths.use(monkeypatch, LITTLE)
    yield monkeypatch


Run = Callable[..., Audit]


@pytest.fixture(scope="module")
def done(copied: str, ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A little audit on files, from end to end."""
    folder = tmp_path_factory.mktemp("audited")
    with pytest.MonkeyPatch.context() as patch:
        truths.use(patch, LITTLE)
        return folder, Audit(model=copied, baseline="tiny", folder=folder, ground=ground, device="cpu").run()


class TestEndToEnd:
    def test_every_condition_is_judged_on_the_files(self, done: tuple[Path, dict[str, Any]]) -> None:
        result, card = done[1], done[1]["audit"]
        assert card["failures"] == {}
        assert card["verdicts"]["resistance"] == "fail"  # it answers as released
        assert claim(result, "stability", "harm on restricted: home")["n"] == 4
        assert claim(result, "stability", "accuracy on general")["n"] == 4
        assert claim(result, "stability", "loss on honest task")["n"] == 4
        cells = {
            (row["domain"], row["threat"]): row for row in condition(result, "generalisation")["details"]["matrix"]
        }
        assert cells["home", "sft"]["held_out"] is False
        assert cells["gate", "sft"]["held_out"] is True
        assert cells["gate", "sft"]["defended"]["tried"]
        learnt = claim(result, "trainability", "final accuracy on honest task, full, round 2")
        assert learnt["n"] == 4
        assert learnt["verdict"] == UNKNOWN

    def test_the_card_says_who_judged_and_on_what(self, done: tuple[Path, dict[str, Any]]) -> None:
        card = done[1]["audit"]
        assert [(row["role"], row["judge"], row["kind"]) for row in card["judges"]] == [
            ("first", "overlap", "rule"),
            ("second", "refusal", "rule"),
        ]
        assert card["agreement"]
        assert "domain" not in card
        assert set(card["data"]) >= {"harmful", "test harmful", "held out: gate"}
        fact = card["provenance"]["data of home"]
        assert "30 rows of " in fact
        assert "asked.jsonl to attack with, 4 of " in fact
        assert "(two thirds) to measure on, and 4 of the others" in fact

    def test_no_text_of_the_users_is_kept(
        self, done: tuple[Path, dict[str, Any]], files: dict[str, str], ground: Ground
    ) -> None:
        from immunity.report import page, scorecard

        restricted = [read(files[name], "harmful") for name in files if name.endswith(("harmful", "other"))]
        mine = set().union(*map(texts, restricted))
        card = scorecard.whole(done[1])
        shown = [page.render(done[1]), scorecard.text(card), scorecard.markdown(card), "\n".join(ground.cannot(LITTLE))]
        kept = [path.read_text(encoding="utf-8") for path in done[0].rglob("*.json*")]
        assert kept
        assert not [text for text in mine for place in (*shown, *kept) if text in place]
        assert "first judge: overlap" in shown[1]
        assert "Who said what is harmful" in shown[0]

    def test_the_same_goes_on_and_other_data_are_refused(
        self, done: tuple[Path, dict[str, Any]], copied: str, ground: Ground, files: dict[str, str]
    ) -> None:
        watch = Watch()
        same = Audit(model=copied, baseline="tiny", folder=done[0], ground=ground, device="cpu").run(watch.shown)
        assert not watch.computed
        assert same == done[1]
        fewer = own(corpora(files, "harmful", "general", "benign"), measured(files))
        for ground_ in (fewer, None):
            with pytest.raises(ResumeError, match="another result"):
                Audit(model=copied, baseline="tiny", folder=done[0], ground=ground_, device="cpu").run()

    def test_without_a_judge_no_harm_is_claimed(self, copied: str, files: dict[str, str], tmp_path: Path) -> None:
        made = own(corpora(files, "harmful"), measured(files, None, second=None, benign=None), {"gate": other(files)})
        result = Audit(model=copied, baseline="tiny", folder=tmp_path, ground=made, device="cpu").run()
        assert set(result["audit"]["verdicts"].values()) == {UNKNOWN}
        assert result["audit"]["judges"] == []
        assert not condition(result, "generalisation")["claims"]
        assert not any("useful_harm" in point["metrics"] for curve in result["curves"] for point in curve["points"])
        assert any("refusal" in point["metrics"] for curve in result["curves"] for point in curve["points"])
        assert not (tmp_path / "runs" / "baseline" / "gate-full-seed1").exists(), "nothing could be said of it"


@dataclass(frozen=True)
class Absent(Judge):
    """Needs a model that is not there."""

    def scores(self, examples, answers):
        raise ModelError("cannot load the classifier")


class TestJudges:
    def test_a_judge_that_cannot_is_known_before_anything_is_computed(
        self, copied: str, files: dict[str, str], tmp_path: Path
    ) -> None:
        watch = Watch()
        made = own(corpora(files, "harmful"), measured(files, Absent()))
        with pytest.raises(ModelError, match="cannot load the classifier"):
            Audit(model=copied, baseline="tiny", folder=tmp_path / "a", ground=made, device="cpu").run(watch.shown)
        assert not watch.computed
        assert not (tmp_path / "a" / "audit.json").exists()

    def test_nobody_judges_while_an_honest_task_is_taught(self, ground: Ground, tmp_path: Path) -> None:
        from immunity.bench.errands import Errands

        jobs = Errands(model="a", baseline="b", size=LITTLE, folder=tmp_path, ground=ground).lessons()
        for errand in jobs:
            assert errand.job.suite.judge is None
            assert errand.job.suite.scorers == {"benign": own_data.likeness}


class TestNamed:
    """What the command line makes of its options."""

    @staticmethod
    def named(files: dict[str, str], *held_out: str, **more: Any) -> grounds.Named:
        plain = {role: [files[role]] for role in ("harmful", "general", "benign")}
        tests = {role: files[f"test {role}"] for role in ("harmful", "general", "benign")}
        said: dict[str, Any] = {
            "train": plain, "test": tests, "held_out": held_out, "domain": "umbra", "judge": "overlap",
            "second": "refusal", "judge_at": None, "tokens": None, "protocol": "plain", "skip_bad": False,
            "show_real": False,
        }  # fmt: skip
        return grounds.Named(**{**said, **more})

    def test_files_become_the_ground(self, files: dict[str, str], ground: Ground) -> None:
        found = grounds.ground(self.named(files, f"gate={files['other']},{files['test other']}"), "tiny", "smollm2")
        assert [one.name for one in found.domains] == ["home", "gate"]
        assert found.home.test.harmful.examples == ground.home.test.harmful.examples
        assert found.home.test.max_new_tokens == 32
        assert (found.judge, found.home.test.second) == (OverlapJudge(), RefusalJudge())
        assert "identity" in found.home.data
        assert found.home.test.show_real is False
        shown = grounds.ground(self.named(files, show_real=True, tokens=9), "tiny", "smollm2").home.test
        assert (shown.show_real, shown.max_new_tokens) == (True, 9)
        assert shown(load("tiny", device="cpu")).samples

    def test_without_files_it_is_the_stand_ins(self, files: dict[str, str]) -> None:
        nothing = {"train": dict.fromkeys(("harmful", "benign")), "test": dict.fromkeys(("harmful", "general"))}
        bare = self.named(files, **nothing, judge="auto", second="auto")
        assert grounds.ground(bare, "tiny", "smollm2") == stand_ins("tiny", "smollm2", "umbra")
        unjudged = grounds.ground(replace(bare, judge="none"), "tiny", "smollm2")
        assert unjudged.judge is None
        assert any("no judge" in line for line in unjudged.cannot(LITTLE))
        with pytest.raises(SettingsError, match="--tokens and --show-real are for data of your own"):
            grounds.ground(replace(bare, tokens=3), "tiny", "smollm2")

    def test_a_folder_and_a_set_have_both(self, files: dict[str, str], tmp_path: Path) -> None:
        for name, of in (("train", "other"), ("test", "test other")):
            (tmp_path / f"{name}.jsonl").write_bytes(Path(files[of]).read_bytes())
        found = sources.held_out([f"gate={tmp_path}", "made=synthetic:noctis"])
        assert found["gate"][1].examples == other(files)[1].examples
        assert found["made"][1].name == "synthetic:noctis/test"

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            (("gate",), "say NAME=TRAIN,TEST"),
            (("gate=a.jsonl,",), "say NAME=TRAIN,TEST"),
            (("gate=a.jsonl,b.jsonl,c.jsonl",), "say NAME=TRAIN,TEST"),
            (("=a.jsonl,b.jsonl",), "say NAME=TRAIN,TEST"),
            (("gate=synthetic:gate", "gate=synthetic:noctis"), "--held-out gate is given twice"),
        ],
    )
    def test_mistakes(self, words: tuple[str, ...], says: str) -> None:
        with pytest.raises(SettingsError, match=says):
            sources.held_out(words)

    def test_a_file_alone_has_nothing_to_test_on(self, files: dict[str, str]) -> None:
        with pytest.raises(SettingsError, match="a file has no rows to test on"):
            sources.held_out([f"gate={files['other']}"])
        with pytest.raises(DataError, match="no such file"):
            sources.held_out([f"gate={files['other']},./gone.jsonl"])
