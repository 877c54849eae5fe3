"""The grammar of the simulated shell: text to a tree. Pure.

A small part of POSIX sh: lists with ; & newline, && ||, pipelines, !, redirections, assignments, while/until, for, if, ( ) and { }, quotes,
$NAME ${NAME} $$ $? $! $# $@ $0-$9, $(command) and $((sum)). Not: functions, case, here documents, globs, ${NAME:-x}.
Words keep their pieces unexpanded: expansion needs the running shell.
"""

from typing import Final, Literal, NamedTuple, Union

OPERATORS: Final = ("&&", "||", ">>", ">&", "<&", ";", "&", "|", "(", ")", "<", ">", "\n")
_WORD_ENDS: Final = " \t\n;&|()<>"
_CLOSERS: Final = ("then", "elif", "else", "fi", "do", "done", "}")
_SPECIAL: Final = "$?!#@*"


class SyntaxFault(Exception):
    """The text is not a program."""


class Piece(NamedTuple):
    """Part of a word. Kinds: "text", "variable", "command" ($(...)), "sum" ($((...)))."""

    kind: Literal["text", "variable", "command", "sum"]
    value: str
    quoted: bool


Word = tuple[Piece, ...]


class Redirect(NamedTuple):
    """N>word and its kin; for >& the word is the other number."""

    number: int
    operator: str
    target: Word


class Simple(NamedTuple):
    """Assignments, words, redirections."""

    assignments: tuple[tuple[str, Word], ...]
    words: tuple[Word, ...]
    redirects: tuple[Redirect, ...]


class Loop(NamedTuple):
    """while or until."""

    condition: "Node"
    body: "Node"
    until: bool


class Each(NamedTuple):
    """for NAME in WORDS."""

    name: str
    words: tuple[Word, ...]
    body: "Node"


class If(NamedTuple):
    """if: branches of (condition, body), and what else."""

    branches: tuple[tuple["Node", "Node"], ...]
    otherwise: "Node | None"


class Subshell(NamedTuple):
    """( list )."""

    body: "Node"


class Pipeline(NamedTuple):
    """Commands connected by |."""

    commands: tuple["Node", ...]
    negated: bool


class Both(NamedTuple):
    """left && right, or left || right."""

    left: "Node"
    operator: str
    right: "Node"


class Steps(NamedTuple):
    """Commands one after the other; True marks those that run in the background."""

    items: tuple[tuple["Node", bool], ...]


Node = Union[Simple, Loop, Each, If, Subshell, Pipeline, Both, Steps]  # noqa: UP007 - recursive


class _Token(NamedTuple):
    operator: str
    word: Word
    number: int | None = None


def parse(text: str) -> Node:
    """Return the tree of a script.

    Raises:
        SyntaxFault: It is none.
    """
    parser = _Parser(_tokenize(text))
    node = parser.sequence()
    if parser.here() is not None:
        raise SyntaxFault(f"unexpected {parser.describe()}")
    return node


