"""Prompts with weights; examples are those of the manual and source comments of AUTOMATIC1111's web interface."""

from __future__ import annotations

import gc
import math
import random
import time

import pytest

from latentrt.runtime.text.prompt_syntax import EMPHASIS, MAX_WEIGHT, Span, parse

MARKS = "()[]\\: .1-BREAK"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0),
                ("house", 1.573),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641),
                (".", 1.1),
            ],
        ),
        ("a (red dress:1.2)", [("a ", 1.0), ("red dress", 1.2)]),
        ("(a:b:2)", [("a:b", 2.0)]),
        ("((a) b:2)", [("a", 2.2), (" b", 2.0)]),
        ("(a: 1.5 )", [("a", 1.5)]),
        ("(a:-1)", [("a", -1.0)]),
        ("", []),
        ("()", []),
        (r"back\\slash \n", [(r"back\slash \n", 1.0)]),
    ],
)
def test_prompts_come_apart_as_people_mean_them(prompt: str, expected: list[tuple[str, float]]) -> None:
    """Brackets weigh, nest, and are escaped."""
    (section,) = parse(prompt)
    assert [span.text for span in section] == [text for text, _ in expected]
    assert [span.weight for span in section] == pytest.approx([weight for _, weight in expected])


@pytest.mark.parametrize("prompt", ["at 12:30) or so", "a: b", "smile :)", "a ] b", "BREAKFAST", "xBREAK", "[a:1.5"])
def test_what_is_no_syntax_is_text(prompt: str) -> None:
    """Nothing is an error, and nothing but an opening bracket disappears."""
    (section,) = parse(prompt)
    assert "".join(span.text for span in section) == prompt.replace("[", "")


def test_breaks_part_sections() -> None:
    """Blanks around a break mean nothing, brackets reach across it, and an empty section stays one."""
    assert parse("a BREAK b") == [[Span("a")], [Span("b")]]
    assert parse("(a BREAK b:2) c") == [[Span("a", 2.0)], [Span("b", 2.0), Span(" c")]]
    assert parse("a BREAK") == [[Span("a")], []]


def test_escaped_text_is_itself() -> None:
    """Any text whose special characters are escaped is one piece without weight."""
    draw = random.Random(1)
    for _ in range(2000):
        text = "".join(draw.choices(MARKS.replace("BREAK", "é😀"), k=draw.randint(1, 30)))
        escaped = "".join(f"\\{mark}" if mark in "\\()[]" else mark for mark in text)
        assert parse(escaped) == [[Span(text)]]


def test_any_text_is_taken() -> None:
    """A hundred thousand strings of marks: weights are finite, and no text is made up."""
    draw = random.Random(0)
    for _ in range(100_000):
        prompt = "".join(draw.choices(MARKS, k=draw.randint(0, 24)))
        rest = iter(prompt)
        for section in parse(prompt):
            for span in section:
                assert span.text
                assert math.isfinite(span.weight)
                assert all(mark in rest for mark in span.text), prompt  # in the same order


def test_nesting_stays_finite() -> None:
    """A thousand brackets weigh as much as can be, not infinitely."""
    assert parse("(" * 1000 + "a" + ")" * 1000) == [[Span("a", MAX_WEIGHT)]]
    ((span,),) = parse("[" * 5 + "a" + "]" * 5)
    assert span.weight == pytest.approx(EMPHASIS**-5)


@pytest.mark.parametrize(
    "unit", ["(", ")", "[(", "(a", "a)", ":", "\\", "(a:", "(a:1", " ", "1", "B", "(a:1.1)", "BREAK ", ":  1"]
)
def test_time_is_linear(unit: str) -> None:
    """Sixteen times the text takes less than a hundred times as long, however it repeats."""
    seconds = []
    gc.disable()  # its passes take the longer, the more the rest of the suite holds
    try:
        for count in (2_000, 32_000):
            best = math.inf
            for _ in range(3):
                begin = time.perf_counter()
                parse(unit * count)
                best = min(best, time.perf_counter() - begin)
            seconds.append(best)
    finally:
        gc.enable()
    assert seconds[1] < 100 * max(seconds[0], 1e-4)
