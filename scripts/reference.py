"""The API reference: every public name of the packages that others program against, from its docstring.

Run as `python -m scripts.reference [--check] [FOLDER]` (`make docs` writes build/reference, `make lint` only checks). Read from the source
without importing it, so that it is the same on every machine. It fails, naming the place, for a public name without a docstring, for a
name in backticks such as `isopod.runtime.gate.Gate` that does not exist, and for a link in the documents that leads nowhere.

What is public: names without a leading underscore in modules without one. A method counts with its class; an override that only says
"See ..." counts too, its words are the port's.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

PROJECT: Final = Path(__file__).resolve().parent.parent
PACKAGES: Final = ("runtime", "net", "telemetry", "wire", "world", "api")
FOLDER: Final = PROJECT / "build" / "reference"
_REFERENCE = re.compile(r"`(isopod(?:\.\w+)+)`")
_LINK = re.compile(r"(?<!!)\[[^\]\n]*\]\(([^)\s]+)\)")
_SECTION = re.compile(r"^(Args|Returns|Raises|Yields):$")

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Entry(NamedTuple):
    """One public name: what it is called in full, how it is written, what its docstring says, and where it stands."""

    name: str
    signature: str
    text: str
    line: int


class Page(NamedTuple):
    """One module: its dotted name, its header, its names, and every name it defines or imports (for references)."""

    name: str
    header: str
    entries: tuple[Entry, ...]
    known: frozenset[str]
    path: Path


def load(source: Path, packages: Sequence[str] = PACKAGES) -> list[Page]:
    """Return the pages of all public modules of `packages` below the folder `source`/isopod, in order of name."""
    pages = []
    for package in packages:
        for path in sorted((source / "isopod" / package).rglob("*.py")):
            parts = path.relative_to(source).with_suffix("").parts
            if not any(part.startswith("_") and part != "__init__" for part in parts):
                pages.append(_page(".".join(part for part in parts if part != "__init__"), path))
    return pages


def problems(pages: Sequence[Page], documents: Sequence[Path], known: frozenset[str]) -> list[str]:
    """Return what is wrong, one line each.

    Args:
        pages: The reference.
        documents: Markdown files whose links and names are checked too.
        known: Every dotted name that exists.
    """
    found = []
    for page in pages:
        found += [f"{page.path}:{entry.line}: {entry.name} has no docstring" for entry in page.entries if not entry.text]
        for text, line in [(page.header, 1), *((entry.text, entry.line) for entry in page.entries)]:
            found += [f"{page.path}:{line}: there is no {name}" for name in _REFERENCE.findall(text) if name not in known]
    for path in documents:
        text = path.read_text(encoding="utf-8")
        found += [f"{path}: there is no {name}" for name in _REFERENCE.findall(text) if name not in known]
        found += [f"{path}: the link {link} leads nowhere" for link in _LINK.findall(text) if not _leads_somewhere(path, link)]
    return found


def known_names(source: Path) -> frozenset[str]:
    """Return every dotted name that the package below `source` defines or imports, modules included."""
    names: set[str] = set()
    for path in sorted((source / "isopod").rglob("*.py*")):
        if path.suffix in (".py", ".pyi"):
            parts = path.relative_to(source).with_suffix("").parts
            names |= _page(".".join(part for part in parts if part != "__init__"), path).known
    return frozenset(names)


def render(page: Page) -> str:
    """Return a module's page as Markdown."""
    lines = [f"# {page.name}", "", page.header]
    for entry in page.entries:
        lines += ["", f"{'###' if entry.name.count('.') else '##'} {entry.name}", "", "```python", entry.signature, "```", ""]
        lines += _render_docstring(entry.text)
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> int:
    """Write the reference, or with --check only look for what is wrong; return 1 if something is."""
    parser = argparse.ArgumentParser(prog="reference", description="write the API reference")
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, help="where to (default: build/reference)")
    arguments = parser.parse_args(argv)
    pages = load(PROJECT / "src")
    wrong = problems(pages, documents(PROJECT), known_names(PROJECT / "src"))
    for line in wrong:
        print(line.replace(f"{PROJECT}/", ""), file=sys.stderr)
    if not arguments.check and not wrong:
        _write(pages, arguments.folder)
        print(f"wrote {len(pages)} pages to {arguments.folder}")
    return 1 if wrong else 0


