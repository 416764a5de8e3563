"""Small files in the formats that loaders read."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from scipy.sparse import csr_matrix


def write_tu(root: Path, name: str = "TINY", *, archive: bool = False) -> Path:
    """Twelve triangles and twelve paths of three, in the files of TU Dortmund."""
    lines, indicator = [], []
    for place in range(24):
        ends = [(1, 2), (2, 3), (1, 3)] if place % 2 else [(1, 2), (2, 3)]
        lines += [f"{a + 3 * place}, {b + 3 * place}" for one, two in ends for a, b in ((one, two), (two, one))]
        indicator += [str(place + 1)] * 3
    text = {"A": lines, "graph_indicator": indicator, "graph_labels": [("-1", "1")[place % 2] for place in range(24)]}
    files = {f"{name}_{part}.txt": "\n".join(content) + "\n" for part, content in text.items()}
    root.mkdir(parents=True, exist_ok=True)
    if archive:
        with zipfile.ZipFile(root / f"{name}.zip", "w") as packed:
            for file, content in files.items():
                packed.writestr(f"{name}/{file}", content)
    else:
        (root / name / "raw").mkdir(parents=True)
        for file, content in files.items():
            (root / name / "raw" / file).write_text(content)
    return root


def write_planetoid(raw: Path, name: str = "cora") -> None:
    """A ring of 520 nodes with 3 classes, as Planetoid pickles it."""
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    x = csr_matrix(rng.integers(0, 2, (520, 4)).astype(np.float32))
    y = np.eye(3, dtype=np.int32)[np.arange(520) % 3]
    parts = {"x": x[:6], "y": y[:6], "allx": x[:510], "ally": y[:510], "tx": x[510:], "ty": y[510:]}
    parts["graph"] = {node: [(node + 1) % 520, (node - 1) % 520] for node in range(520)}
    for part, value in parts.items():
        (raw / f"ind.{name}.{part}").write_bytes(pickle.dumps(value))
    (raw / f"ind.{name}.test.index").write_text("\n".join(str(node) for node in range(510, 520)) + "\n")


def write_celeba(root: Path, *, csv: bool = False, partition: bool = True) -> None:
    images = root / "img_align_celeba" / ("img_align_celeba" if csv else "")
    images.mkdir(parents=True)
    names = [f"{number:06d}.jpg" for number in range(1, 11)]
    for name in names:
        Image.new("RGB", (178, 218), "gray").save(images / name)
    attributes = np.where(np.arange(30).reshape(10, 3) % 4 < 2, 1, -1)
    attributes[:, 2] = 1
    table = pd.DataFrame(attributes, index=pd.Index(names, name="image_id"), columns=["Young", "Male", "Always"])
    parts = pd.DataFrame({"partition": [0] * 6 + [1] * 2 + [2] * 2}, index=table.index)
    if csv:
        table.to_csv(root / "list_attr_celeba.csv")
        parts.to_csv(root / "list_eval_partition.csv")
        return
    lines = ["10", "Young Male Always ", *(f"{n} {' '.join(f'{v:2d}' for v in row)}" for n, row in table.iterrows())]
    (root / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
    if partition:
        (root / "list_eval_partition.txt").write_text(
            "".join(f"{n} {p}\n" for n, p in zip(names, parts["partition"], strict=True))
        )
