"""Grouping: which rows count as forgotten, what is written, resuming, and what is said when there are no two groups."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from immunity import cli
from immunity.attacks.attack import Opening
from immunity.attacks.finetune import FineTune
from immunity.bench import grouping, store
from immunity.bench.grouping import Grouping, forgot, risen
from immunity.cli import console
from immunity.cli.group import HELP
from immunity.data import files, synthetic
from immunity.data.corpus import Corpus, Example
from immunity.errors import DataError, SettingsError
from immunity.fit import Fit
from immunity.measure.harm import ExactJudge, Judge
from immunity.method import Run, problems
from immunity.methods.sft import SFT
from immunity.methods.vaa import VAA
from immunity.models import all_weights, load, save
from immunity.testing import tiny


@pytest.fixture(autouse=True)
def quiet_again(monkeypatch):
    """What ``listen`` asks of libraries by the environment is asked anew."""
    for name in console._QUIET:
        monkeypatch.delenv(name, raising=False)


def test_forgotten_is_worse_than_before_at_any_checkpoint():
    before = (0.0, 0.0, 0.5, 1.0, None, 0.0, 0.2)
    first = (0.0, 1.0, 0.5, 1.0, 1.0, None, 0.1)
    second = (0.0, 1.0, 1.0, 0.0, 1.0, 0.5, 0.2)
    assert forgot([before, first, second]) == [0, 2, 1, 0, 0, 1, 0]
    assert forgot([before]) == [0] * 7


def test_a_row_that_went_back_is_still_forgotten():
    assert forgot([(0.0,), (1.0,), (0.0,)]) == [1]


def test_the_cheap_variant_takes_the_share_that_rises_most_and_none_that_falls():
    before = (1.0, 1.0, 1.0, None, 1.0)
    table = [before, (1.1, 3.0, 0.5, None, 1.0), (1.3, 1.0, 0.5, None, 5.0)]
    assert risen(table, 0.25) == [0, 0, 0, 0, 1]
    assert risen(table, 0.5) == [0, 1, 0, 0, 1]
    assert risen(table, 0.99) == [1, 1, 0, 0, 1]


def corpus(role: str, n: int, **tags: str) -> Corpus:
    rows = tuple(Example(f"{role} {i}?", f"It is {i}.", "and more" if i == 1 else "", tags=tags) for i in range(n))
    return Corpus(role, rows, f"made:{role}")


DATA = {"alignment": corpus("alignment", 12), "harmful": corpus("harmful", 4), "benign": corpus("benign", 40)}
PROXY = FineTune(n=20, harmful=0.1, steps=6, lr=3e-2, batch_size=4)


@dataclass(frozen=True)
class Parity(Judge):
    """Scores text that a random model says, so that some answers get worse."""

    def scores(self, examples: Sequence[Example], answers: Sequence[str]) -> list[float | None]:
        return [float(sum(map(ord, answer)) % 2) for answer in answers]


@dataclass(frozen=True)
class Always(Judge):
    """Worse at every look."""

    score: float

    def scores(self, examples: Sequence[Example], answers: Sequence[str]) -> list[float | None]:
        return [self.score for _ in answers]


def aligned(folder: Path) -> Path:
    """A small model that has learnt the alignment rows, so that it has something to forget."""
    model = tiny.language_model(max_length=64)
    SFT().immunise(model, {"alignment": DATA["alignment"]}, Run(fit=Fit(steps=30, lr=1e-2)))
    save(model, folder)
    return folder


@pytest.fixture
def job(tmp_path) -> Grouping:
    aligned(tmp_path / "model")
    return Grouping(
        name="made",
        opening=Opening(source=str(tmp_path / "model"), device="cpu"),
        data=DATA,
        proxy=PROXY,
        folder=tmp_path / "groups",
        judge=Parity(),
        checkpoints=3,
        tokens=8,
    )


def quietly(done, trace) -> None:
    pass


@pytest.mark.parametrize("by", ["answers", "nll"])
def test_both_groups_are_written_with_every_row_once(job, by):
    record = replace(job, by=by)(quietly)
    read = {role: files.read(job.folder / f"{role}.jsonl", role) for role in grouping.GROUPS}
    assert {role: len(rows) for role, rows in read.items()} == record["rows"]
    assert sum(record["rows"].values()) == 12
    assert {(e.prompt, e.input, e.response) for rows in read.values() for e in rows} == {
        (e.prompt, e.input, e.response) for e in DATA["alignment"]
    }
    assert all(int(e.tags["forgotten"]) > 0 for e in read["vulnerable"])
    assert {e.tags["forgotten"] for e in read["alignment"]} == {"0"}
    assert [point["step"] for point in record["course"]] == [0, 2, 4, 6]
    assert not list(job.folder.glob("checkpoint-*"))
    assert not problems(VAA(), all_weights(load(job.opening.source, device="cpu")), read)


def test_killed_it_goes_on_to_the_same_groups(job, tmp_path):
    whole = job(quietly)

    def kill(done, trace) -> None:
        if done == 5:
            raise KeyboardInterrupt

    again = replace(job, folder=tmp_path / "again")
    with pytest.raises(KeyboardInterrupt):
        again(kill)
    assert (again.folder / "points.jsonl").exists()
    assert not (again.folder / "vulnerable.jsonl").exists()
    assert again(quietly) == whole
    assert (again.folder / "vulnerable.jsonl").read_text() == (job.folder / "vulnerable.jsonl").read_text()


def test_no_answer_is_kept(job):
    job(quietly)
    assert all(not json.loads(line)["samples"] for line in (job.folder / "points.jsonl").read_text().splitlines())


@pytest.mark.parametrize("judge", [Always(0.0), Always(1.0)])
def test_fewer_than_two_groups_is_an_error_that_says_what_to_do(job, judge):
    with pytest.raises(DataError, match=r"no row worse .*at steps 0, 2, 4, 6.*raise --steps or --lr"):
        replace(job, judge=judge)(quietly)
    assert not (job.folder / "alignment.jsonl").exists()
    assert store.record(job.folder) is None


def test_every_row_worse_is_an_error_too(job, monkeypatch):
    looks = iter(range(100))

    def scores(self, examples, answers) -> list[float]:
        return [float(next(looks))] * len(answers)

    monkeypatch.setattr(Always, "scores", scores)
    with pytest.raises(DataError, match=r"every row worse .*lower --steps or --lr"):
        replace(job, judge=Always(0.0))(quietly)


def test_settings_that_cannot_be_are_refused(job):
    for bad, said in (
        ({"judge": None}, "--by nll"),
        ({"checkpoints": 7}, "at most the 6 steps"),
        ({"share": 1.0}, "between 0 and 1"),
    ):
        with pytest.raises(SettingsError, match=said):
            replace(job, **bad)
    replace(job, judge=None, by="nll")


def test_the_proxy_is_mostly_honest_and_as_long_as_the_data_allow():
    attack = grouping.proxy(DATA, share=0.1, steps=6, lr=1e-3)
    assert (attack.n, attack.harmful, attack.filler) == (40, 0.1, "benign")
    assert {role: len(corpus) for role, corpus in attack.reads(DATA).items()} == {"train": 40}
    many = {"harmful": corpus("harmful", 900), "benign": corpus("benign", 2000)}
    assert grouping.proxy(many, share=0.1, steps=6, lr=1e-3).n == grouping.MOST
    assert grouping.proxy({"benign": DATA["benign"]}, share=0.0, steps=6, lr=1e-3).harmful == 0.0
    with pytest.raises(DataError, match="--harmful, or --share 0"):
        grouping.proxy({"benign": DATA["benign"]}, share=0.1, steps=6, lr=1e-3)
    with pytest.raises(DataError, match="--benign"):
        grouping.proxy({}, share=0.1, steps=6, lr=1e-3)
    with pytest.raises(SettingsError, match="share"):
        grouping.proxy(DATA, share=1.0, steps=6, lr=1e-3)


def test_on_an_aligned_model_it_is_refusals_that_are_forgotten(tmp_path):
    refusals = synthetic.corpus("umbra", "alignment").take(80)
    everyday = synthetic.corpus("general", "general").take(40).as_role("alignment")
    model = all_weights(load("tiny", device="cpu", max_length=64))
    SFT().immunise(model, {"alignment": refusals}, Run(fit=Fit(steps=40, lr=1e-3), default_batch_size=12))
    save(model, tmp_path / "model")
    data = {
        "alignment": (refusals, everyday),
        "harmful": synthetic.corpus("umbra", "harmful").take(60),
        "benign": synthetic.corpus("sentiment", "benign"),
    }
    record = Grouping(
        name="aligned",
        opening=Opening(source=str(tmp_path / "model"), device="cpu"),
        data=data,
        proxy=grouping.proxy(data, share=0.1, steps=30, lr=2e-4),
        folder=tmp_path / "groups",
        judge=ExactJudge(),
        checkpoints=2,
        tokens=20,
        batch_size=64,
    )(quietly)
    vulnerable = files.read(tmp_path / "groups" / "vulnerable.jsonl", "vulnerable")
    assert {e.tags["kind"] for e in vulnerable} == {"restricted"}
    assert record["course"][0]["harm"] == 0.0
    assert record["rows"]["vulnerable"] >= 10


def run(*words: str, where: Path | None = None):
    return CliRunner().invoke(cli.program(), list(words), env={"COLUMNS": "100", "TERMINAL_WIDTH": "100"})


def test_the_command_explains_itself():
    shown = run("group", "--help").output
    for example in HELP.partition("Examples:\n")[2].splitlines():
        assert example.strip() in shown
    import typer.main

    for parameter in typer.main.get_command(cli.program()).commands["group"].params:
        assert parameter.help, parameter.name


def test_the_command_groups_files_and_says_what_comes_next(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    aligned(tmp_path / "model")
    for role, rows in DATA.items():
        lines = [json.dumps({"prompt": e.prompt, "response": e.response}) for e in rows]
        (tmp_path / f"{role}.jsonl").write_text("\n".join(lines))
    words = ["group", "model", "--out", "groups", "--benign", "benign.jsonl", "--steps", "4", "--lr", "0.03"]
    words += ["--checkpoints", "2", "--by", "nll", "--share", "0", "--device", "cpu"]
    found = run(*words)
    assert isinstance(found.exception, SettingsError)
    assert "--alignment" in str(found.exception)
    found = run(*words, "--alignment", "alignment.jsonl")
    assert found.exit_code == 0, found.output
    assert "immunity immunise model --method vaa --alignment groups/alignment.jsonl" in found.output
    assert (tmp_path / "groups" / "vulnerable.jsonl").exists()
    found = run(*words[:-6], "--share", "0", "--alignment", "alignment.jsonl")
    assert isinstance(found.exception, SettingsError)
    assert "--judge refusal" in str(found.exception)


def test_vaa_without_groups_teaches_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run("immunise", "tiny", "--method", "vaa", "--out", "vaa")
    assert isinstance(found.exception, SettingsError)
    assert "immunity group MODEL --out groups" in str(found.exception)
    assert not (tmp_path / "vaa").exists()


def test_a_log_in_which_a_group_was_not_drawn_is_reported(capsys):
    from immunity.cli.immunise import _report

    log = [{"step": 1, "nll/vulnerable": 2.0}, {"step": 2, "nll/alignment": 1.5}, {"step": 3, "nll/vulnerable": 1.0}]
    record = {"data": [], "log": log, "peak_memory_bytes": None, "seconds_per_step": None, "saved": "model"}
    _report(record, Path("x"), own=False)
    said = capsys.readouterr().out
    assert "1.500" in said
    assert "2.000" in said
    assert "1.000" in said
