"""What a command says of data before it uses them."""

from __future__ import annotations

import logging
from dataclasses import replace

from immunity.bench import standins
from immunity.cli.data import warn_of_overlap
from immunity.data.corpus import Corpus


def test_prompts_that_are_trained_on_are_counted_however_they_are_written(caplog):
    suite = standins.suite("umbra", n=6)
    loud = tuple(replace(e, prompt=f"  {e.prompt.upper()}") for e in suite.harmful)
    data = {"harmful": Corpus("harmful", loud[:2], "loud"), "benign": (Corpus("benign", loud[2:3], "one more"),)}
    with caplog.at_level(logging.WARNING):
        warn_of_overlap(data, suite)
    (row,) = caplog.records
    assert row.getMessage().startswith(f"3 of 6 prompts of {suite.harmful.name} are also trained on")


def test_data_that_share_nothing_are_passed_in_silence(caplog):
    with caplog.at_level(logging.WARNING):
        warn_of_overlap(standins.attacker("umbra"), standins.suite("umbra", n=6))
    assert not caplog.records
