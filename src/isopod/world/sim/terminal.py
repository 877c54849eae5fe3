"""Terminal: a simulated pseudo-terminal, as a container with a terminal sees it.

The master's side (`feed`, `take`) is the supervisor's. The line discipline is the kernel's default in small: canonical lines, echo,
CR to NL on input and NL to CR NL on output, erase, end of file, interrupt and quit. `on_signal` is told of SIGINT, SIGQUIT and SIGWINCH.
Not modelled: raw mode and all other settings.
"""

import signal
from collections.abc import Callable
from typing import Final

from isopod.world.sim.owners import Owner
from isopod.world.sim.pipes import Channel, ReadEnd, WriteEnd

_INTERRUPT: Final = 0x03
_END: Final = 0x04
_QUIT: Final = 0x1C
_ERASE: Final = 0x7F
_SIGNALS: Final = {_INTERRUPT: int(signal.SIGINT), _QUIT: int(signal.SIGQUIT)}


class Terminal:
    """One pseudo-terminal.

    Args:
        master: The process that holds the master's side.
    """

    def __init__(self, master: Owner) -> None:
        self.rows = 0
        self.columns = 0
        self.on_signal: Callable[[int], None] | None = None
        self.output = Channel()
        self._input = Channel()
        self._line = bytearray()
        self._keyboard = WriteEnd(self._input, master)
        self._screen = ReadEnd(self.output, master)

    def open(self, owner: Owner) -> tuple[ReadEnd, WriteEnd]:
        """Return the ends a process inside has."""
        return ReadEnd(self._input, owner), WriteEnd(self.output, owner)

    def take(self) -> bytes:
        """Return what was written to the terminal since, as the master reads it."""
        return self._screen.read_nowait().replace(b"\n", b"\r\n")

    def feed(self, data: bytes) -> None:
        """Type."""
        for byte in data:
            self._type(ord("\n") if byte == ord("\r") else byte)

    def resize(self, rows: int, columns: int) -> None:
        """Change the window's size."""
        if (rows, columns) != (self.rows, self.columns):
            self.rows, self.columns = rows, columns
            self._raise(int(signal.SIGWINCH))

    def _type(self, byte: int) -> None:
        if byte in _SIGNALS:
            self._echo(b"^" + bytes([byte + 0x40]))
            self._line.clear()
            self._raise(_SIGNALS[byte])
        elif byte == _ERASE:
            if self._line:
                del self._line[-1]
                self._echo(b"\b \b")
        elif byte == _END:
            if not self._line:
                self._input.n_ends += 1
            self._commit()
        else:
            self._line.append(byte)
            self._echo(bytes([byte]))
            if byte == ord("\n"):
                self._commit()

    def _commit(self) -> None:
        self._input.data += self._line
        self._line.clear()
        self._input.wake()

    def _echo(self, data: bytes) -> None:
        self.output.data += data
        self.output.wake()

    def _raise(self, number: int) -> None:
        if self.on_signal is not None:
            self.on_signal(number)
