"""Intake: receives the body of the request at hand, and finds its end.

A body of known length is counted, not parsed, and passed on without a copy. A chunked one goes through the parser in pieces that end at
each CRLF CRLF, one of which ends the body: so the parser never sees a byte of what follows. A body that nobody will read is received for a
while and thrown away, because that is cheaper than another connection.
"""

from typing import Final

import httptools

from isopod.net.http.body import Flow, RequestBody
from isopod.net.http.limits import HttpLimits
from isopod.net.http.messages import HttpError
from isopod.net.http.syntax import HEAD_END, Facts
from isopod.net.http.timing import Pace

_KEEP: Final = -1


class TooMuch(Exception):
    """More of an unwanted body came than saving the connection is worth."""


class Intake:
    """One body.

    Args:
        flow: The connection.
        limits: The server's.
        facts: The request's; it has a body.
        parser: Has read the head, for a chunked body.
    """

    __slots__ = (
        "_discard_max",
        "_is_chunked",
        "_limits",
        "_parser",
        "_tail",
        "body",
        "is_complete",
        "is_expecting",
        "n_bytes",
        "n_left",
        "pace",
    )

    def __init__(self, flow: Flow, limits: HttpLimits, facts: Facts, parser: httptools.HttpRequestParser | None) -> None:
        self.body = RequestBody(flow, limits, None if facts.is_chunked else facts.content_length)
        self.is_complete = False
        self.is_expecting = facts.expects_continue
        """Whether the peer waits for our 100."""
        self.n_bytes = 0
        self.n_left = facts.content_length
        self.pace = Pace()
        self._limits = limits
        self._is_chunked = facts.is_chunked
        self._parser = parser
        self._tail = b""
        self._discard_max = _KEEP

    def advance(self, buffer: bytes, position: int) -> int:
        """Use what was received.

        Args:
            buffer: What came.
            position: What is before was used.

        Returns:
            The new position; `is_complete` says whether it is the body's end.

        Raises:
            HttpError: 400: the chunks are malformed.
            TooMuch: Of an unwanted body.
        """
        return self._advance_chunked(buffer, position) if self._is_chunked else self._advance_length(buffer, position)

    def take(self, data: bytes) -> None:
        """Take a piece of the body; the parser's `on_body` comes here too."""
        self.is_expecting = False
        self.n_bytes += len(data)
        if self._discard_max == _KEEP:
            self.body.feed(data)

    def end(self) -> None:
        """The parser saw the end of a chunked body."""
        self.is_complete = True

    def can_discard(self) -> bool:
        """Return whether what is left can be received and thrown away."""
        if self.is_complete:
            return True
        if self.is_expecting:  # the peer may send the body or not: there is no telling where its next request begins
            return False
        return self._is_chunked or self.n_left <= self._limits.discard_bytes_max

    def discard(self) -> None:
        """Throw away what came and what comes."""
        self.body.drop()
        self._discard_max = self.n_bytes + self._limits.discard_bytes_max

    def _advance_length(self, buffer: bytes, position: int) -> int:
        end = min(len(buffer), position + self.n_left)
        self.n_left -= end - position
        self.take(buffer if position == 0 and end == len(buffer) else buffer[position:end])
        self._settle(is_complete=self.n_left == 0)
        return end

    def _advance_chunked(self, buffer: bytes, position: int) -> int:
        window = self._tail + buffer[position:]
        found = window.find(HEAD_END)
        end = len(buffer) if found < 0 else position + found + len(HEAD_END) - len(self._tail)
        piece = buffer[position:end]
        # The next search may begin with the last LF, but not find the same end twice.
        self._tail = (self._tail + piece)[-3:]
        assert self._parser is not None
        try:
            self._parser.feed_data(piece)
        except httptools.HttpParserError as error:
            raise HttpError(400, "a malformed chunked body") from error
        self._settle(is_complete=self.is_complete)
        return end

    def _settle(self, *, is_complete: bool) -> None:
        if is_complete:
            self.is_complete = True
            self.pace.end()
            self.body.finish()
        elif self._discard_max != _KEEP and self.n_bytes > self._discard_max:
            raise TooMuch