class _Parser:
    """Recursive descent over tokens."""

    def __init__(self, tokens: list[_Token]) -> None:
        self._tokens = tokens
        self._position = 0

    def here(self) -> _Token | None:
        return self._tokens[self._position] if self._position < len(self._tokens) else None

    def describe(self) -> str:
        token = self.here()
        return "end of file" if token is None else f'"{token.operator or "".join(piece.value for piece in token.word)}"'

    def sequence(self) -> Node:
        items: list[tuple[Node, bool]] = []
        self._skip_newlines()
        while self.here() is not None and not self._at_operator(")") and self._keyword() not in _CLOSERS:
            node = self._and_or()
            background = self._accept("&")
            items.append((node, background))
            if not background and not self._accept(";") and not self._accept("\n"):
                break
            self._skip_newlines()
        return items[0][0] if len(items) == 1 and not items[0][1] else Steps(tuple(items))

    def _and_or(self) -> Node:
        left = self._pipeline()
        while self._at_operator("&&") or self._at_operator("||"):
            operator = self._take().operator
            self._skip_newlines()
            left = Both(left, operator, self._pipeline())
        return left

    def _pipeline(self) -> Node:
        negated = self._keyword() == "!"
        if negated:
            self._take()
        commands = [self._command()]
        while self._accept("|"):
            self._skip_newlines()
            commands.append(self._command())
        return commands[0] if len(commands) == 1 and not negated else Pipeline(tuple(commands), negated)

    def _command(self) -> Node:
        if self._accept("("):
            body = self.sequence()
            self._expect_operator(")")
            return Subshell(body)
        match self._keyword():
            case "while" | "until" as word:
                self._take()
                condition = self.sequence()
                return Loop(condition, self._block("do", "done"), word == "until")
            case "for":
                return self._for()
            case "if":
                return self._if()
            case "{":
                return self._block("{", "}")
        return self._simple()

    def _for(self) -> Node:
        self._take()
        name = _plain(self._take().word) or ""
        words: list[Word] = []
        if self._keyword() == "in":
            self._take()
            while (token := self.here()) is not None and token.word:
                words.append(self._take().word)
        self._accept(";")
        self._skip_newlines()
        return Each(name, tuple(words), self._block("do", "done"))

    def _if(self) -> Node:
        branches: list[tuple[Node, Node]] = []
        while self._keyword() in ("if", "elif"):
            self._take()
            condition = self.sequence()
            self._expect_keyword("then")
            branches.append((condition, self.sequence()))
        otherwise = None
        if self._keyword() == "else":
            self._take()
            otherwise = self.sequence()
        self._expect_keyword("fi")
        return If(tuple(branches), otherwise)

    def _block(self, opener: str, closer: str) -> Node:
        self._expect_keyword(opener)
        body = self.sequence()
        self._expect_keyword(closer)
        return body

    def _simple(self) -> Node:
        assignments: list[tuple[str, Word]] = []
        words: list[Word] = []
        redirects: list[Redirect] = []
        while (token := self.here()) is not None:
            if token.operator in ("<", ">", ">>", ">&", "<&"):
                self._take()
                number = token.number if token.number is not None else int(token.operator[0] == ">")
                redirects.append(Redirect(number, token.operator, self._take().word))
            elif token.word:
                self._take()
                name = _assigned(token.word) if not words else None
                if name is not None:
                    assignments.append((name, _after(token.word, len(name) + 1)))
                else:
                    words.append(token.word)
            else:
                break
        if not assignments and not words and not redirects:
            raise SyntaxFault(f"unexpected {self.describe()}")
        return Simple(tuple(assignments), tuple(words), tuple(redirects))

    def _take(self) -> _Token:
        token = self.here()
        if token is None:
            raise SyntaxFault("unexpected end of file")
        self._position += 1
        return token

    def _keyword(self) -> str | None:
        token = self.here()
        return None if token is None else _plain(token.word)

    def _at_operator(self, operator: str) -> bool:
        token = self.here()
        return token is not None and token.operator == operator

    def _accept(self, operator: str) -> bool:
        found = self._at_operator(operator)
        self._position += found
        return found

    def _expect_operator(self, operator: str) -> None:
        if not self._accept(operator):
            raise SyntaxFault(f"unexpected {self.describe()}")

    def _expect_keyword(self, word: str) -> None:
        self._skip_newlines()
        if self._keyword() != word:
            raise SyntaxFault(f'unexpected {self.describe()} (expecting "{word}")')
        self._take()

    def _skip_newlines(self) -> None:
        while self._accept("\n"):
            pass


def _plain(word: Word) -> str | None:
    """Return a word that is one unquoted text."""
    return word[0].value if len(word) == 1 and word[0].kind == "text" and not word[0].quoted else None


def _assigned(word: Word) -> str | None:
    """Return the name that a word NAME=... assigns to."""
    if word[0].kind != "text" or word[0].quoted:
        return None
    name, equals, _ = word[0].value.partition("=")
    return name if equals and name.isidentifier() else None


def _after(word: Word, n_characters: int) -> Word:
    rest = word[0].value[n_characters:]
    return ((Piece("text", rest, quoted=False),) if rest else ()) + word[1:]


