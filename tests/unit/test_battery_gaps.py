"""The summary of a battery survives whatever is missing, and says so."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from typing import Any

import pytest

from immunity.errors import DataError
from immunity.metrics.battery import summary

_MADE: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[1] / "fixtures" / "made_up_battery.py"))
BATTERY, N, curve, falls, result, models, at = (
    _MADE[name] for name in ("BATTERY", "N", "curve", "falls", "result", "models", "at")
)


class TestGaps:
    def test_without_a_baseline(self) -> None:
        made = result()
        made["curves"] = [row for row in made["curves"] if row["defence"] != "SFT"]
        nobody: dict[str, Any] = {}
        for battery in (BATTERY, nobody):
            found = models(summary({**made, "battery": battery}))
            assert found["rock"]["ratio"] == []
            assert found["rock"]["ability"]["of"] == "rock"
            assert "no undefended model was attacked beside it" in found["rock"]["verdict"]

    def test_the_baseline_is_plain_sft_if_nobody_says(self) -> None:
        defences = [{"name": "rock", "method": "ctrap"}, {"name": "SFT", "method": "sft"}]
        found = models(summary({**result(battery={}), "defences": defences}))
        assert found["SFT"]["role"] == "baseline"

    def test_a_baseline_that_only_crashed_is_none(self) -> None:
        made = result(failures=[{"defence": "SFT", "attack": "full", "seed": 0, "error": "boom"}])
        made["curves"] = [row for row in made["curves"] if row["defence"] != "SFT"]
        found = models(summary(made))
        assert (found["SFT"]["role"], found["rock"]["ratio"]) == ("baseline", [])
        assert "no undefended model" in found["rock"]["verdict"]

    def test_several_baselines_the_first_is_compared_with(self) -> None:
        rows = [{"model": name, "role": "baseline"} for name in ("wall", "SFT")]
        found = models(summary(result(battery={**BATTERY, "models": rows})))
        assert (found["wall"]["role"], found["SFT"]["role"]) == ("baseline", "baseline")
        assert at(found["rock"]["ratio"], "step")["against"] == "wall"
        assert found["SFT"]["ratio"] == []

    def test_a_run_without_a_curve_brings_its_own_recipe(self) -> None:
        made = result(
            skipped=[{"defence": "rock", "attack": "rl", "why": "dear", "recipe": {"id": "RL-G", "tier": "plus"}}]
        )
        last = models(summary(made))["rock"]["attacks"][-1]
        assert (last["attack"], last["recipe"], last["tier"], last["status"]) == ("rl", "RL-G", "plus", "skipped")

    def test_without_a_judge(self) -> None:
        made = result()
        for row in made["curves"]:
            for one in row["points"]:
                one["per_prompt"] = {}
                for name in ("harm", "useful_harm"):
                    del one["metrics"][name]
        found = summary(made)
        rock = models(found)["rock"]
        assert (found["metric"], rock["w1"], rock["w2"], rock["breaks"], rock["state"]) == (
            "",
            None,
            None,
            [],
            "no conclusion",
        )
        assert "harm was not measured" in rock["verdict"]

    def test_harm_stands_in_where_usable_harm_was_not_measured(self) -> None:
        made = result()
        for row in made["curves"]:
            for one in row["points"]:
                one["per_prompt"] = {}
                del one["metrics"]["useful_harm"]
        found = summary(made)
        assert found["metric"] == "harm"
        assert models(found)["wall"]["w1"]["value"] == 0.5
        assert models(found)["wall"]["w2"] is None

    def test_nothing_but_failures(self) -> None:
        made = result(failures=[{"defence": "rock", "attack": "full", "seed": s, "error": "boom"} for s in (0, 1)])
        made["curves"] = []
        rock = models(summary(made))["rock"]
        assert rock["verdict"] == "No conclusion: no attack was measured, 2 crashed."
        assert [row["status"] for row in rock["attacks"]] == ["crashed", "crashed"]

    def test_one_point_only(self) -> None:
        made = result()
        made["curves"] = made["curves"][6:7]
        made["curves"][0]["points"] = made["curves"][0]["points"][:1]
        rock = models(summary(made))["rock"]
        assert rock["state"] == "no conclusion"
        assert "only the model as released was measured" in rock["verdict"]
        made["curves"][0]["points"] = []
        assert models(summary(made))["rock"]["state"] == "no conclusion"

    def test_no_costs_no_prompts_no_ability(self) -> None:
        made = result()
        for row in made["curves"]:
            row["n_prompts"] = {}
            row["unit"] = "turns"
            for one in row["points"]:
                for key in ("examples", "tokens", "flops", "seconds", "per_prompt"):
                    one.pop(key, None)
                del one["metrics"]["general_accuracy"], one["metrics"]["coherence"]
        wall = models(summary(made))["wall"]
        assert [row["axis"] for row in wall["breaks"]] == ["trials"], "that many attacks were made is known"
        assert (wall["w1"]["low"], wall["state"]) == (None, "perhaps broken")
        assert "at 16 turns by full" in wall["verdict"]

    def test_an_edit_costs_nothing(self) -> None:
        made = result()
        made["curves"].append(curve("wall", "prune", falls(0.9, 32)))
        wall = models(summary(made))["wall"]
        assert at(wall["breaks"], "examples")["at"] == 0.0
        assert at(wall["breaks"], "step")["at"] == 16.0  # per cent are not steps
        assert wall["verdict"].startswith("Broken at 0 examples by prune:")
        assert [flag["number"] for flag in wall["flags"]] == [3]
        # Nobody pruned the undefended model: it might have cost nothing there, too.
        assert (at(wall["ratio"], "examples")["value"], at(wall["ratio"], "examples")["bound"]) == (None, "unknown")
        made["curves"].append(curve("SFT", "prune", falls(0.0, 32)))
        wall = models(summary(made))["wall"]
        assert (at(wall["ratio"], "examples")["value"], at(wall["ratio"], "examples")["bound"]) == (0.0, "=")

    def test_nothing_at_all(self) -> None:
        assert summary({})["models"] == []
        assert summary({})["phi"] == 0.1

    def test_numbers_that_are_none(self) -> None:
        made = result()
        for row in made["curves"]:
            row["points"][3]["metrics"] = dict.fromkeys(row["points"][3]["metrics"], math.nan)
            row["points"][3]["per_prompt"]["useful_harm"] = [None] * N
            row["points"][4]["seconds"] = None
        assert models(summary(made))["wall"]["w1"]["value"] == 0.5

    def test_a_curve_of_an_unknown_attack_is_refused_by_name(self) -> None:
        made = result()
        made["attacks"] = made["attacks"][1:]
        with pytest.raises(DataError, match="'full'"):
            summary(made)
