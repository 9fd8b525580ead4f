"""The documents: their Python runs as it stands, and their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
DOCUMENTS = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/recipes/README.md")),
    *sorted((REPOSITORY / "docs").glob("*.md")),
]


def blocks(document: Path, language: str) -> list[str]:
    """Return the fenced code blocks of ``document`` that are marked with ``language``."""
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(), re.DOTALL | re.MULTILINE)


def anchors(document: Path) -> set[str]:
    """Return the anchors of the headings of ``document``, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(document: Path) -> list[str]:
    """Return the targets of all links and images of ``document``."""
    return re.findall(r"\]\(([^)\s]+)\)", document.read_text())


def is_broken(link: str, document: Path) -> bool:
    """Return whether a relative ``link`` leads to no file, or to no heading of it."""
    if re.match(r"https?://", link):
        return False
    path, _, anchor = link.partition("#")
    target = document.parent / path if path else document
    return not target.exists() or bool(anchor and anchor not in anchors(target))


EXAMPLES = [
    pytest.param(code, id=f"{document.stem}-{i}")
    for document in DOCUMENTS
    for i, code in enumerate(blocks(document, "python"))
    if (document.name, i) != ("README.md", 0)  # which has a test of its own
]


@pytest.mark.parametrize("code", EXAMPLES)
def test_python_blocks_run_as_they_stand(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "block", "exec"), {"__name__": "__main__"})


def test_the_quickstart_prints_what_the_readme_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, (shown,) = blocks(REPOSITORY / "README.md", "python")[0], blocks(REPOSITORY / "README.md", "text")
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    percentage = re.compile(r"\d+\.\d%")  # which depends on the processor
    printed = percentage.sub("%", capsys.readouterr().out).splitlines()
    expected = percentage.sub("%", shown).splitlines()
    assert printed[-len(expected) :] == expected
    assert (tmp_path / "digits.pt").exists()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(REPOSITORY)))
def test_links_lead_somewhere(document: Path) -> None:
    assert [link for link in links(document) if is_broken(link, document)] == []


def test_a_broken_link_is_noticed(tmp_path: Path) -> None:
    document = tmp_path / "a.md"
    good, bad = "[here](#a-heading-with-code) [out](https://example.org)", "[no](#nowhere) [no](b.md)"
    document.write_text(f"# A heading: with `code`\n{good} {bad}\n")
    assert [link for link in links(document) if is_broken(link, document)] == ["#nowhere", "b.md"]


def test_the_readme_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 155