def _tokenize(text: str) -> list[_Token]:
    tokens: list[_Token] = []
    position = 0
    while position < len(text):
        character = text[position]
        if character in " \t" or text.startswith("\\\n", position):
            position += 2 if character == "\\" else 1
        elif character == "#":
            end = text.find("\n", position)
            position = len(text) if end < 0 else end
        elif (operator := _operator_at(text, position)) is not None:
            tokens.append(_Token(operator, ()))
            position += len(operator)
        else:
            word, position = _word(text, position)
            number = _plain(word)
            following = _operator_at(text, position)
            if number is not None and number.isdigit() and following is not None and following[0] in "<>":
                tokens.append(_Token(following, (), int(number)))
                position += len(following)
            else:
                tokens.append(_Token("", word))
    return tokens


def _operator_at(text: str, position: int) -> str | None:
    return next((operator for operator in OPERATORS if text.startswith(operator, position)), None)


def _word(text: str, position: int) -> tuple[Word, int]:
    pieces: list[Piece] = []
    while position < len(text) and text[position] not in _WORD_ENDS:
        character = text[position]
        if character == "'":
            end = _find(text, "'", position + 1)
            pieces.append(Piece("text", text[position + 1 : end], quoted=True))
            position = end + 1
        elif character == '"':
            position = _double_quoted(text, position + 1, pieces)
        elif character == "\\":
            pieces.append(Piece("text", text[position + 1 : position + 2], quoted=True))
            position += 2
        elif character == "$":
            position = _dollar(text, position, pieces, quoted=False)
        else:
            start = position
            while position < len(text) and text[position] not in _WORD_ENDS + "'\"\\$":
                position += 1
            pieces.append(Piece("text", text[start:position], quoted=False))
    return tuple(pieces), position


def _double_quoted(text: str, position: int, pieces: list[Piece]) -> int:
    literal = ""
    pieces.append(Piece("text", "", quoted=True))
    while position < len(text) and text[position] != '"':
        if text[position] == "\\" and text[position + 1 : position + 2] in ('"', "\\", "$", "`"):
            literal += text[position + 1]
            position += 2
        elif text[position] == "$":
            pieces.append(Piece("text", literal, quoted=True))
            literal = ""
            position = _dollar(text, position, pieces, quoted=True)
        else:
            literal += text[position]
            position += 1
    if position >= len(text):
        raise SyntaxFault("unterminated quoted string")
    pieces.append(Piece("text", literal, quoted=True))
    return position + 1


def _dollar(text: str, position: int, pieces: list[Piece], *, quoted: bool) -> int:
    """Read what follows a dollar; returns the position after it."""
    if text.startswith("$((", position):
        end = _find(text, "))", position + 3)
        pieces.append(Piece("sum", text[position + 3 : end], quoted))
        return end + 2
    if text.startswith("$(", position):
        end = _matching(text, position + 1)
        pieces.append(Piece("command", text[position + 2 : end], quoted))
        return end + 1
    if text.startswith("${", position):
        end = _find(text, "}", position + 2)
        pieces.append(Piece("variable", text[position + 2 : end], quoted))
        return end + 1
    end = position + 1
    if end < len(text) and (text[end] in _SPECIAL or text[end].isdigit()):
        end += 1
    else:
        while end < len(text) and (text[end].isalnum() or text[end] == "_"):
            end += 1
    name = text[position + 1 : end]
    pieces.append(Piece("variable", name, quoted) if name else Piece("text", "$", quoted))
    return end


def _find(text: str, what: str, start: int) -> int:
    end = text.find(what, start)
    if end < 0:
        raise SyntaxFault("unterminated quoted string" if what == "'" else f"unterminated: {what!r} is missing")
    return end


def _matching(text: str, opening: int) -> int:
    """Return the position of the parenthesis that closes the one at `opening`."""
    depth = 0
    for position in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if depth == 0:
            return position
    raise SyntaxFault("unterminated: ')' is missing")
