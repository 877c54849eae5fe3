"""Expansion of words in the simulated shell: variables, $(command), $((sum)), quotes, and splitting into fields."""

from collections.abc import Awaitable, Callable, Sequence

from isopod.world.sim.programs.shell_grammar import Word


class Scope:
    """The variables and parameters of one shell.

    Args:
        variables: Its variables; the caller's dict.
        positional: $0, $1, ...
        pid: $$.
        capture: Runs a command and returns what it printed.
    """

    def __init__(self, variables: dict[str, str], positional: Sequence[str], *, pid: int, capture: Callable[[str], Awaitable[str]]) -> None:
        self.variables = variables
        self.positional = list(positional)
        self.status = 0
        self.last_background = 0
        self._pid = pid
        self._capture = capture

    async def fields(self, words: Sequence[Word]) -> list[str]:
        """Expand words into fields."""
        return [field for word in words for field in await self._expand(word, split=True)]

    async def text(self, word: Word) -> str:
        """Expand a word into one text."""
        return "".join(await self._expand(word, split=False))

    async def _expand(self, word: Word, *, split: bool) -> list[str]:
        fields: list[str] = []
        current, has_current = "", False
        for piece in word:
            if piece.kind == "variable" and piece.value == "@" and piece.quoted:
                fields += self.positional[1:]
                continue
            text = piece.value if piece.kind == "text" else await self._value(piece.kind, piece.value)
            if piece.kind == "text" or piece.quoted or not split:
                current, has_current = current + text, True
                continue
            parts = text.split()
            if parts:
                if text[0].isspace() and has_current:
                    fields.append(current)
                    current = ""
                fields += [current + parts[0], *parts[1:]] if len(parts) > 1 else []
                current, has_current = (fields.pop() if len(parts) > 1 else current + parts[0]), True
        return [*fields, current] if has_current else fields

    async def _value(self, kind: str, text: str) -> str:
        if kind == "command":
            return await self._capture(text)
        if kind == "sum":
            return str(self._sum(text))
        specials = {"$": str(self._pid), "?": str(self.status), "!": str(self.last_background)}
        if text in specials:
            return specials[text]
        if text == "#":
            return str(max(0, len(self.positional) - 1))
        if text in ("@", "*"):
            return " ".join(self.positional[1:])
        if text.isdigit():
            return self.positional[int(text)] if int(text) < len(self.positional) else ""
        return self.variables.get(text, "")

    def _sum(self, text: str) -> int:
        """Compute integers joined by + - * / % and comparisons, from left to right."""
        words = text.replace("$", "")
        for operator in ("+", "-", "*", "/", "%", "<", ">"):
            words = words.replace(operator, f" {operator} ")
        items = words.split()
        total = self._number(items[0]) if items else 0
        for operator, item in zip(items[1::2], items[2::2], strict=False):
            value = self._number(item)
            match operator:
                case "+":
                    total += value
                case "-":
                    total -= value
                case "*":
                    total *= value
                case "/":
                    total = int(total / value)
                case "%":
                    total %= value
                case "<":
                    total = int(total < value)
                case ">":
                    total = int(total > value)
        return total

    def _number(self, text: str) -> int:
        value = text if text.lstrip("-").isdigit() else self.variables.get(text, "0")
        return int(value) if value.lstrip("-").isdigit() else 0
