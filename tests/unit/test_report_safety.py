"""Nothing that a model, a user or a data set wrote can act on the page or reach out of it."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from immunity.report.clean import MAX_ANSWER, cleaned, script_json, shortened, visible
from immunity.report.page import render
from read_page import Elements

made_up_result: Callable[..., dict[str, Any]] = runpy.run_path(
    str(Path(__file__).parents[1] / "fixtures" / "made_up.py")
)["made_up_result"]

MARKUP = "</script><script>window.pwned=1</script><img src=x onerror=window.pwned=2>{{7*7}}{% raw %}"
HOSTILE = f"{MARKUP}\u202eevil\u2028'\"&"
SMALL: dict[str, Any] = {"defences": ("CTRAP, K = 12",), "attacks": ("AdamW, every weight",), "seeds": (0,)}


def embedded(page: str) -> Any:
    """The data that the page carries."""
    return json.loads(page.split('<script type="application/json" id="result">')[1].split("</script>", maxsplit=1)[0])


@pytest.fixture(scope="module")
def page() -> str:
    """The whole made-up page."""
    return render(made_up_result())


@pytest.fixture(scope="module")
def small() -> str:
    """One defence, one attack, one seed: what ``immunity attack`` gives."""
    return render(made_up_result(**SMALL))


@pytest.fixture(scope="module")
def poisoned() -> str:
    """A page in which every text that others write is hostile."""
    result = made_up_result(**SMALL)
    curve, defence, attack = result["curves"][0], result["defences"][0], result["attacks"][0]
    for point in curve["points"]:
        point["metrics"][HOSTILE] = 1.0
        for sample in point["samples"]:
            sample.update(prompt=HOSTILE, answer=HOSTILE, expected=HOSTILE, kind=HOSTILE)
    curve["defence"] = defence["name"] = f"D {HOSTILE}"
    curve["attack"] = attack["name"] = f"A {HOSTILE}"
    defence["settings"] = {HOSTILE: HOSTILE, "nested": [{HOSTILE: HOSTILE}]}
    defence["method"] = defence["seed"] = attack["settings"]["x"] = HOSTILE
    defence["log"] = [{"step": i, f"nll/{HOSTILE}": 1.0, f"nll/x@{HOSTILE}": 2.0} for i in range(3)]
    for row in result["data"]:
        row.update(name=HOSTILE, licence=HOSTILE, fingerprint=HOSTILE, skipped={HOSTILE: 2})
    for key in ("title", "command", "created"):
        result[key] = HOSTILE
    result["versions"] = {HOSTILE: HOSTILE}
    result["model"] = {"name": HOSTILE, "licence": HOSTILE, "parameters": HOSTILE}
    result["limits"] = [HOSTILE]
    return render(result)


class TestSafety:
    def test_hostile_text_makes_no_element(self, poisoned: str, small: str) -> None:
        def kinds(page: str) -> set[str]:
            return {tag for tag, _ in Elements(page).tags}

        assert kinds(poisoned) <= kinds(small) | {"small"}
        assert poisoned.count("<script") == poisoned.count("</script") == 2
        assert not re.search(r"<[^>]*\son\w+=", re.sub(r'"[^"]*"', '""', poisoned))

    def test_hostile_text_is_shown_as_it_is(self, poisoned: str) -> None:
        text = Elements(poisoned, "").text
        assert MARKUP in text
        assert "49" not in re.findall(r"pwned=2>(..)", text)

    def test_marks_that_reorder_text_are_spelt_out(self, poisoned: str) -> None:
        assert "\u202e" not in poisoned
        assert "\u2028" not in poisoned
        assert "[U+202E]evil[U+2028]" in poisoned

    def test_the_data_survive_their_script_element(self, poisoned: str) -> None:
        assert embedded(poisoned)["title"] == HOSTILE

    def test_nothing_is_loaded_from_anywhere(self, page: str, poisoned: str) -> None:
        for text in (page, poisoned):
            for tag, attributes in Elements(text).tags:
                assert not {"src", "srcset", "action", "data", "poster", "style"} & attributes.keys(), (tag, attributes)
                link = attributes.get("href") or attributes.get("xlink:href") or "#"
                assert link.startswith("#") or link == "data:,", link
        assert "url(" not in page
        assert "@import" not in page

    def test_the_policy_names_exactly_the_page_s_own_script_and_style(self, page: str) -> None:
        policy = next(a["content"] for t, a in Elements(page).tags if t == "meta" and "http-equiv" in a)
        script = page.rsplit("<script>", 1)[1].split("</script>", maxsplit=1)[0]
        style = page.split("<style>")[1].split("</style>", maxsplit=1)[0]
        assert policy is not None
        for kind, text in (("script", script), ("style", style)):
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert f"{kind}-src 'sha256-{digest}'" in policy
        assert policy.startswith("default-src 'none'")
        assert "unsafe" not in policy

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
        )
    )
    def test_script_json_is_json_that_html_cannot_read(self, value: Any) -> None:
        text = str(script_json(cleaned(value)))
        assert json.loads(text) == cleaned(value)
        assert not set("<>&\u2028\u2029") & set(text)
        assert text.isascii()

    @given(st.text(max_size=600))
    def test_answers_are_short_and_visible(self, text: str) -> None:
        shown = shortened(text)
        assert shown
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]", shown)
        if len(text) <= MAX_ANSWER and text.strip():
            assert shown == visible(text)

    def test_lone_surrogates_become_the_replacement_character(self) -> None:
        assert cleaned("a\ud800b\udfffc 😀") == "a\ufffdb\ufffdc 😀"
        assert "a\ufffdb" in render({**made_up_result(**SMALL), "title": "a\ud800b"}).encode().decode()

    def test_other_objects_become_their_text(self) -> None:
        assert cleaned({1: (Path("x"), {2}, math.nan, -math.inf, b"y", 1.5)}) == {
            "1": ["x", [2], None, None, "b'y'", 1.5]
        }