def documents(project: Path) -> list[Path]:
    """Return the project's documents, in order of name."""
    return sorted([*project.glob("*.md"), *(project / "docs").rglob("*.md"), *(project / "changelog.d").glob("*.md")])


def _write(pages: Sequence[Page], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.md"):
        old.unlink()
    index = ["# API reference", "", "| module | what it is |", "|---|---|"]
    for page in pages:
        (folder / f"{page.name}.md").write_text(render(page), encoding="utf-8")
        first = page.header.split("\n\n", 1)[0].replace("\n", " ").replace("|", "\\|")
        index.append(f"| [{page.name}]({page.name}.md) | {first} |")
    (folder / "index.md").write_text("\n".join(index) + "\n", encoding="utf-8")


def _page(name: str, path: Path) -> Page:
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return Page(name, ast.get_docstring(tree) or "", tuple(_entries(tree)), frozenset(_names(name, tree)), path)


def _entries(tree: ast.Module) -> Iterator[Entry]:
    for node in tree.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield Entry(node.name, _signature(node), ast.get_docstring(node) or "", node.lineno)
            if isinstance(node, ast.ClassDef):
                yield from _members(node)


def _members(owner: ast.ClassDef) -> Iterator[Entry]:
    for node in owner.body:
        if isinstance(node, Definition) and not node.name.startswith("_") and not _is_overload(node):
            yield Entry(f"{owner.name}.{node.name}", _signature(node), ast.get_docstring(node) or "", node.lineno)


def _is_overload(node: Definition) -> bool:
    """Whether it is a further spelling (`@overload`, `@x.setter`) of a name that is documented where it is defined."""
    marks = [ast.unparse(mark) for mark in node.decorator_list]
    return any(mark in ("overload", "typing.overload") or mark.endswith((".setter", ".deleter")) for mark in marks)


def _signature(node: Definition) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    is_property = any(ast.unparse(mark).endswith("property") for mark in node.decorator_list)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    if is_property:
        return f"{node.name}{returns}"
    prefix = "async def " if isinstance(node, ast.AsyncFunctionDef) else "def "
    return f"{prefix}{node.name}({ast.unparse(node.args)}){returns}"


def _names(module: str, tree: ast.Module) -> Iterator[str]:
    """Yield the dotted names that `module` makes reachable."""
    yield module
    for node in tree.body:
        if isinstance(node, Definition):
            yield f"{module}.{node.name}"
            if isinstance(node, ast.ClassDef):
                yield from (f"{module}.{node.name}.{name}" for name in _assigned(node.body))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (f"{module}.{alias.asname or alias.name}" for alias in node.names)
    yield from (f"{module}.{name}" for name in _assigned(tree.body))


def _assigned(body: Sequence[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, Definition):
            yield node.name


def _leads_somewhere(path: Path, link: str) -> bool:
    if link.startswith(("http://", "https://", "mailto:")):
        return True
    file, _, anchor = link.partition("#")
    target = (path.parent / file) if file else path
    if not target.exists():
        return False
    return not anchor or target.suffix != ".md" or anchor in _anchors(target.read_text(encoding="utf-8"))


def _anchors(text: str) -> set[str]:
    """Return the anchors that headings get on the usual hosts: lower case, spaces as dashes, punctuation dropped."""
    headings = re.findall(r"^#+ +(.+?) *$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _render_docstring(text: str) -> list[str]:
    """Return a docstring as Markdown: the sections' names in bold, their entries as lists."""
    lines: list[str] = []
    in_section = False
    for line in text.splitlines():
        section = _SECTION.match(line)
        if section:
            in_section = True
            lines += [f"**{section[1]}**", ""]
        elif in_section and re.match(r"^    \S", line):
            lines.append("- " + line.strip())
        elif in_section and not line.startswith(" "):
            in_section = not line.strip()
            lines.append(line)
        else:
            lines.append(line.strip() if in_section else line)
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
