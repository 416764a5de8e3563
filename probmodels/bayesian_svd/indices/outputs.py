"""What a user reads of climate indices: a table, a NetCDF file of draws, a figure, sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict, Unpack

import numpy as np
import pandas as pd
import xarray as xr
from annotated_types import Interval
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probmodels._axes import BLUE, RED, SMALL, clean
from probmodels.bayesian_svd.draws import read_draws
from probmodels.bayesian_svd.figures import time_axis
from probmodels.bayesian_svd.indices.boxes import Ice, box_areas, box_indices, check_ice, index_table, summarise_indices
from probmodels.bayesian_svd.indices.correlation import check_common_times, correlate, correlation_sentences
from probmodels.bayesian_svd.indices.decadal import (
    DEFINITIONS,
    mode_index,
    mode_region,
    published_index,
    published_values,
)
from probmodels.bayesian_svd.indices.series import load_series, match_series
from probmodels.errors import DataError, SummaryError
from probmodels.inference.diagnostics.findings import Finding
from probmodels.options import Default, Fraction, OneOf, checked, filled, refuse_unused

__all__ = [
    "draw_correlations",
    "draw_indices",
    "index_findings",
    "index_sentences",
    "indices_to_folder",
    "write_correlations",
    "write_indices",
]

_LARGE_RATIO = 1.5  # of noise in the mean of a box
_AGREEMENT = 0.9  # of patterns
_HELD = 0.9  # by 95 % intervals
_AGREES = 0.7  # correlation of an index with published values, about half of their variance
_JUDGED = 30  # published values that were not used, from which they judge; the fit does where there are fewer
_SHOWN = {
    "field": (RED, "field, gaps filled"),
    "published": ("0.5", "with residual"),
    "signal": (BLUE, "signal"),
}


def draw_indices(summaries: Sequence[xr.Dataset], failed: Mapping[str, str] | None = None) -> Figure:
    """Series of each index with its interval: of the signal, and of the field or the published series.

    Parameters
    ----------
    summaries
        From `probmodels.bayesian_svd.indices.boxes.summarise_indices`, over the same times.
    failed
        Indices that are not what their name says, and why.
    """
    shown = [(str(name), summary) for summary in summaries for name in summary["index"].values]
    figure, axes = _panels([name for name, _ in shown], 10, 1.9)
    time, level = time_axis(shown[0][1]["time"]), 100 * float(shown[0][1].attrs.get("interval_level", 0.95))
    for (name, summary), ax in zip(shown, axes, strict=True):
        one = summary.sel(index=name)
        for part, (colour, words) in _SHOWN.items():
            if f"{part}_mean" not in one:
                continue
            low, high = one[f"{part}_lower"], one[f"{part}_upper"]
            ax.fill_between(time, low, high, color=colour, alpha=0.3, linewidth=0, label=f"{words}, {level:g} %")
            ax.plot(time, one[f"{part}_mean"], color=colour, linewidth=0.8)
        ax.margins(x=0.01)
        if failed and name in failed:
            words = failed[name].partition("(")[0].strip()
            ax.set_title(words, fontsize=SMALL, loc="left", color=RED)
        _label(ax, str(one["signal_mean"].attrs.get("units", "")).replace("1", "sd"))
    return figure


def _panels(names: Sequence[str], width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each index, one below the other, and a line at zero in each."""
    figure = Figure(figsize=(width, height * len(names) + 0.3), layout="constrained")
    axes = list(figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0])
    for name, ax in zip(names, axes, strict=True):
        ax.axhline(0, color="0.7", linewidth=0.7, zorder=0)
        ax.set_title(name, fontsize=10, loc="left")
    return figure, axes


def _label(ax: Axes, unit: str) -> None:
    """Unit and legend of a panel of which everything is drawn."""
    ax.set_ylabel(unit, fontsize=SMALL)
    ax.legend(fontsize=SMALL, frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 0.98))
    clean(ax)


def index_sentences(indices: xr.Dataset) -> list[str]:
    """What a reader of the indices has to know, sentence by sentence, as of `index_findings`."""
    return [f"{found.verdict}{f' {found.advice}' * bool(found.advice)}" for found in index_findings(indices)]


