"""The pages of the documentation: their code runs as it stands, and their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = (
    "engines",
    "mcmc",
    "svi",
    "em",
    "bilevel",
    "prediction",
    "diagnostics",
    "gflownet",
    "discrete_latents",
    "discrete_vae",
    "bayesian_network",
    "causal_graph",
    "grammar",
    "lds",
    "score_composition",
    "diffusion",
    "causal_vae",
)  # whose code is complete on the page
_BLOCK = re.compile(r"^```python(?P<mark>[^\n]*)\n(?P<code>.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def blocks(text: str) -> list[str]:
    """Code of the python blocks of a page, each on the lines where the page has it; ``python skip`` left out."""
    found = [match for match in _BLOCK.finditer(text) if match["mark"].strip() != "skip"]
    return ["\n" * text.count("\n", 0, match.start("code")) + match["code"] for match in found]


def test_blocks_keep_their_lines_and_skips_are_left_out() -> None:
    text = "# A\n```python\nx = 1\n```\n```sh\nls\n```\n```python skip\nx = 3\n```\n```python\ny = x\n```\n"
    assert blocks(text) == ["\n\nx = 1\n", "\n" * 11 + "y = x\n"]


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # checkpoints of the pages
    path = DOCS / f"{page}.md"
    found = blocks(path.read_text(encoding="utf-8"))
    assert found
    namespace: dict[str, object] = {"__name__": f"docs_{page}"}
    for code in found:
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


def test_the_index_names_every_page() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    lost = [path.name for path in DOCS.glob("*.md") if path.name != "index.md" and f"({path.name})" not in index]
    assert not lost, f"docs/index.md does not link {lost}"


def test_the_module_map_names_modules_that_exist_and_all_of_inference() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    root, table = DOCS.parent, index.partition("## Where things are")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([\w/]+\.py)`", table))
    modules = {path.name for path in (root / "inference").rglob("*.py") if path.name != "__init__.py"}
    for name in named:
        assert (root / name).exists() or name in modules, f"docs/index.md names {name}, which does not exist"
    public = {name for name in modules if not name.startswith("_")}
    lost = public - {Path(name).name for name in named}
    assert not lost, f"the module map of docs/index.md lacks {sorted(lost)}"
