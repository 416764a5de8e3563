"""`write_all`, which writes the outputs of every method."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from matplotlib.figure import Figure

from probmodels.errors import ResultError
from probmodels.inference.result import Result
from probmodels.outputs import loss_figure, write_all


def result(method: str = "lds") -> Result:
    drawn = np.random.default_rng(0).standard_normal((2, 100))
    tree = xr.DataTree.from_dict({"posterior": xr.Dataset({"x": (("chain", "draw"), drawn)})})
    tree.attrs = {"method": method, "engine": "mcmc"}
    return Result(tree)


def test_all_files_are_written(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": [1, 2], "b": [0.12345678, 2]})
    written = write_all(
        result(),
        tmp_path / "new" / "folder",
        table="short",
        summary="long",
        tables={"plain": frame, "named": frame.rename_axis("row")},
        figures={"one": Figure()},
        files={"sub/text.txt": lambda file: file.write_text("text", encoding="utf-8"), "other.txt": None},
    )
    folder = tmp_path / "new" / "folder"
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {"plain.csv", "named.csv", "summary.txt", "figures/one.png", "sub/text.txt"}
    assert written.table == "short"
    assert written.report.read_text(encoding="utf-8") == f"long\n\n{written.diagnosis}\n"
    assert (folder / "plain.csv").read_text(encoding="utf-8").split() == ["a,b", "1,0.123457", "2,2"]
    assert (folder / "named.csv").read_text(encoding="utf-8").split() == ["row,a,b", "0,1,0.123457", "1,2,2"]
    assert written.figures == {"one": folder / "figures" / "one.png"}


def test_figures_that_are_no_longer_drawn_go_and_those_of_others_stay(tmp_path: Path) -> None:
    figures = tmp_path / "figures"
    text = {"note.txt": lambda file: file.write_text("text", encoding="utf-8")}
    write_all(result(), tmp_path, table="", figures={"old": Figure(), "kept": Figure()}, files=text)
    write_all(result("grammar"), tmp_path, table="", figures={"of_another_method": Figure()})
    Figure().savefig(figures / "of_the_user.png")
    (figures / "damaged.png").write_bytes(b"no picture")
    write_all(result(), tmp_path, table="", figures={"kept": Figure()}, files={"note.txt": None})
    assert {path.stem for path in figures.iterdir()} == {"kept", "of_another_method", "of_the_user", "damaged"}
    assert not (tmp_path / "note.txt").exists()


def test_figures_as_pdf_come_and_go_with_their_pictures(tmp_path: Path) -> None:
    def figure() -> Figure:
        found = Figure(layout="constrained")
        found.subplots().set_title("a title")
        return found

    write_all(result(), tmp_path, table="", figures={"old": figure(), "kept": figure()}, pdf=True)
    first = (tmp_path / "figures" / "kept.pdf").read_bytes()
    assert first.startswith(b"%PDF")
    write_all(result(), tmp_path, table="", figures={"kept": figure()}, pdf=True)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"kept.png", "kept.pdf"}
    assert (tmp_path / "figures" / "kept.pdf").read_bytes() == first  # no date of its own


def test_a_layout_is_settled_once(tmp_path: Path) -> None:
    figure = Figure(layout="constrained")
    ax = figure.subplots()
    ax.set_ylabel("a long label")
    write_all(result(), tmp_path, table="", figures={"one": figure}, pdf=True)
    assert figure.get_layout_engine() is None
    assert ax.get_position().x0 < 0.12  # where the engine put it; 0.125 without


def test_a_failure_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    write_all(result(), tmp_path, table="first", figures={"one": Figure()})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def fail(file: Path) -> None:
        file.write_text("half", encoding="utf-8")
        raise RuntimeError("cannot be drawn")

    with pytest.raises(RuntimeError, match="cannot be drawn"):
        write_all(result(), tmp_path, table="second", figures={"two": Figure()}, files={"three.txt": fail})
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_folder_that_cannot_be_written_is_an_error_of_the_project(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ResultError, match="choose another folder"):
        write_all(result(), tmp_path / "file", table="")


def test_a_loss_is_drawn_where_the_fit_kept_one() -> None:
    found = result()
    assert loss_figure(found) == {}
    found.tree["fit"] = xr.DataTree(xr.Dataset({"loss": ("step", np.arange(5.0))}))
    assert set(loss_figure(found)) == {"loss"}


def test_writing_that_takes_long_has_a_progress_bar_where_it_is_asked_for(tmp_path, monkeypatch, capsys):
    files = {f"{i}.txt": lambda file: file.write_text("x") for i in range(3)}
    write_all(result(), tmp_path, table="t", files=files, progress=True)
    assert "writing" not in capsys.readouterr().err  # it takes no five seconds
    monkeypatch.setattr("probmodels.outputs._PATIENCE", 0.0)
    write_all(result(), tmp_path, table="t", files=files, progress=True)
    assert "writing" in capsys.readouterr().err
    write_all(result(), tmp_path, table="t", files=files)
    assert not capsys.readouterr().err