def index_findings(indices: xr.Dataset) -> list[Finding]:
    """What a reader of the indices has to know: what a box lacks, how noise behaves, how sure a pattern is.

    Harmful is a published index that the modes hardly tell.

    Parameters
    ----------
    indices
        From `probmodels.bayesian_svd.indices.boxes.box_indices`, or from `mode_index` or `published_index` of
        `probmodels.bayesian_svd.indices.decadal`.
    """
    about = {"covered": _said_of_box, "pattern_agreement": _said_of_mode, "residual_sd": _said_of_published}
    say = next((say for key, say in about.items() if key in indices), None)
    if say is None:
        raise SummaryError(f"indices of another kind: they hold none of {', '.join(about)}")
    found = []
    for name in indices["index"].values:
        one = indices.sel(index=name)
        found += [Finding(False, f"{name}: {x}", part="model") for x in say(one)]
        if "variance_told" in one:
            found += _judged(str(name), one)
    return found


def _judged(name: str, one: xr.Dataset) -> Iterator[Finding]:
    """Whether modes tell a published index, by values that were not used where there are enough, else by the fit."""
    correlation, where = float(np.sqrt(one["variance_told"])), "of the fit"
    if int(one["num_elsewhere"]) >= _JUDGED and np.isfinite(one["correlation_elsewhere"]):
        correlation, where = float(one["correlation_elsewhere"]), "of the values that were not used"
    if correlation < _AGREES:
        verdict = (
            f"{name}: modes and published values hardly agree, correlation {correlation:.2f} {where} (at least "
            f"{_AGREES}): what is written is not that index."
        )
        advice = "Check that the file is of this region, season and step, or take more modes (--rank)."
        yield Finding(True, verdict, advice, part="model")


def _compared(name: str, one: xr.Dataset, published: xr.DataArray) -> Finding:
    """An index that is a mode beside the published series; judged where its name is that of the series or its file."""
    theirs = match_series(published, one["time"])
    both = np.isfinite(theirs)
    mean = one["signal"].mean(("chain", "draw")).values[0]
    correlation = float(np.corrcoef(mean[both], theirs[both])[0, 1])
    verdict = f"{name}: correlation {correlation:.2f} with the published {published.name!r} at {both.sum()} times"
    same = name in f"{published.name} {published.attrs.get('source', '')}".lower()
    if not same or correlation >= _AGREES:
        return Finding(False, f"{verdict}.", part="model")
    verdict += f" (at least {_AGREES}): the two hardly agree, another mode leads in this field than in theirs."
    advice = "Take the index in terms of the modes (published), or a field of the region of its definition."
    return Finding(True, verdict, advice, part="model")


def _said_of_box(one: xr.Dataset) -> Iterator[str]:
    covered, ratio, observed = float(one["covered"]), float(one["noise_ratio"]), one["observed"].values
    if np.isnan(covered):
        yield "cells have no grid; how much of the box they cover is unknown."
    elif covered < 0.995:
        yield f"cells cover {covered:.0%} of the box; the rest is land or outside of the field."
    if "ice_share" in one and (icy := one["ice_share"].values > 0).any():
        what = "left out of its mean" if one.attrs["ice"] == "left_out" else "filled by the model as open water"
        most = float(one["ice_share"].max())
        yield f"part of the box is frozen at {icy.sum()} of {icy.size} times, at most {most:.0%}, and {what}."
    if (gaps := int((observed < 1 - 1e-9).sum())) > 0:
        yield f"{gaps} of {len(observed)} times have gaps in the box, which draws fill."
    if np.isnan(ratio):
        yield "the box is never observed as a whole, so that its noise could not be checked."
    elif ratio > _LARGE_RATIO:
        yield (
            f"modes leave {ratio:.1f} times as much of the mean of the box as the noise of the model would; "
            "intervals of the signal are too narrow, those of filled gaps allow for it."
        )


def _said_of_mode(one: xr.Dataset) -> Iterator[str]:
    if not int(one.attrs["mean_removed"]):
        yield "the global mean is not taken out, unless the data had it taken out before."
    if ice := float(one.attrs["ice_share"]):
        yield f"{ice:.0%} of the region is frozen on average: patterns there, and a mean taken out, are of open water."
    if one.attrs["base_period"].startswith("all"):
        yield f"mean and spread are those of {one.attrs['base_period']}."
    if (agreement := float(one["pattern_agreement"])) < _AGREEMENT:
        yield (
            f"patterns of the draws correlate {agreement:.2f} with their mean: another mode explains nearly as much, "
            "and the data do not settle which pattern the index is of."
        )


