"""Rows of plain numbers, and two models' rows side by side. Nothing here needs a benchmark's package."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from immunity.errors import DataError
from immunity.metrics import benchmark_results
from immunity.metrics.benchmarks import STDERR, WILSON, compared, paired, row
from immunity.metrics.stability import stability
from immunity.metrics.stats import wilson


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=60))
def test_a_share_has_wilsons_interval(values: list[float]) -> None:
    mean = sum(values) / len(values)
    one = row("quiz", "acc", mean, values)
    assert (one["low"], one["high"]) == wilson(min(mean, 1.0), len(values))
    assert one["interval"] == WILSON
    assert one["share"]
    assert one["per_item"] == values
    assert one["low"] <= one["value"] <= one["high"]


def test_truth_values_and_numpys_numbers_are_numbers() -> None:
    one = row("quiz", "acc", np.float64(0.5), [True, np.bool_(False), np.float32(1.0), np.int64(0)])
    assert one["per_item"] == [1.0, 0.0, 1.0, 0.0]
    assert one["share"]


def test_what_is_no_mean_has_no_values_per_question() -> None:
    f1 = row("quiz", "f1", 0.61, [1.0, 0.0, 1.0], stderr=0.1)
    assert f1["per_item"] is None
    assert not f1["share"]
    assert f1["interval"] == STDERR
    assert f1["low"] == pytest.approx(0.61 - 1.959964 * 0.1)
    pairs = row("prose", "word_perplexity", 8.5, [(-20.0, 9), (-11.0, 4)], stderr="N/A")
    assert (pairs["low"], pairs["interval"], pairs["per_item"], pairs["n"]) == (None, "", None, 2)


def test_a_mean_outside_0_and_1_keeps_its_values() -> None:
    one = row("text", "bleu", 20.0, [10.0, 30.0], stderr=5.0)
    assert one["per_item"] == [10.0, 30.0]
    assert not one["share"]
    assert one["interval"] == STDERR


def quiz(values: list[float], *, task: str = "quiz", metric: str = "acc", **more: object) -> dict[str, object]:
    return row(task, metric, sum(values) / len(values), values, items=range(len(values)), **more)


RIGHT = [1.0, 1.0, 0.0, 1.0] * 100


def test_pairs_have_the_shape_that_stability_takes() -> None:
    worse = [0.0 if i % 5 == 0 else v for i, v in enumerate(RIGHT)]
    rows = paired(
        [quiz(worse), quiz(worse, metric="acc_norm", first=False)],
        [quiz(RIGHT), quiz(RIGHT, metric="acc_norm", first=False)],
    )
    assert rows == [{"task": "quiz (acc)", "kind": "accuracy", "model": [worse], "baseline": [RIGHT]}]
    claim = stability(rows).claims[0]
    assert claim.verdict == "fail"
    assert claim.value == pytest.approx(-0.15)


def test_equal_models_pass_and_worse_ones_fail() -> None:
    worse = [0.0 if i % 5 == 0 else v for i, v in enumerate(RIGHT)]
    same = compared([quiz(RIGHT)], [quiz(RIGHT)])[0]
    assert (same["verdict"], same["difference"]) == ("pass", 0.0)
    assert -0.02 < same["low"] < 0.0 < same["high"] < 0.02
    found = compared([quiz(worse)], [quiz(RIGHT)])[0]
    assert (found["verdict"], found["difference"]) == ("fail", pytest.approx(-0.15))
    assert found["model"]["value"] == pytest.approx(0.6)
    assert found["baseline"]["interval"] == WILSON


def test_few_questions_show_nothing() -> None:
    found = compared([quiz(RIGHT[:12])], [quiz(RIGHT[:12])])[0]
    assert found["verdict"] == "not enough evidence"


def test_less_can_be_better() -> None:
    bad, good = [1.0] * 40 + [0.0] * 360, [0.0] * 400
    worse = compared([quiz(bad, metric="toxic", more=False)], [quiz(good, metric="toxic", more=False)])[0]
    assert worse["verdict"] == "fail"
    assert "worse by more than 2 points" in worse["says"]
    assert paired([quiz(bad, more=False)], [quiz(good, more=False)]) == []


def test_several_tasks_are_also_held_together() -> None:
    rows = [quiz(RIGHT[:80], task=name) for name in ("one", "two", "three")]
    found = compared(rows, rows)
    assert [r["task"] for r in found] == ["one", "two", "three", "all 3 tasks"]
    assert [r["verdict"] for r in found] == ["not enough evidence"] * 3 + ["pass"]
    assert found[-1]["n"] == 240


def test_parts_of_a_group_are_not_counted_twice() -> None:
    parts = [quiz(RIGHT[:80], task=name, group="all") for name in ("one", "two")]
    rows = [quiz(RIGHT[:160], task="all"), *parts]
    assert [r["task"] for r in compared(rows, rows)] == ["all", "one", "two"]
    assert [r["task"] for r in paired(rows, rows)] == ["all (acc)"]


def test_numbers_without_a_limit_get_no_verdict() -> None:
    mine, theirs = ([row("text", "bleu", sum(v) / 4, v)] for v in ([1.0, 20.0, 3.0, 4.0], [2.0, 22.0, 3.0, 5.0]))
    found = compared(mine, theirs)[0]
    assert (found["verdict"], found["difference"]) == ("", pytest.approx(-1.0))
    assert found["low"] < -1.0 < found["high"]


def test_other_questions_are_refused() -> None:
    with pytest.raises(DataError, match=r"only one of the two models was asked other \(acc\)"):
        compared([quiz(RIGHT)], [quiz(RIGHT), quiz(RIGHT, task="other")])
    with pytest.raises(DataError, match="not asked the same questions"):
        compared([quiz(RIGHT)], [quiz(RIGHT[:-4])])


def lm_eval_sample(task_id: int, used: str, **scores: float) -> dict[str, object]:
    """A sample as lm-eval 0.4.13 logs it."""
    return {
        "doc_id": task_id,
        "doc": {"question": f"Question {task_id}?"},
        "target": 0,
        "arguments": [("Question?", "yes"), ("Question?", "no")],
        "resps": [[(-1.0, True)], [(-2.0, False)]],
        "filtered_resps": [(-1.0, True), (-2.0, False)],
        "filter": used,
        "metrics": list(scores),
        "doc_hash": f"hash {task_id}",
        "prompt_hash": "p",
        "target_hash": "t",
        **scores,
    }


def test_rows_of_a_result_of_lm_eval() -> None:
    found = {
        "results": {
            "quiz": {
                "name": "quiz",
                "alias": "quiz",
                "sample_len": 4,
                "acc,none": 0.75,
                "acc_stderr,none": 0.25,
                "f1,none": 0.7,
                "f1_stderr,none": 0.2,
            },
            "sums": {
                "name": "sums",
                "alias": "sums",
                "sample_len": 2,
                "exact_match,strict": 0.0,
                "exact_match_stderr,strict": 0.0,
                "exact_match,flexible": 0.5,
                "exact_match_stderr,flexible": 0.5,
            },
        },
        "group_subtasks": {},
        "configs": {
            "quiz": {"task": "quiz", "metric_list": [{"metric": "acc"}, {"metric": "f1"}]},
            "sums": {"task": "sums", "metric_list": [{"metric": "exact_match", "aggregation": "mean"}]},
        },
        "higher_is_better": {"quiz": {"acc": True, "f1": True}, "sums": {"exact_match": True}},
        "samples": {
            "quiz": [lm_eval_sample(i, "none", f1=0.0, acc=float(i != 2)) for i in (1, 0, 2, 3)],
            "sums": [
                lm_eval_sample(i, used, exact_match=float((used, i) == ("flexible", 0)))
                for used in ("strict", "flexible")
                for i in (0, 1)
            ],
        },
    }
    rows = benchmark_results.of_lm_eval(found)
    assert [(r["task"], r["metric"], r["first"]) for r in rows] == [
        ("quiz", "f1", False),
        ("quiz", "acc", True),
        ("sums", "exact_match, strict", True),
        ("sums", "exact_match, flexible", False),
    ]
    f1, acc, _, flexible = rows
    assert acc["per_item"] == [1.0, 1.0, 0.0, 1.0]  # in the order of the questions
    assert (acc["value"], acc["n"], acc["interval"]) == (0.75, 4, WILSON)
    assert (f1["per_item"], f1["interval"]) == (None, STDERR)
    assert flexible["per_item"] == [1.0, 0.0]
    assert acc["items"] == f1["items"] != flexible["items"]


def test_a_group_counts_its_parts_by_their_size() -> None:
    def part(name: str, values: list[float]) -> dict[str, object]:
        return {"name": name, "sample_len": len(values), "acc,none": sum(values) / len(values), "acc_stderr,none": 0.1}

    values = {"a": [1.0, 1.0, 1.0], "b": [0.0], "c": [1.0, 0.0]}
    found = {
        "results": {name: part(name, v) for name, v in values.items()} | {"all": {"acc,none": 0.5}},
        "groups": {"all": {"acc,none": 0.5}},
        "group_subtasks": {"all": ["a", "inner"], "inner": ["b", "c"]},
        "configs": {name: {"metric_list": [{"metric": "acc"}]} for name in values},
        "higher_is_better": {name: {"acc": True} for name in (*values, "all")},
        "samples": {name: [lm_eval_sample(i, "none", acc=v) for i, v in enumerate(vs)] for name, vs in values.items()},
    }
    rows = benchmark_results.of_lm_eval(found)
    assert [r["task"] for r in rows] == ["all", "a", "b", "c"]
    assert rows[0]["per_item"] == [1.0, 1.0, 1.0, 0.0, 1.0, 0.0]
    assert rows[0]["group"] == ""
    assert all(r["group"] for r in rows[1:])


def inspect_log(scores: list[dict[str, object]], samples: list[dict[str, object]]) -> dict[str, object]:
    """A log as inspect-ai 0.3.285 dumps it, without what nobody reads here."""
    return {
        "version": 2,
        "status": "success",
        "eval": {"task": "package/quiz", "model": "immunity/tiny", "dataset": {"name": "quiz", "samples": 2}},
        "results": {"total_samples": 2, "completed_samples": 2, "scores": scores},
        "samples": samples,
    }


def inspect_sample(key: int, epoch: int, **scores: object) -> dict[str, object]:
    return {
        "id": key,
        "epoch": epoch,
        "input": f"Question {key}?",
        "target": "A",
        "scores": {name: {"value": value, "answer": "A"} for name, value in scores.items()},
    }


def metric(name: str, value: float) -> dict[str, object]:
    return {"name": name, "value": value, "params": {}}


def test_rows_of_a_log_of_inspect() -> None:
    scores = [
        {
            "name": "choice",
            "scorer": "choice",
            "metrics": {"accuracy": metric("accuracy", 0.75), "stderr": metric("stderr", 0.25)},
        },
        {"name": "length", "scorer": "shape", "metrics": {"mean": metric("mean", 12.0), "std": metric("std", 2.0)}},
    ]
    samples = [
        inspect_sample(1, 1, choice="C", shape={"length": 10}),
        inspect_sample(2, 1, choice="P", shape={"length": 14}),
    ]
    first, second = benchmark_results.of_inspect([inspect_log(scores, samples)])
    assert (first["task"], first["metric"], first["first"]) == ("quiz", "accuracy, choice", True)
    assert (first["per_item"], first["interval"]) == ([1.0, 0.5], WILSON)
    assert (second["metric"], second["per_item"], second["first"]) == ("mean, length", [10.0, 14.0], False)


def test_a_question_that_inspect_asks_twice_counts_once() -> None:
    scores = [{"name": "match", "scorer": "match", "metrics": {"accuracy": metric("accuracy", 0.75)}}]
    samples = [inspect_sample(i, epoch, match="I" if (i, epoch) == (1, 2) else "C") for epoch in (1, 2) for i in (1, 2)]
    found = benchmark_results.of_inspect([inspect_log(scores, samples)])[0]
    assert found["per_item"] == [0.5, 1.0]
    assert found["n"] == 2


def test_the_order_in_which_inspect_finished_and_the_ids_that_it_drew_do_not_matter() -> None:
    scores = [{"name": "match", "scorer": "match", "metrics": {"accuracy": metric("accuracy", 0.5)}}]
    found = []
    for order, drawn in ((1, 2, 10), "a"), ((10, 2, 1), "b"):
        samples = [
            inspect_sample(i, 1, match="C" if i < 10 else "I")
            | {"input": [{"id": drawn, "role": "user", "content": f"Question {i}?"}]}
            for i in order
        ]
        found += benchmark_results.of_inspect([inspect_log(scores, samples)])
    assert found[0]["items"] == found[1]["items"]


def test_an_answer_without_a_grade_leaves_no_values() -> None:
    scores = [{"name": "judge", "scorer": "judge", "metrics": {"accuracy": metric("accuracy", 1.0)}}]
    samples = [inspect_sample(1, 1, judge="C"), inspect_sample(2, 1, judge="maybe")]
    found = benchmark_results.of_inspect([inspect_log(scores, samples)])[0]
    assert (found["per_item"], found["low"]) == (None, None)
