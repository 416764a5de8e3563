"""Outputs of modality structures: figures with what they show, tables as fitted and with the gap closed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from probmodels import Result, fit_svi
from probmodels.datasets.paired.views import make_views
from probmodels.errors import ResultError
from probmodels.modality_structure import embed, embedding_map, make_problem, recall_at, write_outputs
from probmodels.modality_structure.figures import figures_of


@pytest.fixture(scope="module")
def result() -> Result:
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 4, 60)
    pictures = np.zeros((60, 3, 8, 8))
    pictures[np.arange(60), :, kind, :] = 1.0
    pictures += 0.05 * rng.random(pictures.shape)
    sound = np.eye(4)[kind] + 0.1 * rng.normal(size=(60, 4))
    words = np.array(["one bar at the top", "second row", "third", "a fourth bar"])[kind]
    data = make_views({"image": pictures, "text": words, "sound": sound}, label=kind, held_out=0.3)
    problem = make_problem(data, size=4, hidden=8, orthogonality=1.0, fusion=1.0, fusion_layers=1)
    return fit_svi(problem, num_steps=15, lr=0.01, num_samples=4, progress=False)


def test_figures_are_written_with_what_they_show(result: Result, tmp_path: Path) -> None:
    written = write_outputs(result, tmp_path, dpi=40)
    pairs = ["image_to_text", "image_to_sound", "text_to_sound"]
    names = {"map", "loss", *(f"{what}_{pair}" for what in ("nearest", "similarity", "gap") for pair in pairs)}
    assert set(written.figures) == names
    for name in names:
        assert (tmp_path / "figures" / f"{name}.png").stat().st_size > 1000
        assert (tmp_path / "figures" / f"{name}.pdf").stat().st_size > 1000
    text = written.report.read_text(encoding="utf-8")
    assert all(f"\n{name}: " in text for name in names - {"loss"})
    found = embed(result)
    table = found.z["image"] @ found.z["text"].T
    assert f"of all rows {recall_at(table, 5):.0%}" in text
    own = float(np.diag(table).mean())
    assert f"{own:.2f} on average to the partner" in text
    measures = pd.read_csv(tmp_path / "measures.csv")
    assert set(measures["gap"]) == {"as fitted", "closed"}
    assert len(pd.read_csv(tmp_path / "fused.csv")) == 3


def test_maps_have_a_panel_of_independent_embeddings_and_the_colours_asked_for(result: Result) -> None:
    side = np.random.default_rng(1).integers(0, 2, 60)
    figure = embedding_map(result, colour_by=side)
    assert [ax.get_title() for ax in figure.axes] == ["shared embeddings", "independent embeddings"]
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend == ["0", "1", "image", "text", "sound"]
    points = figure.axes[0].collections[0]
    rows = embed(result)
    assert len(points.get_offsets()) == int(rows.present["image"].sum())
    with pytest.raises(ResultError, match="60 rows"):
        embedding_map(result, colour_by=side[:10])


def test_queries_frame_their_partner_alone(result: Result) -> None:
    figure = figures_of(result)["nearest_image_to_text"].figure
    framed = [ax for ax in figure.axes if ax.spines["left"].get_linewidth() > 2]
    found = embed(result)
    table = found.z["image"] @ found.z["text"].T
    queries = np.unique(np.linspace(0, len(table) - 1, 6).round().astype(int))
    hits = sum(int(q in np.argsort(-table[q], kind="stable")[:5]) for q in queries)
    assert len(framed) == hits
