import re
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from isopod.pulse.patterns import CHARS_MAX, Pattern
from isopod.world.errors import InvalidArgument


@pytest.mark.parametrize(
    ("pattern", "fits", "fits_not"),
    [
        ("", ["", ""], ["a"]),
        ("abc", ["abc"], ["", "ab", "abcd", "xabc"]),
        ("kata_guest_.*", ["kata_guest_", "kata_guest_load"], ["kata_agent_threads"]),
        ("a|bc|", ["a", "bc", ""], ["b", "abc"]),
        ("a(b|c)*d", ["ad", "abcbd"], ["abc", "aed"]),
        ("(?:ab)+", ["ab", "abab"], ["", "aba"]),
        ("(?P<x>a)?b", ["ab", "b"], ["a"]),
        ("(?<x>a)b", ["ab"], ["b"]),
        ("a{2,3}", ["aa", "aaa"], ["a", "aaaa"]),
        ("a{2}", ["aa"], ["a", "aaa"]),
        ("a{2,}", ["aa", "aaaaa"], ["a"]),
        ("a{0}b", ["b"], ["ab"]),
        ("a{,2}", ["a{,2}"], ["", "aa"]),
        ("x{y}", ["x{y}"], ["x"]),
        ("[a-c0]+", ["abc0"], ["", "d"]),
        ("[^a-c]", ["d", "\n", "é"], ["a", ""]),
        ("[]a]", ["]", "a"], ["b"]),
        ("[a-]", ["a", "-"], ["b"]),
        (r"[\d_]+", ["12_3"], ["a"]),
        (r"[^\W]", ["a"], ["-"]),
        ("[[:upper:][:digit:]]+", ["A1"], ["a"]),
        ("[[:^alpha:]]", ["1"], ["a"]),
        (r"\d\D\s\S\w\W", ["1a b_-"], ["aaaaaa"]),
        (r"\.\*\\\{", [".*\\{"], ["abcd"]),
        (r"\x41\x{1F600}\t\n", ["A😀\t\n"], ["A"]),
        ("a.b", ["a\nb", "a😀b"], ["ab"]),
        ("^a$", ["a"], ["", "aa"]),
        ("^$", [""], ["a"]),
        (r"\Aa\z", ["a"], ["b"]),
        ("a^b", [], ["ab", "a^b"]),
        ("(^a|b)c", ["ac", "bc"], ["c"]),
        ("(?i)kata", ["kata", "KaTa"], ["data"]),
        ("(?i:k)ata", ["Kata", "kata"], ["kATA"]),
        ("(?i)[k]x", ["KX"], ["a"]),
        ("(?i)[^k]", ["a"], ["K", "k"]),
        ("(?i-i)a", ["a"], ["A"]),
        ("(?s).", ["\n"], [""]),
        ("a*?b+?", ["b", "aabb"], ["a"]),
        ("()*a", ["a"], [""]),
        ("(a*)*", ["", "aaa"], ["b"]),
    ],
)
def test_what_fits(pattern: str, fits: list[str], fits_not: list[str]) -> None:
    known = Pattern(pattern)
    assert [text for text in fits if not known.matches(text)] == []
    assert [text for text in fits_not if known.matches(text)] == []


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("(", "ends too soon|without its"),
        (")", "at character 1"),
        ("a)b", "at character 2"),
        ("[a", "too soon"),
        ("[z-a]", "before it begins"),
        ("[a-\\d]", "before it begins"),
        ("[[:no:]]", "not a class"),
        ("*a", "repetition of nothing"),
        ("a|*", "repetition of nothing"),
        ("a**", "two repetitions"),
        ("a{3,2}", "repetition of 3,2"),
        ("a{1001}", "repetition of 1001"),
        ("a\\", "too soon"),
        (r"\b", "not known"),
        (r"\pL", "not known"),
        (r"(a)\1", "not known"),
        ("(?=a)", "known here"),
        ("(?<=a)", "known here"),
        ("(?m)a", "known here"),
        (r"\x{110000}", "not a character"),
        (r"\xZZ", "not a character"),
        ("((((a{100}){100}){100}){100})", "states"),
        ("(" * 60 + ")" * 60, "in one another"),
        ("a" * (CHARS_MAX + 1), "longer"),
    ],
)
def test_what_is_refused_with_its_place(pattern: str, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why):
        Pattern(pattern)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*b", ".*.*.*.*.*.*x", "(a?){50}a{50}", "(.*a){20}"])
def test_no_pattern_takes_more_than_time_linear_in_the_text(pattern: str) -> None:
    known = Pattern(pattern)
    began = time.process_time()
    for n in range(2000, 2020):
        known.matches("a" * n)
    assert time.process_time() - began < 10  # a backtracking matcher needs years


ATOMS = st.sampled_from(["a", "b", ".", "[ab]", "[^a]", r"\d", "(?:a|b)", "x"])
REGEXES = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("|".join),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}"])).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
    ),
    max_leaves=6,
)


@given(REGEXES, st.text(alphabet="abx1\n", max_size=8))
@example("(?:a|ab)(?:c|bcd)*", "abcd")
def test_it_says_what_pythons_matcher_says(pattern: str, text: str) -> None:
    assert Pattern(pattern).matches(text) is (re.fullmatch(pattern, text, re.DOTALL | re.ASCII) is not None)


def test_answers_stay_right_when_what_is_kept_is_let_go() -> None:
    known = Pattern("[0-9]*7")
    assert [n for n in range(12_000) if known.matches(str(n)) is not (n % 10 == 7)] == []
