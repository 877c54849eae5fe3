"""Patterns: what fits, what is refused, and that none takes more than time linear in the text."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isopod.pulse.patterns import CHARS_MAX, KNOWN_MAX, Pattern
from isopod.world.errors import InvalidArgument


@pytest.mark.parametrize(
    ("pattern", "fits", "fits_not"),
    [
        ("", [""], ["a"]),
        ("abc", ["abc"], ["", "ab", "abcd", "xabc"]),
        ("kata_guest_.*", ["kata_guest_", "kata_guest_load"], ["kata_agent_threads"]),
        ("a|bc|", ["a", "bc", ""], ["b", "abc"]),
        ("a{2,3}", ["aa", "aaa"], ["a", "aaaa"]),
        ("[^a-c]", ["d", "\n", "é"], ["a", ""]),
        ("[[:upper:][:digit:]]+", ["A1"], ["a"]),
        ("a.b", ["a\nb", "a😀b"], ["ab"]),
        ("^a$", ["a"], ["", "aa"]),
        ("(?i)kata", ["kata", "KaTa"], ["data"]),
        ("(?P<x>a)?b", ["ab", "b"], ["a"]),
        (r"\x41\x{1F600}\t", ["A😀\t"], ["A"]),
    ],
)
def test_what_fits(pattern: str, fits: list[str], fits_not: list[str]) -> None:
    known = Pattern(pattern)
    assert [text for text in fits if not known.matches(text)] == []
    assert [text for text in fits_not if known.matches(text)] == []


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("(", r"missing \)"),
        ("a)|(b", r"unexpected \)"),
        ("(?=a)", "perl operator"),
        (r"(a)\1", "escape"),
        ("[a", r"missing \]"),
        ("*", "repetition"),
        ("a{1001}", "repetition"),
        ("((a{50}){50}){50}", "repetition|too large"),
        ("\ud800", "UTF-8"),
        ("a" * (CHARS_MAX + 1), "longer than"),
    ],
)
def test_what_is_refused_with_the_reason(pattern: str, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why):
        Pattern(pattern)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*b", ".*.*.*.*.*.*x", "(a?){50}a{50}", "(.*a){20}"])
def test_no_pattern_runs_away(pattern: str) -> None:
    assert not Pattern(pattern).matches("a" * 20_000 + "c")  # a matcher that tries again would not end within the test's limit


@given(st.from_regex(r"[abc.|()*+?]{0,12}", fullmatch=True), st.text("abc", max_size=6))
def test_it_says_what_pythons_matcher_says(pattern: str, text: str) -> None:
    try:
        expected = re.fullmatch(pattern, text, re.DOTALL) is not None
        known = Pattern(pattern)
    except (re.error, InvalidArgument):
        return
    assert known.matches(text) is expected


def test_answers_stay_right_when_what_is_kept_is_let_go() -> None:
    known = Pattern("[0-9]*[02468]")
    for number in range(KNOWN_MAX + 100):
        assert known.matches(str(number)) is (number % 2 == 0)
    assert known.matches("10")
