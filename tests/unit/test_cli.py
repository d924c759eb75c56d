"""The command line as a user meets it: help that teaches, and for every mistake one paragraph and exit code 2."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from immunity import cli, errors, models
from immunity.bench import jobs, store
from immunity.cli import console, immunise, listing, options
from immunity.methods.ctrap import CTRAP

COMMANDS = (
    "demo", "list", "immunise", "group", "attack", "audit", "probe", "benchmark", "lifecycle", "report",
)  # fmt: skip


@pytest.fixture(autouse=True)
def quiet_again(monkeypatch):
    """What ``listen`` asks of libraries by the environment is asked anew."""
    for name in console._QUIET:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.jsonl").write_text('{"prompt": "Open box 1.", "response": "It is open."}\n' * 4)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "c"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    return tmp_path


def main(monkeypatch, capsys, *words: str) -> tuple[int, str, str]:
    """Run the console command in this process: (exit code, stdout, stderr with its lines joined)."""
    monkeypatch.setattr(sys, "argv", ["immunity", *words])
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr()
    return int(stopped.value.code or 0), said.out, " ".join(re.sub(r"[│╭╮╰╯─]", " ", said.err).split())


def invoke(*words: str) -> Result:
    return CliRunner().invoke(cli.program(), list(words), env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_every_option_is_explained(self, command):
        import typer.main

        group = typer.main.get_command(cli.program())
        for parameter in group.commands[command].params:
            assert parameter.help, f"{command} {parameter.name}"

    @pytest.mark.parametrize("command", ["", "list", "immunise", "attack", "lifecycle", "report"])
    def test_examples_keep_their_lines(self, command):
        module = cli if not command else sys.modules[f"immunity.cli.{command.replace('list', 'listing')}"]
        shown = invoke(*filter(None, [command]), "--help").output.splitlines()
        examples = module.HELP.partition("Examples:\n")[2].splitlines()
        assert examples
        for example in examples:
            assert any(line.strip() == example.strip() for line in shown), example

    def test_fits_80_columns(self):
        for command in COMMANDS:
            assert all(len(line) <= 80 for line in invoke(command, "--help").output.splitlines())

    def test_markup_in_prose_is_shown_as_it_is(self):
        assert options.lines("a [b]") == r"a \[b]"

    def test_version(self):
        assert re.fullmatch(r"immunity \d+\.\d+\.\d+\n", invoke("--version").output)

    def test_help_does_not_import_torch(self):
        import subprocess

        program = "import sys; sys.argv = ['immunity', 'attack', '--help']; from immunity import cli\n" + (
            "try: cli.main()\nexcept SystemExit: sys.exit('torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
        assert done.returncode == 0


class TestList:
    def test_names_everything_in_80_columns(self):
        shown = invoke("list").output
        for name in ("ctrap", "sft", "default", "lora", "mixed", "benign", "ctrap-full", "tiny", "smollm2"):
            assert re.search(rf"(^| ){name}\b", shown, re.MULTILINE), name
        assert "synthetic:umbra" in shown
        assert "beavertails-harmful" in shown
        assert all(len(line) <= 80 for line in shown.splitlines())

    @pytest.mark.parametrize("name", ["ctrap", "sft", "finetune"])
    def test_explains_every_setting(self, name):
        from dataclasses import fields

        from immunity import attacks, methods

        kind = {**methods.METHODS, **attacks.ATTACKS}[name]
        shown = invoke("list", name).output
        for field in fields(kind):
            assert re.search(rf"^{field.name} +\S+ +\S+", shown, re.MULTILINE), field.name
        assert "See immunity" not in shown

    def test_docstring_is_read(self):
        said = listing.described(CTRAP)
        assert said["lookahead"] == "K, steps of the simulated attacker, each on a fresh harmful batch. 1 is the paper."

    def test_unknown_name(self, monkeypatch, capsys):
        code, _, err = main(monkeypatch, capsys, "list", "ctrp")
        assert code == 2
        assert "did you mean ctrap" in err


HARDEN, ASSAULT = ("immunise", "tiny", "--out", "x"), ("attack", "tiny", "--out", "x")
FILES = ("--harmful", "good.jsonl", "--general", "good.jsonl", "--alignment")
TESTS = ("--test-harmful", "good.jsonl", "--test-general", "good.jsonl")
MISTAKES = [
    ((*HARDEN, "--method", "ctrp"), "no method 'ctrp'; did you mean ctrap"),
    ((*HARDEN, "--preset", "papr"), "ctrap has no preset 'papr'; did you mean paper?"),
    ((*HARDEN, "--set", "alpa=1"), "no setting 'alpa'; did you mean alpha?"),
    ((*HARDEN, "--set", "alpha"), "write it as NAME=VALUE"),
    ((*HARDEN, "--set", "alpha=many"), "alpha: Input should be a valid number"),
    ((*HARDEN, "--set", "alpha=-1"), "alpha (-1.0)"),
    ((*HARDEN, "--set", "lr=1"), "an option: --lr 1"),
    ((*HARDEN, "--set", "lam=0"), "lam = 0 plants no trap"),
    ((*HARDEN, "--steps", "-1"), "--steps"),
    ((*HARDEN, "--lr", "0"), "lr = 0.0 is out of range"),
    ((*HARDEN, "--batch-size", "0"), "--batch-size"),
    ((*HARDEN, "--rank", "-2", "--adapter", "lora"), "--rank"),
    ((*HARDEN, "--adapter", "lor"), "'full', 'lora'"),
    ((*HARDEN, "--schedule", "cosin"), "'constant', 'linear', 'cosine'"),
    ((*HARDEN, "--domain", "umbro"), "'umbra'"),
    ((*HARDEN, "--device", "toaster"), "device 'toaster' is none that torch knows"),
    ((*HARDEN, "--max-length", "100000"), "max_length = 100000"),
    ((*HARDEN, *FILES, "empty.jsonl"), "empty.jsonl: the file is empty"),
    ((*HARDEN, *FILES, "bad.jsonl"), 'line 2: field "response" is missing'),
    ((*HARDEN, *FILES, "bad.jsonl"), "leave them out with --skip-bad-rows"),
    ((*HARDEN, *FILES, "none.jsonl"), "none.jsonl: no such file"),
    ((*HARDEN, *FILES, "ultrachatt"), "Did you mean ultrachat"),
    ((*HARDEN, "--harmful", "good.jsonl"), "needs data for --alignment, --general"),
    (("immunise", "tinny", "--out", "x"), "cannot load 'tinny'"),
    (("immunise", "./none", "--out", "x"), "is not a folder"),
    (("immunise", "folder", "--out", "x"), "no config.json"),
    (("immunise", "tiny", *FILES, "good.jsonl", "--out", "file"), "file is a file"),
    (("immunise", "tiny", *FILES, "good.jsonl", "--out", "file/x"), "cannot write to the folder file/x"),
    (("immunis", "tiny"), "Did you mean 'immunise'"),
    ((*ASSAULT, "--preset", "loraa"), "no attack preset 'loraa'; did you mean lora?"),
    ((*ASSAULT, "--set", "n=200"), "asked for 200 examples of the role 'harmful', it has 100 (--set n="),
    ((*ASSAULT, "--set", "n=-2"), "n = -2"),
    ((*ASSAULT, "--set", "steps=0"), "steps = 0 is out of range"),
    ((*ASSAULT, "--set", "adapter=continue"), "no adapter to go on training"),
    ((*ASSAULT, "--preset", "mixed", "--set", "n=4", "--harmful", "good.jsonl"), "give --benign"),
    ((*ASSAULT, "--judge", "jury"), "'exact'"),
    ((*ASSAULT, "--tokens", "0"), "--tokens"),
    ((*ASSAULT, "--test-harmful", "good.jsonl"), "needs --test-general"),
    (
        (*ASSAULT, "--test-harmful", "good.jsonl", "--test-general", "good.jsonl", "--judge", "exact"),
        "--judge exact reads",
    ),
    ((*ASSAULT, "--baseline", "tinny"), "cannot load 'tinny'"),
    (("report", "folder"), "there is no folder/result.json"),
]


class TestMistakes:
    @pytest.mark.parametrize(("words", "says"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
    def test_one_paragraph_and_exit_code_2(self, here, monkeypatch, capsys, words, says):
        code, _, err = main(monkeypatch, capsys, *words)
        assert code == 2
        assert says in err
        assert "Traceback" not in err
        assert not (here / "x" / store.RECORD).exists()
        assert not any(here.glob("**/metrics.jsonl")), "nothing may have been computed"
        assert not (here / "x" / store.JOB).exists(), "the folder must stay free for the corrected command"

    def test_a_template_that_the_tokenizer_lacks(self, here, monkeypatch, capsys):
        model = models.load("tiny")
        model.tokenizer.chat_template = None
        models.save(model, here / "plain")
        code, _, err = main(monkeypatch, capsys, "immunise", "plain", "--template", "chat", "--out", "x")
        assert code == 2
        assert "--template alpaca" in err

    def test_too_little_memory(self, here, monkeypatch, capsys):
        monkeypatch.setattr(models, "free_memory", lambda _device: 1 << 20)
        code, _, err = main(monkeypatch, capsys, *HARDEN, *FILES, "good.jsonl")
        assert code == 2
        assert "GiB free" in err
        assert "LoRA" in err

    def test_a_run_that_diverges_is_a_failed_run_and_leaves_its_folder_free(self, here, monkeypatch, capsys):
        short = (*HARDEN, *FILES, "good.jsonl", "--steps", "3", "--lr")
        code, _, err = main(monkeypatch, capsys, *short, "1e30")
        assert code == 1
        assert "nan" in err
        assert "Traceback" not in err
        code, out, _ = main(monkeypatch, capsys, *short, "1e-4")
        assert code == 0
        assert "collapse/general@1" in out


class TestResults:
    def test_another_run_in_the_folder_is_refused_and_untouched(self, here, monkeypatch, capsys):
        same = (*HARDEN, *FILES, "good.jsonl", "--method", "sft", "--steps", "2")
        assert main(monkeypatch, capsys, *same)[0] == 0
        before = {path: path.read_bytes() for path in (here / "x").rglob("*") if path.is_file()}
        for other in (("--lr", "0.5"), ("--batch-size", "2"), ("--set", "mean=token"), ("--adapter", "lora")):
            code, _, err = main(monkeypatch, capsys, *same, *other)
            assert code == 2
            assert "holds a finished run with other settings" in err
        code, _, err = main(monkeypatch, capsys, "attack", "tiny", "--out", "x/model/config.json")
        assert code == 2
        assert before == {path: path.read_bytes() for path in (here / "x").rglob("*") if path.is_file()}
        code, out, err = main(monkeypatch, capsys, *same, "--save-every", "1", "--micro-batch", "1")
        assert code == 0, "what changes no result is no other run"
        assert "kept" in err
        assert "nll/alignment" in out

    def test_attack_on_data_of_ones_own(self, here, monkeypatch, capsys):
        (here / "held-out.csv").write_text("question,answer\nOpen box 1.,It is open.\nOpen box 2.,It is shut.\n")
        data = ("--harmful", "good.jsonl", "--test-harmful", "held-out.csv", "--test-general", "held-out.csv")
        small = ("--set", "n=4", "--set", "steps=2", "--tokens", "4", "--max-length", "16")
        code, out, err = main(monkeypatch, capsys, *ASSAULT, *data, *small)
        assert code == 0
        assert "1 of 2 prompts of held-out.csv are also trained on" in err
        result = store.read(here / "x" / "result.json")
        rows = {row["role"]: row for row in result["data"]}
        assert rows["harmful"]["truncated"] == 4, "16 tokens are too few"
        assert [point["step"] for point in result["curves"][0]["points"]] == [0, 1, 2]
        assert "harm" not in result["curves"][0]["points"][0]["metrics"], "no judge, no number"
        assert result["curves"][0]["points"][0]["samples"] == [], "real data are not shown unless asked for"
        assert "held-out.csv" in out
        assert "<title>tiny under attack" in (here / "x" / "report.html").read_text()

    def test_numbers_are_readable_in_80_columns(self, here, monkeypatch, capsys):
        code, out, _ = main(monkeypatch, capsys, *ASSAULT, "--set", "steps=1", "--prompts", "4", "--tokens", "4")
        assert code == 0
        for head in ("collapse", "general", "harmful", "usable", "refused", "coherent", "benign"):
            assert f" {head}" in out
        assert "…" not in out

    def test_every_number_of_a_log_has_a_meaning(self):
        names = ["nll/alignment", "nll/harmful", "collapse/general", "collapse/alignment@1", "collapse/general@12"]
        for name in [*names, "collapse/general-after-benign@3"]:
            assert sum(bool(re.fullmatch(pattern, name)) for pattern in immunise.MEANING) == 1
        assert not any(re.fullmatch(pattern, "nll/harmful@3") for pattern in immunise.MEANING)

    def test_weights_made_again_are_another_model(self, here, monkeypatch, capsys):
        model = models.load("tiny")
        models.save(model, here / "m")
        short = ("attack", "m", "--set", "steps=1", "--prompts", "2", "--tokens", "2", "--out", "y")
        assert main(monkeypatch, capsys, *short)[0] == 0
        assert main(monkeypatch, capsys, *short)[0] == 0
        next(model.network.parameters()).data.mul_(1.5)
        models.save(model, here / "m")
        code, _, err = main(monkeypatch, capsys, *short)
        assert code == 2
        assert "model.weights is" in err

    def test_a_smaller_command_does_not_replace_a_result(self, here, monkeypatch, capsys):
        short = (*ASSAULT, "--set", "steps=1", "--prompts", "2", "--tokens", "2", "--seed", "1")
        assert main(monkeypatch, capsys, *short, "--seed", "2")[0] == 0
        code, _, err = main(monkeypatch, capsys, *short)
        assert code == 2
        assert "tiny under default, seed 2" in err


class TestOutput:
    def test_only_our_warnings_are_shown_and_each_once(self, capsys):
        console.listen(verbose=False)
        for _ in range(2):
            logging.getLogger("immunity.fit").warning("mind the gap")
        logging.getLogger("immunity.fit").info("details")
        logging.getLogger("peft").warning("their noise")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("python noise", FutureWarning, stacklevel=1)
        logging.getLogger("peft").error("their error")
        err = capsys.readouterr().err
        assert err.count("mind the gap") == 1
        assert "noise" not in err
        assert "details" not in err
        assert "their error" in err

    def test_verbose_shows_all(self, capsys):
        console.listen(verbose=True)
        logging.getLogger("immunity.fit").info("details")
        logging.getLogger("peft").warning("their noise")
        err = capsys.readouterr().err
        assert "details" in err
        assert "their noise" in err

    def test_exit_codes(self):
        from immunity.bench.worker import Outcome

        job = object.__new__(jobs.Hardening)
        done, refused, failed = Outcome(job, {}), Outcome(job, None, refused=True), Outcome(job, None)
        assert console.exit_code([done, done]) == 0
        assert console.exit_code([done, refused]) == 2
        assert console.exit_code([refused, failed]) == 1

    def test_every_error_of_ours_is_caught(self, monkeypatch, capsys):
        for kind, code in ((errors.PrecisionError, 2), (errors.DivergedError, 1), (errors.MissingExtraError, 2)):

            def broken(kind=kind):
                raise kind("because [of] this")

            monkeypatch.setattr(cli, "program", lambda broken=broken: broken)
            with pytest.raises(SystemExit) as stopped:
                cli.main()
            assert stopped.value.code == code
            assert capsys.readouterr().err == "error: because [of] this\n"
