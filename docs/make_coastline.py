"""Decode Natural Earth's 1:110m land polygons from TopoJSON into the coastline file that the maps draw.

Run once, by hand, when the source changes::

    npm pack world-atlas@2.0.2 && tar xzf world-atlas-2.0.2.tgz
    python docs/make_coastline.py package/land-110m.json probmodels/data/coastline_110m.npz
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def rings(topology: dict[str, Any]) -> list[np.ndarray]:
    """Closed rings, each (points, 2) of longitude and latitude in degrees, of every land polygon and its holes."""
    scale, translate = (np.array(topology["transform"][key]) for key in ("scale", "translate"))
    arcs = [np.cumsum(arc, axis=0) * scale + translate for arc in topology["arcs"]]  # stored as integer steps

    def ring(indices: list[int]) -> np.ndarray:
        # A negative index ~i means arc i run backwards; neighbours share their end point.
        parts = [arcs[i] if i >= 0 else arcs[~i][::-1] for i in indices]
        points = np.concatenate([parts[0], *(part[1:] for part in parts[1:])])
        points[:, 0] = np.unwrap(points[:, 0], period=360)  # rings are stitched across the date line
        if abs(points[-1, 0] - points[0, 0]) > 180:  # Antarctica goes once round: close it through the pole
            points = np.vstack([points, [points[-1, 0], -90], [points[0, 0], -90], points[:1]])
        points[:, 0] -= 360 * np.round((points[:, 0].min() + points[:, 0].max()) / 720)
        return points

    (land,) = topology["objects"]["land"]["geometries"]
    return [ring(indices) for polygon in land["arcs"] for indices in polygon]


def main(source: str, target: str) -> None:
    """Write longitudes and latitudes of all rings, one after another, with the index at which each ring starts."""
    all_rings = rings(json.loads(Path(source).read_text()))
    start = np.cumsum([0, *(len(ring) for ring in all_rings)]).astype(np.int32)
    points = np.round(np.concatenate(all_rings), 3).astype(np.float32)
    np.savez_compressed(target, points=points, start=start)
    print(f"{len(all_rings)} rings, {len(points)} points -> {target}, {Path(target).stat().st_size} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:3])
