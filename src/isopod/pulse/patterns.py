"""Patterns: regular expressions as Prometheus has them: RE2's, matched in time linear in the text, whatever the pattern.

Selectors come from whoever can reach the port, and one thread serves all: an expression must not be able to hold it. So Python's own
matcher, which tries again and again, is not used for what others write. A pattern matches a whole text or not at all. `.` takes line ends
too, as in Prometheus 3. Source: google-re2, the library itself.
"""

from typing import Any, Final

import re2  # type: ignore[import-untyped]  # its package has no types

from isopod.world.errors import InvalidArgument

CHARS_MAX: Final = 1000
MEMORY_BYTES_MAX: Final = 1 << 20
"""Of one compiled pattern; a larger one is refused."""
KNOWN_MAX: Final = 5000
"""How many answers are kept."""


def compile_whole(text: str) -> Any:  # re2's pattern, which has no types
    """Return an expression compiled by RE2, anchored at both ends.

    Args:
        text: It.

    Raises:
        InvalidArgument: It is malformed or too large.
    """
    if len(text) > CHARS_MAX:
        raise InvalidArgument("regular expression", text[:60], f"longer than {CHARS_MAX} characters")
    options = re2.Options()
    options.dot_nl, options.log_errors, options.max_mem = True, False, MEMORY_BYTES_MAX
    try:
        re2.compile(text, options)  # alone, or a lone parenthesis could end the group around it
        return re2.compile(f"^(?:{text})$", options)
    except re2.error as error:
        why = error.args[0] if error.args else b"malformed"
        raise InvalidArgument("regular expression", text, why.decode(errors="replace") if isinstance(why, bytes) else str(why)) from None
    except UnicodeEncodeError:
        raise InvalidArgument("regular expression", ascii(text), "not UTF-8") from None


class Pattern:
    """A regular expression, and the answers it gave.

    Args:
        text: It.

    Raises:
        InvalidArgument: It is malformed or too large.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._regex = compile_whole(text)
        self._answers: dict[str, bool] = {}

    def matches(self, text: str) -> bool:
        """Return whether the whole of a text fits."""
        known = self._answers.get(text)
        if known is None:
            if len(self._answers) >= KNOWN_MAX:
                self._answers.clear()
            known = self._answers[text] = self._regex.fullmatch(text) is not None
        return known