def _said_of_published(one: xr.Dataset) -> Iterator[str]:
    sd, decay = (float(one[f"residual_{x}"].mean()) for x in ("sd", "autocorrelation"))
    yield f"residuals of {one.attrs['fitted_values']} values of {one.attrs['fitted']}: sd {sd:.2f}, lag-1 {decay:.2f}."
    if int(one["num_elsewhere"]):
        held, correlation = float(one["held_elsewhere"]), float(one["correlation_elsewhere"])
        yield (
            f"of {int(one['num_elsewhere'])} values that were not used, 95 % intervals hold {held:.0%}; their "
            f"correlation with the mean is {correlation:.3f}."
        )
        if held < _HELD:
            yield "intervals are too narrow for what was not used: the two products drift apart, or the modes do."


@checked(SummaryError)
def write_indices(
    indices: Mapping[str, xr.Dataset],
    folder: str | Path,
    *,
    level: Fraction = 0.95,
    published: xr.DataArray | None = None,
    diagnosis: str = "",
) -> list[Finding]:
    """Write ``indices.csv`` (mean, sd and interval at each time), ``indices.nc`` (all draws) and ``indices.png``.

    What is harmful is the attribute ``verdict`` of ``indices.nc``, stands in the column ``verdict`` of ``indices.csv``,
    and in red above the panel of the index.

    Parameters
    ----------
    indices
        By the name of their group in ``indices.nc``: from `probmodels.bayesian_svd.indices.boxes.box_indices`, or from
        `mode_index` or `published_index` of `probmodels.bayesian_svd.indices.decadal`, of one result.
    folder
        Where to; made where it is missing, files of the same names are replaced.
    level
        Probability of the intervals.
    published
        The published series, which indices that are modes are compared with.
    diagnosis
        Verdict on the result, which ``indices.nc`` keeps.

    Returns
    -------
    list
        What a reader has to know.
    """
    folder = _made(folder)
    groups, findings, summaries = {}, [], []
    failed: dict[str, str] = {}
    for name, one in indices.items():
        summary, found = summarise_indices(one, level=level), index_findings(one)
        if published is not None and "pattern_agreement" in one:
            found.append(_compared(name, one, published))
        both = xr.merge([one, summary], combine_attrs="override")
        said = [f"{x.verdict}{f' {x.advice}' * bool(x.advice)}" for x in found]
        both.attrs |= {"interval_level": level, "comment": " ".join(said)}
        if bad := [x.verdict for x in found if x.harmful]:
            both.attrs["verdict"] = f"FAILED: {' '.join(bad)}"
            failed |= {str(index): str(both.attrs["verdict"]) for index in one["index"].values}
        groups[name] = both
        findings += found
        summaries.append(summary)
    encoding = {
        f"/{group}": {
            str(name): {"dtype": "float32"} for name, x in both.data_vars.items() if {"chain", "draw"} <= set(x.dims)
        }
        for group, both in groups.items()
    }
    tree = xr.DataTree.from_dict(groups)
    tree.attrs |= {"diagnosis": diagnosis, "verdict": " ".join(failed.values()) or "passed"}
    tree.to_netcdf(folder / "indices.nc", engine="netcdf4", encoding=encoding)
    table = pd.concat([index_table(x) for x in summaries])
    if published is not None:
        table["verdict"] = [failed.get(str(x), "").partition(":")[0] or "passed" for x in table["index"]]
    _write(folder, "indices", table, draw_indices(summaries, failed))
    return findings


