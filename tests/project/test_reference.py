"""The API reference covers every public name, and nothing in it or in the documents leads nowhere."""

from pathlib import Path

import pytest

from scripts import reference
from tests.project.sources import PROJECT


@pytest.fixture
def source(tmp_path: Path) -> Path:
    package = tmp_path / "src/isopod/runtime"
    package.mkdir(parents=True)
    (package / "gate.py").write_text(
        '"""Gates. See `isopod.runtime.gate.Gate`."""\n\n\nclass Gate:\n    """A gate.\n\n    Args:\n        name: Its name.\n    """\n\n'
        '    def enter(self) -> None:\n        """Go in."""\n\n    def _inner(self) -> None: ...\n',
        encoding="utf-8",
    )
    return tmp_path / "src"


def found(source: Path) -> list[str]:
    root = source.parent
    return reference.problems(reference.load(source), reference.documents(root), reference.known_names(source))


@pytest.mark.row("S39")
def test_the_project_has_no_undocumented_name_and_no_broken_link() -> None:
    assert found(PROJECT / "src") == []


@pytest.mark.row("S39")
def test_a_page_shows_signature_and_docstring(source: Path) -> None:
    page = reference.render(reference.load(source)[0])

    assert found(source) == []
    assert "## Gate\n" in page
    assert "def enter(self) -> None" in page
    assert "**Args**" in page
    assert "- name: Its name." in page
    assert "_inner" not in page


@pytest.mark.row("S39")
@pytest.mark.parametrize(
    ("addition", "complaint"),
    [
        ("def leave() -> None:\n    pass\n", "leave has no docstring"),
        ("class Other:\n    x = 1\n", "Other has no docstring"),
        ('def leave() -> None:\n    """See `isopod.runtime.gate.Gone`."""\n', "there is no isopod.runtime.gate.Gone"),
    ],
)
def test_an_undocumented_name_or_an_unknown_reference_fails(source: Path, addition: str, complaint: str) -> None:
    with (source / "isopod/runtime/gate.py").open("a", encoding="utf-8") as file:
        file.write("\n\n" + addition)

    assert [line for line in found(source) if complaint in line] != []


@pytest.mark.row("S39")
@pytest.mark.parametrize("link", ["[a](docs/gone.md)", "[a](README.md#gone)", "`isopod.runtime.gone`"])
def test_a_broken_link_in_a_document_fails(source: Path, link: str) -> None:
    readme = source.parent / "README.md"
    readme.write_text("# Title\n[fine](README.md#title) `isopod.runtime.gate`\n", encoding="utf-8")
    assert found(source) == []

    readme.write_text(f"# Title\n{link}\n", encoding="utf-8")
    assert len(found(source)) == 1
