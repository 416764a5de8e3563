"""Several fields on one page: maps of the joint modes and of what couples them, in units of each field."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr
from markupsafe import Markup

from probmodels._page import bullets, paragraphs, table
from probmodels._version import __version__
from probmodels.bayesian_svd.draws import MODES_OF
from probmodels.bayesian_svd.figures import draw_pc
from probmodels.bayesian_svd.joint.coupled import couple
from probmodels.bayesian_svd.joint.stack import split_fields
from probmodels.bayesian_svd.maps import draw_map, grid_of_maps, largest, stipple, uncertain_sign
from probmodels.bayesian_svd.reporting.tables import effect_tables
from probmodels.errors import SummaryError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Coupled", "coupled_maps", "coupled_modes", "coupled_section", "file_name", "joint_maps", "write_coupled"]

Coupling = Literal["mca", "cca"]

_MOST = 6  # modes and fields on a page
_NAMES = {"mca": "maximum covariance analysis", "cca": "canonical correlation analysis"}
_TEXT = (
    "Joint modes have a pattern in each field and one series. Each field is scaled to the same total variance, unless "
    "weights say otherwise; maps are in its own units."
)
_HOW = (
    "Coupled modes are those of two fields that vary together. The maps show what goes in one field with one standard "
    "deviation of the series of the other. The correlation is that of the two series, the noise of both included."
)


class Coupled(NamedTuple):
    """What couples pairs of fields, and why there is nothing to say of others."""

    fields: dict[str, xr.Dataset]  # joint modes in each field, from `split_fields`
    modes: dict[str, xr.Dataset]  # by the names of both fields, from `couple`
    maps: dict[str, dict[str, xr.Dataset]]  # the same in each of the two
    lacking: list[str]

    def figures(self) -> dict[str, Figure]:
        """Joint modes, and coupled ones, on a page each."""
        pages = {f"coupled_maps{self._end(pair)}": coupled_maps(maps) for pair, maps in self.maps.items()}
        return {"joint_maps": joint_maps(self.fields)} | pages

    def files(self, write_modes: Callable[[xr.Dataset, Path], object]) -> dict[str, Callable[[Path], object]]:
        """Writers of files by name."""
        out: dict[str, Callable[[Path], object]] = {}
        for name, part in self.fields.items():
            out[f"modes_{file_name(name)}.nc"] = functools.partial(write_modes, part)
        for pair, modes in self.modes.items():
            out[f"coupled{self._end(pair)}.nc"] = functools.partial(write_coupled, modes, self.maps[pair])
        return out

    def _end(self, pair: str) -> str:
        """What tells the files of a pair of fields from those of others."""
        return "" if len(self.modes) == 1 else f"_{file_name(pair)}"

    def tables(self) -> dict[str, pd.DataFrame]:
        """Those over the cells, with the field of each, and a row for each coupled mode."""
        parts = {name: effect_tables(part, part) for name, part in self.fields.items()}
        found = {
            key: pd.concat([tables[key].assign(field=name) for name, tables in parts.items()], ignore_index=True)
            for key in next(iter(parts.values()))
        }
        return found | ({"coupled": self._coupled()} if self.modes else {})

    def _coupled(self) -> pd.DataFrame:
        rows = []
        for pair, modes in self.modes.items():
            for i, mode in enumerate(modes["mode"].values):
                row = {"fields": pair, "method": modes.attrs["method"], "mode": int(mode)}
                rows.append(row | {str(k): float(v[i]) for k, v in modes.data_vars.items() if v.dims == ("mode",)})
        return pd.DataFrame(rows)

    def text(self) -> str:
        """Words and numbers for the terminal."""
        lines = [f"{_NAMES[modes.attrs['method']]} of {pair}:" for pair, modes in self.modes.items()][:1]
        for pair, modes in self.modes.items():
            for i, mode in enumerate(modes["mode"].values):
                parts = [f"{pair} {mode}: correlation {_interval(modes, 'correlation', i)}"]
                if "squared_covariance_fraction_mean" in modes:
                    parts.append(f"squared covariance {_interval(modes, 'squared_covariance_fraction', i)}")
                lines.append("  " + ", ".join(parts))
        return "\n".join(lines + self.lacking)


def file_name(name: str) -> str:
    """A name that a file may have."""
    return "".join(x if x.isalnum() else "_" for x in name)


def coupled_modes(tree: xr.DataTree, modes: xr.Dataset, *, method: Coupling, level: float) -> Coupled:
    """What couples each pair of the fields of a result, and why not where it cannot be said.

    Lags of one field have nothing to couple, and the modes of these times no covariance of the population.
    """
    fields = split_fields(modes, tree)
    found: dict[str, xr.Dataset] = {}
    lacking = []
    if not any(name.startswith("lag ") for name in fields):
        for pair in combinations(fields, 2):
            try:
                found[" and ".join(pair)] = couple(tree, pair, method=method, level=level)
            except SummaryError as error:
                lacking.append(f"what couples {' and '.join(pair)} is not said: {error}")
    maps = {
        pair: {name: part for name, part in split_fields(each, tree).items() if name in each.attrs["fields"]}
        for pair, each in found.items()
    }
    return Coupled(fields, found, maps, lacking)


def joint_maps(parts: Mapping[str, xr.Dataset]) -> Figure:
    """Joint modes in rows: the pattern in each field, in its units, and the series that the fields share.

    Dots mark cells whose sign is uncertain.

    Parameters
    ----------
    parts
        From `probmodels.bayesian_svd.joint.stack.split_fields`.
    """
    shown = dict(list(parts.items())[:_MOST])
    first = next(iter(shown.values()))
    figure, axes = grid_of_maps(first["mode_mean"], min(first.sizes["mode"], _MOST), len(shown) + 1)
    whose = str(first.attrs.get("estimand", "modes")).removeprefix("modes")
    level = 100 * float(first.attrs.get("interval_level", 0.95))
    for i, row in enumerate(axes):
        number = int(first["mode"][i])
        shares = [100 * float(first[f"explained_variance_fraction_{x}"][i]) for x in ("mean", "lower", "upper")]
        for ax, (field, modes) in zip(row, shown.items(), strict=False):
            _draw_field(figure, ax, modes["mode_mean"][i], "per sd of PC", modes["prob_positive"][i])
            ax.set_title(f"{field}, mode {number}{whose}", fontsize=10, loc="left")
        draw_pc(row[-1], first, i)
        said = "{:.0f} % [{:.0f}, {:.0f}] of all variance".format(*shares)
        row[-1].set_title(f"PC {number} in sd, with its {level:g} % interval: {said}", fontsize=9, loc="left")
    return figure


def coupled_maps(parts: Mapping[str, xr.Dataset]) -> Figure:
    """Coupled modes in rows, with a column for each field: what goes in it with the series of the other.

    Parameters
    ----------
    parts
        From `probmodels.bayesian_svd.joint.stack.split_fields`, of what `probmodels.bayesian_svd.joint.coupled.couple`
        found.
    """
    first = next(iter(parts.values()))
    figure, axes = grid_of_maps(first["map_mean"], min(first.sizes["mode"], _MOST), len(parts))
    whose = MODES_OF["population"].removeprefix("modes")
    for column, (field, modes), other in zip(axes.T, parts.items(), list(parts)[::-1], strict=True):
        for i, ax in enumerate(column):
            _draw_field(figure, ax, modes["map_mean"][i], f"per sd of {other}", None)
            title = f"{field}, coupled mode {int(modes['mode'][i])}{whose}: r = {_interval(modes, 'correlation', i)}"
            ax.set_title(title, fontsize=9, loc="left")
    return figure


def _draw_field(figure: Figure, ax: Axes, values: xr.DataArray, per: str, positive: xr.DataArray | None) -> None:
    """A pattern with its colour bar, and dots where its sign is uncertain."""
    unit, bound = str(values.attrs.get("units", "1")).replace("degC", "°C"), largest(values)
    draw_map(figure, ax, values, f"{'' if unit == '1' else unit} {per}".strip(), cmap="RdBu_r", vmin=-bound, vmax=bound)
    if positive is not None and "lat" in values.coords:
        stipple(ax, uncertain_sign(positive, 0.95))


def _interval(modes: xr.Dataset, name: str, i: int) -> str:
    return "{:.2f} [{:.2f}, {:.2f}]".format(*(float(modes[f"{name}_{x}"][i]) for x in ("mean", "lower", "upper")))


def write_coupled(modes: xr.Dataset, maps: Mapping[str, xr.Dataset], path: Path) -> None:
    """Write coupled modes as NetCDF that keeps to the CF conventions 1.11, with axes of each field's own.

    Parameters
    ----------
    modes
        From `probmodels.bayesian_svd.joint.coupled.couple`.
    maps
        The same in each field, from `probmodels.bayesian_svd.joint.stack.split_fields`.
    path
        File to write.
    """
    names, level = list(modes.attrs["fields"]), 100 * float(modes.attrs["interval_level"])
    words = {"mean": "posterior mean", "sd": "posterior standard deviation"}
    words |= {"lower": f"lower end of the {level:g} % interval", "upper": f"upper end of the {level:g} % interval"}
    out = xr.Dataset(coords={"mode": modes["mode"].values})
    for name, array in modes.data_vars.items():
        if array.dims == ("mode",):
            root, _, end = str(name).rpartition("_")
            out[name] = array.variable.copy()
            out[name].attrs = {"long_name": f"{root.replace('_', ' ')}, {words[end]}", "units": "1"}
    for field, part in maps.items():
        for key in words:
            array = part[f"map_{key}"]
            own = {dim: f"{dim}_{field}" for dim in ("lat", "lon", "cell") if dim in array.dims}
            array = array.drop_vars([c for c in array.coords if c not in (*own, "mode", "lat", "lon")]).rename(own)
            units = str(array.attrs.get("units") or "1")
            said = f"{field} with one standard deviation of the series of the other field, {words[key]}"
            out[f"map_{key}_{field}"] = array.assign_attrs(long_name=said, units=units)
        for dim, text, units in (("lat", "latitude", "degrees_north"), ("lon", "longitude", "degrees_east")):
            axis = f"{dim}_{field}"
            if axis in out.coords:
                out[axis].attrs = {"standard_name": text, "long_name": text, "units": units}
    out["mode"].attrs = {"long_name": "number of the mode", "units": "1"}
    out.attrs = {
        "Conventions": "CF-1.11",
        "title": f"Coupled modes of {' and '.join(names)}: {_NAMES[modes.attrs['method']]}",
        "estimand": MODES_OF["population"],
        "source": f"Bayesian SVD, probmodels {__version__}",
        "history": f"draws reduced to coupled modes by probmodels {__version__}",
        "interval_level": modes.attrs["interval_level"],
    }
    encoding: dict[str, dict[str, object]] = {str(c): {"_FillValue": None} for c in out.coords}
    for name, values in out.data_vars.items():
        wide = values.ndim > 1
        encoding[str(name)] = {"dtype": "float32", "_FillValue": np.float32(np.nan)} if wide else {"_FillValue": None}
    out.to_netcdf(path, engine="netcdf4", encoding=encoding)


def coupled_section(found: Coupled) -> Markup:
    """Words and a table for the report."""
    out = paragraphs(_TEXT)
    rows = []
    for pair, modes in found.modes.items():
        for i, mode in enumerate(modes["mode"].values):
            row = [pair, str(mode), _interval(modes, "correlation", i)]
            if "squared_covariance_fraction_mean" in modes:
                row.append(_interval(modes, "squared_covariance_fraction", i))
            rows.append(row)
    if rows:
        method = next(iter(found.modes.values())).attrs["method"]
        header = ["fields", "mode", "correlation"] + ["squared covariance fraction"] * (method == "mca")
        out += paragraphs(f"{_NAMES[method].capitalize()}. {_HOW}") + table(header, rows)
    return out + (bullets(found.lacking) if found.lacking else Markup())