def _made(folder: str | Path) -> Path:
    """A folder, made where it is missing."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SummaryError(f"cannot make the folder {folder}: {error.strerror or error}; choose another") from error
    return folder


def _write(folder: Path, stem: str, table: pd.DataFrame, figure: Figure) -> None:
    """A table as CSV and its figure as PNG."""
    table.to_csv(folder / f"{stem}.csv", index=False, float_format="%.6g")
    figure.savefig(folder / f"{stem}.png", dpi=110)


def draw_correlations(table: pd.DataFrame) -> Figure:
    """Correlation of each index with a series over lags, with intervals that hold the variability of samples.

    Parameters
    ----------
    table
        Columns ``index``, ``estimand``, ``lag``, ``mean``, ``lower``, ``upper``, as in ``correlations.csv``.
    """
    names = list(dict.fromkeys(table["index"]))
    figure, axes = _panels(names, 6.5, 2.2)
    for name, ax in zip(names, axes, strict=True):
        kinds = list(table[table["index"] == name].groupby("estimand", sort=False))
        for place, (estimand, part) in enumerate(kinds):
            shift = 0.12 * (place - (len(kinds) - 1) / 2)
            reach = [part["mean"] - part["lower"], part["upper"] - part["mean"]]
            style: dict[str, Any] = {
                "fmt": "o",
                "markersize": 3,
                "linewidth": 1,
                "capsize": 2,
                "color": _SHOWN[str(estimand)][0],
            }
            ax.errorbar(part["lag"] + shift, part["mean"], np.clip(reach, 0, None), label=str(estimand), **style)
        _label(ax, "correlation")
    axes[-1].set_xlabel("lag: steps by which the index leads", fontsize=SMALL)
    return figure


@checked(SummaryError)
def write_correlations(
    indices: Mapping[str, xr.Dataset],
    series: xr.DataArray,
    folder: str | Path,
    *,
    max_lag: Annotated[int, Interval(ge=0, le=1200)] = 0,
    detrend: bool = False,
    level: Fraction = 0.95,
) -> list[Finding]:
    """Write ``correlations.csv`` and ``correlations.png``: correlations of all indices with a series.

    Parameters
    ----------
    indices
        As for `write_indices`.
    series
        From `probmodels.bayesian_svd.indices.series.load_series`.
    folder
        Where to; made where it is missing, files of the same names are replaced.
    max_lag, detrend
        As for `probmodels.bayesian_svd.indices.correlation.correlate`.
    level
        Probability of the intervals.

    Returns
    -------
    list
        What a reader has to know.
    """
    rows: list[pd.DataFrame] = []
    sentences: list[str] = []
    for one in indices.values():
        for name in _SHOWN.keys() & one.data_vars.keys():
            found = correlate(one[name], series, max_lag=max_lag, detrend=detrend)
            rows.append(_correlation_rows(found, level).assign(series=str(series.name), estimand=name))
            sentences += [x for x in correlation_sentences(found) if x not in sentences]
    order = ["index", "estimand", "series", "lag", "mean", "sd", "lower", "upper"]
    table = pd.concat(rows, ignore_index=True)[[*order, "sample_correlation", "effective_times", "num_pairs"]]
    table = table.sort_values(["index", "estimand", "lag"], ignore_index=True)
    _write(_made(folder), "correlations", table, draw_correlations(table))
    return [Finding(False, x, part="model") for x in sentences]


def _correlation_rows(found: xr.Dataset, level: float) -> pd.DataFrame:
    """One row for each index and lag."""
    over = ("chain", "draw")
    low, high = found["correlation"].quantile([(1 - level) / 2, (1 + level) / 2], over)
    parts = {"mean": found["correlation"].mean(over), "sd": found["correlation"].std(over, ddof=1)}
    parts |= {"lower": low.drop_vars("quantile"), "upper": high.drop_vars("quantile")}
    parts |= {key: found[key].mean(over) for key in ("sample_correlation", "effective_times")}
    return xr.Dataset(parts | {"num_pairs": found["num_pairs"]}).to_dataframe().reset_index()


class Request(TypedDict, total=False):
    """What `indices_to_folder` is asked for.

    Parameters
    ----------
    boxes
        As for `probmodels.bayesian_svd.indices.boxes.box_indices`.
    effects, min_covered, ice
        Likewise.
    modes
        Keys of `probmodels.bayesian_svd.indices.decadal.DEFINITIONS`.
    remove_mean, base
        As for `probmodels.bayesian_svd.indices.decadal.mode_index`.
    published, fitted
        File of a published series, and the period of its values that `published_index` of the same module uses.
    series
        File of a series to correlate all indices with.
    column, missing
        As for `probmodels.bayesian_svd.indices.series.load_series`.
    max_lag, detrend
        As for `probmodels.bayesian_svd.indices.correlation.correlate`.
    """

    boxes: Annotated[Sequence[str] | None, Default(None)]
    effects: Annotated[bool, Default(True)]
    min_covered: Annotated[Fraction, Default(0.8)]
    ice: Annotated[Ice, Default("left_out")]
    modes: Annotated[Sequence[Annotated[str, OneOf(tuple(DEFINITIONS))]], Default(())]
    remove_mean: Annotated[bool, Default(False)]
    base: Annotated[str | None, Default(None)]
    published: Annotated[str | Path | None, Default(None)]
    fitted: Annotated[str | None, Default(None)]
    series: Annotated[str | Path | None, Default(None)]
    column: Annotated[str | None, Default(None)]
    missing: Annotated[Sequence[float], Default(())]
    max_lag: Annotated[Annotated[int, Interval(ge=0, le=1200)], Default(0)]
    detrend: Annotated[bool, Default(False)]


@checked(SummaryError)
def indices_to_folder(
    tree: xr.DataTree, folder: str | Path, *, level: Fraction = 0.95, diagnosis: str = "", **request: Unpack[Request]
) -> list[Finding]:
    """Compute and write what ``probmodels indices`` is asked for: boxes, modes, a published series, correlations.

    Parameters
    ----------
    tree
        Result of a Bayesian SVD.
    folder
        Where to.
    level
        Probability of the intervals.
    diagnosis
        Verdict on the result, which ``indices.nc`` keeps.

    Returns
    -------
    list
        What a reader has to know. Harmful is an index that hardly agrees with its published values.

    Raises
    ------
    SummaryError
        If an option is given that is not used, or the result lacks what is asked for.
    DataError
        If a file, a box or a period cannot be used.
    """
    asked: dict[str, Any] = dict(filled(Request, request))
    boxed = bool(asked["boxes"]) or not (asked["modes"] or asked["published"])
    for used, what, names in (
        (boxed, "no boxes", ("effects", "min_covered", "ice")),
        (bool(asked["modes"]), "no modes", ("remove_mean", "base")),
        (asked["published"] is not None, "no published series", ("fitted",)),
        (asked["series"] is not None, "no series", ("column", "missing", "max_lag", "detrend")),
    ):
        if not used:
            refuse_unused(indices_to_folder, what, **{name: asked[name] for name in names})
    other, published = _checked_request(tree, asked, boxed)
    folder = _made(folder)
    found: dict[str, xr.Dataset] = {}
    if boxed:
        own = {name: asked[name] for name in ("effects", "min_covered", "ice")}
        found["boxes"] = box_indices(tree, asked["boxes"] or None, **own)
    for name in asked["modes"]:
        found[name] = mode_index(tree, name, remove_mean=asked["remove_mean"], base=asked["base"])
    if published is not None:
        found["published"] = published_index(tree, published, fitted=asked["fitted"])
    findings = write_indices(found, folder, level=level, published=published, diagnosis=diagnosis)
    if other is not None:
        more = {"max_lag": asked["max_lag"], "detrend": asked["detrend"]}
        findings += write_correlations(found, other, folder, level=level, **more)
    return findings


def _checked_request(
    tree: xr.DataTree, asked: Mapping[str, Any], boxed: bool
) -> tuple[xr.DataArray | None, xr.DataArray | None]:
    """Series to correlate with and published series; all that can be refused is, before anything is computed."""
    other = published = None
    num_modes, constant = read_draws(tree).d.shape[1], tree["constant_data"].to_dataset()
    if asked["published"] is not None:
        if asked["fitted"] is None:
            raise SummaryError("published needs the period whose values are used: fitted='1950-1993' (--fitted)")
        published = load_series(asked["published"])
        published_values(constant, num_modes, published, asked["fitted"])
    if asked["series"] is not None:
        other = load_series(asked["series"], column=asked["column"], missing=asked["missing"])
        if "time" not in constant.coords:
            raise DataError("the result has no dates; another series cannot be set beside it")
        check_common_times(other, constant["time"], asked["max_lag"])
    if boxed:
        areas = box_areas(constant, asked["boxes"] or None, asked["min_covered"])
        if asked["ice"] == "left_out":
            check_ice(constant, areas)
    for name in asked["modes"]:
        mode_region(constant, num_modes, name, asked["base"])
    return other, published
