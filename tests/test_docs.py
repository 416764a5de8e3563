"""The pages of the documentation: their code runs as it stands, and their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from probmodels import METHODS

DOCS = Path(__file__).parents[1] / "docs"
_BLOCK = re.compile(r"^(?P<mark><!-- not run -->\n)?```python\n(?P<code>.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def blocks(text: str) -> list[str]:
    """Code of the python blocks of a page, each on the lines where the page has it; those not run left out."""
    found = [match for match in _BLOCK.finditer(text) if not match["mark"]]
    return ["\n" * text.count("\n", 0, match.start("code")) + match["code"] for match in found]


PAGES = [
    pytest.param(path, id=path.stem, marks=() if path.stem == "engines" else pytest.mark.slow)
    for path in sorted(DOCS.glob("*.md"))
    if path.stem != "adding_a_method" and blocks(path.read_text(encoding="utf-8"))  # that one: see test_plugins.py
]


def test_blocks_keep_their_lines_and_those_that_are_not_run_are_left_out() -> None:
    text = "# A\n```python\nx = 1\n```\n```\nls\n```\n<!-- not run -->\n```python\nx = 3\n```\n```python\ny = x\n```\n"
    assert blocks(text) == ["\n\nx = 1\n", "\n" * 12 + "y = x\n"]


@pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping")  # arviz 0.23 with matplotlib 3.11
@pytest.mark.parametrize("path", PAGES)
def test_the_code_of_a_page_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # checkpoints of the pages
    namespace: dict[str, object] = {"__name__": f"docs_{path.stem}"}
    for code in blocks(path.read_text(encoding="utf-8")):
        exec(compile(code, path, "exec"), namespace)


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.md")), ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([\w./-]*)(?:#([\w-]+))?\)", text):
        other = path.parent / target if target else path
        assert other.exists(), f"{path.name} links to {target}"
        if anchor:
            heads = re.findall(r"^#+ (.+)$", other.read_text(encoding="utf-8"), flags=re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]
            assert anchor in anchors, f"{path.name} links to {target}#{anchor}; there are {anchors}"


def test_the_index_names_every_page_but_those_called_as_their_method() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    others = {path.name for path in DOCS.glob("*.md")} - {"index.md"} - {f"{name}.md" for name in METHODS}
    lost = [name for name in sorted(others) if f"({name})" not in index]
    assert not lost, f"docs/index.md does not link {lost}"


def test_the_map_names_folders_that_exist_and_every_package() -> None:
    root = DOCS.parent
    table = (DOCS / "index.md").read_text(encoding="utf-8").partition("## Where things are")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)
    assert len(rows) <= 20
    named = {name for row in rows for name in re.findall(r"`([\w/<>.]+)`", row)}
    lost = [name for name in named if "<" not in name and not (root / name).exists()]
    assert not lost, f"docs/index.md maps {lost}, which do not exist"
    folders = [init.parent for top in ("inference", "guides", "datasets") for init in (root / top).rglob("__init__.py")]
    own = [init.parent for init in (root / "probmodels").glob("*/__init__.py") if not init.parent.is_symlink()]
    folders += [folder for folder in own if folder.name not in METHODS]
    packages = {f"{folder.relative_to(root)}/" for folder in folders}
    assert packages <= named, f"the map of docs/index.md lacks {sorted(packages - named)}"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_page(name: str) -> None:
    """Check the page that the method's row of the README links, or else the page of its name."""
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    rows = [line for line in readme.splitlines() if f'`"{name}"`' in line]
    assert len(rows) <= 1
    (page,) = re.findall(r"\[page\]\((docs/\w+\.md)\)", rows[0]) if rows else [f"docs/{name}.md"]
    assert (DOCS.parent / page).exists()


def test_the_first_page_is_short_and_its_links_lead_somewhere() -> None:
    text = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 700
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    lost = [link for link in links if not (DOCS.parent / link).exists()]
    assert links
    assert not lost, f"README.md links to {lost}"


def test_the_code_of_the_first_page_prints_what_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    text = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    (code,), (said,) = blocks(text), re.findall(r"^```text\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert printed[: len(said.splitlines())] == [line.rstrip() for line in said.splitlines()]
