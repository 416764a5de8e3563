"""How a run can be described in a paper, and what to cite: a paragraph made from what the result says of itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from probmodels._version import __version__
from probmodels.bayesian_svd.draws import MODES_OF
from probmodels.errors import ResultError
from probmodels.inference.labels import group_of, read_json

__all__ = ["bibtex", "data_set", "methods_paragraphs"]

_DATA = {  # key of an entry below: words by which a title, a name or a path tells the data set
    "ersstv5": ("ersst", "extended reconstructed sea surface temperature", "extended reconstructed sst"),
    "hadisst": ("hadisst",),
    "oisst": ("oisst", "optimum interpolation"),
    "cobe2": ("cobe",),
}
_EMBEDDED = "sst_ndjfm_anom.nc"  # the file that the package eofs carries
_NAMES = {
    "ersstv5": "ERSST v5 (Huang et al., 2017)",
    "hadisst": "HadISST (Rayner et al., 2003)",
    "oisst": "OISST v2.1 (Huang et al., 2021)",
    "cobe2": "COBE-SST 2 (Hirahara et al., 2014)",
    "eofs": "the example field of the package eofs (Dawson, 2016)",
}
_SEASONS = {"DJF": "December to February", "NDJFM": "November to March", "JJA": "June to August"}

_ENTRIES = {
    "ersstv5": """@article{huang2017ersst,
  author  = {Huang, Boyin and Thorne, Peter W. and Banzon, Viva F. and Boyer, Tim and Chepurin, Gennady and
             Lawrimore, Jay H. and Menne, Matthew J. and Smith, Thomas M. and Vose, Russell S. and Zhang, Huai-Min},
  title   = {Extended Reconstructed Sea Surface Temperature, Version 5 ({ERSSTv5}): Upgrades, Validations, and
             Intercomparisons},
  journal = {Journal of Climate}, volume = {30}, number = {20}, pages = {8179--8205}, year = {2017},
  doi     = {10.1175/JCLI-D-16-0836.1}
}""",
    "hadisst": """@article{rayner2003hadisst,
  author  = {Rayner, N. A. and Parker, D. E. and Horton, E. B. and Folland, C. K. and Alexander, L. V. and
             Rowell, D. P. and Kent, E. C. and Kaplan, A.},
  title   = {Global analyses of sea surface temperature, sea ice, and night marine air temperature since the late
             nineteenth century},
  journal = {Journal of Geophysical Research: Atmospheres}, volume = {108}, number = {D14}, year = {2003},
  doi     = {10.1029/2002JD002670}
}""",
    "oisst": """@article{huang2021oisst,
  author  = {Huang, Boyin and Liu, Chunying and Banzon, Viva and Freeman, Eric and Graham, Garrett and
             Hankins, Bill and Smith, Tom and Zhang, Huai-Min},
  title   = {Improvements of the Daily Optimum Interpolation Sea Surface Temperature ({DOISST}) Version 2.1},
  journal = {Journal of Climate}, volume = {34}, number = {8}, pages = {2923--2939}, year = {2021},
  doi     = {10.1175/JCLI-D-20-0166.1}
}""",
    "cobe2": """@article{hirahara2014cobe,
  author  = {Hirahara, Shoji and Ishii, Masayoshi and Fukuda, Yoshikazu},
  title   = {Centennial-Scale Sea Surface Temperature Analysis and Its Uncertainty},
  journal = {Journal of Climate}, volume = {27}, number = {1}, pages = {57--75}, year = {2014},
  doi     = {10.1175/JCLI-D-12-00837.1}
}""",
    "eofs": """@article{dawson2016eofs,
  author  = {Dawson, Andrew},
  title   = {eofs: A Library for {EOF} Analysis of Meteorological, Oceanographic, and Climate Data},
  journal = {Journal of Open Research Software}, volume = {4}, number = {1}, pages = {e14}, year = {2016},
  doi     = {10.5334/jors.122}
}""",
    "method": """@misc{north2023frames,
  author = {North, Joshua S. and Risser, Mark D. and Breidt, F. Jay},
  title  = {A flexible class of priors for orthonormal matrices with basis function-specific structure},
  year   = {2023}, eprint = {2307.13627}, archivePrefix = {arXiv}, doi = {10.48550/arXiv.2307.13627}
}""",
    "rhat": """@article{vehtari2021rhat,
  author  = {Vehtari, Aki and Gelman, Andrew and Simpson, Daniel and Carpenter, Bob and B{\\"u}rkner, Paul-Christian},
  title   = {Rank-Normalization, Folding, and Localization: An Improved {$\\widehat{R}$} for Assessing Convergence of
             {MCMC}},
  journal = {Bayesian Analysis}, volume = {16}, number = {2}, pages = {667--718}, year = {2021},
  doi     = {10.1214/20-BA1221}
}""",
}


def data_set(tree: xr.DataTree) -> str | None:
    """Key of the public data set that a result is of, as its attributes tell it; None for others."""
    data = _attrs(tree)
    files = [str(x.get("name", "")) for x in _list(data.get("source_files"))]
    if _EMBEDDED in files:
        return "eofs"
    path = _table(tree.attrs, "spec").get("data", {})
    known = str(path.get("path", "")) if isinstance(path, dict) else ""
    if known in _DATA:
        return known
    told = " ".join(
        [*(str(data.get(x, "")) for x in ("title", "long_name", "source")), *files, Path(known).name]
    ).lower()
    return next((key for key, words in _DATA.items() if any(word in told for word in words)), None)


def methods_paragraphs(
    tree: xr.DataTree, modes: xr.Dataset, diagnosis: object = None, these: xr.Dataset | None = None
) -> list[str]:
    """Data, model and sampler of a run in words that a section on methods may hold.

    Parameters
    ----------
    tree
        The result.
    modes
        From `probmodels.bayesian_svd.summary.summarise_modes`.
    diagnosis
        Verdict on the draws, whose table gives r_hat and effective sample sizes; left out for None. What is said is
        the worst of that table and of the maps of the modes.
    these
        Summary of the modes of these times, where ``modes`` are those of the population.

    Returns
    -------
    list
        Three paragraphs. What the result does not say of itself is left out.
    """
    return [
        _of_data(tree),
        _of_model(tree, modes),
        _of_sampler(tree, [modes, *([] if these is None else [these])], diagnosis),
    ]


def _of_data(tree: xr.DataTree) -> str:
    constant, data = group_of(tree, "constant_data"), _attrs(tree)
    name = str(data.get("long_name", "")) or str(data.get("title", "")) or "the field"
    units = str(data.get("units", "1"))
    unit = f" (in {units.replace('degC', '°C')})" if units not in ("", "1") else ""
    source = _NAMES.get(data_set(tree) or "", "") or ", ".join(str(x["name"]) for x in _list(data.get("source_files")))
    region = str(data.get("region", ""))
    where = f" in the region {region}" if region not in ("", "all") else ""
    text = f"We analysed {name}{unit}" + (f" from {source}" if source else "") + where
    text += f" at {constant.sizes['cell']} cells{_spacing(data)}"
    season, frequency = str(data.get("season", "")), str(data.get("frequency", ""))
    means = f"means over {_SEASONS.get(season, season)}" if season else f"{frequency} values".strip()
    text += f" and {constant.sizes['time']} {means.strip()}{_period(constant)}."
    if base := str(data.get("base_period", "")):
        text += f" Values are anomalies from the mean seasonal cycle of {base}."
    elif str(data.get("kind", "")) == "anomaly":
        text += " Values are anomalies, as the file holds them."
    missing = float(np.mean(~np.isfinite(constant["data"].values)))
    if missing:
        text += (
            f" Missing are {100 * missing:.2g} % of the values; they were not filled beforehand, but left out of the "
            "likelihood."
        )
    text += "".join(f" {sentence}" for sentence in _sentences(data.get("mends")) if "sea ice" in sentence)
    weight = constant["weight"].values if "weight" in constant else np.ones(1)
    return text + (" Cells were weighted by their area." if np.ptp(weight) > 1e-9 else " Cells had equal weights.")


def _of_model(tree: xr.DataTree, modes: xr.Dataset) -> str:
    constant, options = group_of(tree, "constant_data"), _table(tree.attrs, "options")
    population = modes.attrs.get("estimand") == MODES_OF["population"]
    names = [str(x) for x in constant["effect"].values] if "effect" in constant.coords else []
    effects = f"fixed effects of each cell ({', '.join(names)}), " if names else ""
    text = (
        f"The field was modelled as the sum of {effects}{modes.sizes['mode']} modes and Gaussian noise"
        f"{_noise(constant)}: Z = {'B D′ + ' if names else ''}U diag(d) {'F' if population else 'V'}′ + noise. "
        "Patterns U are orthonormal in area-weighted coordinates"
    )
    kernel = str(constant.attrs.get("kernel_space", options.get("kernel_space", "")))
    prior = str(options.get("frame_prior", "conditioned"))
    if prior == "uniform":
        text += " with a uniform prior"
    elif kernel:
        text += f" and have a {prior} prior after North, Risser and Breidt (2023) with {_kernel(kernel)} covariance"
        if (scales := constant.get("length_scales_space")) is not None and scales.size > 1:
            unit = " km" if "lat" in constant.coords else ""
            text += (
                f", whose length-scale, one for each mode, was learned on a grid from {float(scales.min()):.4g} to "
                f"{float(scales.max()):.4g}{unit}"
            )
    series = {
        "ar1": "Series F are autoregressive processes of first order with unit variance, each with a decay of its own "
        "that was learned",
        "iid": "Series F are white noise of unit variance",
        **{
            f"matern{order}2": f"Series F are Matérn processes of order {order}/2 with unit variance, each with a "
            "length-scale in time of its own that was learned"
            for order in (3, 5)
        },
    }.get(str(options.get("series", "")), "Series V are orthonormal")
    sizes = "half-normal priors"
    if constant.attrs.get("shrinkage") == "log_uniform":
        sizes = "log-uniform priors from a tenth of the noise upwards, so that modes can vanish"
    text += f". {series}. Standard deviations d have {sizes}, and the noise variance has an inverse-gamma one."
    whose = "the population that the times are a sample of" if population else "the field at these times"
    return f"{text} Results are the modes of {whose}, with {_level(modes)} equal-tailed posterior intervals."


def _of_sampler(tree: xr.DataTree, summaries: Sequence[xr.Dataset], diagnosis: object) -> str:
    posterior = group_of(tree, "posterior")
    settings = _table(tree.attrs, "spec").get("inference", {})
    chains, draws = posterior.sizes.get("chain", 1), posterior.sizes.get("draw", 1)
    versions = _table(tree.attrs, "versions")
    software = f"probmodels {versions.get('probmodels', __version__)}"
    beside = ", ".join(
        f"{name} {versions[name]}" for name in ("torch", "pyro-ppl", "numpy", "python") if name in versions
    )
    software += f" ({beside})" if beside else ""
    if "svi" in str(tree.attrs.get("engine", "")):
        return (
            f"The posterior was approximated by stochastic variational inference in {software}; {chains * draws} draws "
            "of the approximation were kept."
        )
    kernel = str(tree.attrs.get("kernel", ""))
    how = "an exact block Gibbs sampler" if "Gibbs" in kernel else kernel or "Markov chain Monte Carlo"
    text = f"The posterior was drawn by {how} in {software}: {chains} chain{'s' * (chains != 1)} of {draws} draws"
    if isinstance(settings, Mapping) and "warmup_steps" in settings:
        text += f" after {settings['warmup_steps']} sweeps of warm-up"
        text += f", one of {settings['thin']} sweeps kept" if settings.get("thin", 1) != 1 else ""
    text += f", seed {tree.attrs['seed']}." if "seed" in tree.attrs else "."
    table = getattr(diagnosis, "table", None)
    if (
        isinstance(table, pd.DataFrame)
        and len(table)
        and chains > 1
        and {"r_hat_max", "ess_bulk_min"} <= {*table.columns}
    ):
        maps = [x for x in summaries if {"mode_r_hat", "mode_ess"} <= set(x.data_vars)]
        largest = max([table["r_hat_max"].max(), *(float(x["mode_r_hat"].max()) for x in maps)])
        smallest = min([table["ess_bulk_min"].min(), *(float(x["mode_ess"].min()) for x in maps)])
        text += (
            f" The largest rank-normalised R-hat (Vehtari et al., 2021), of all variables and maps, is {largest:.3f}, "
            f"the smallest bulk effective sample size {smallest:.0f}."
        )
    return text


def bibtex(tree: xr.DataTree) -> str:
    """BibTeX entries of the data set, where it is known, of the method, of the diagnostics and of this software."""
    found = data_set(tree)
    version = _table(tree.attrs, "versions").get("probmodels", __version__)
    software = (
        "@software{probmodels,\n  author  = {{The probmodels developers}},\n"
        f"  title   = {{probmodels: probabilistic models on Pyro}},\n  version = {{{version}}}\n}}"
    )
    entries = [_ENTRIES[found]] if found else []
    return "\n\n".join([*entries, _ENTRIES["method"], _ENTRIES["rhat"], software])


def _attrs(tree: xr.DataTree) -> dict[Any, Any]:
    """Attributes of the data, and of their group and the root where these lack them."""
    constant = group_of(tree, "constant_data")
    own = constant["data"].attrs if "data" in constant else {}
    return {**tree.attrs, **constant.attrs, **own}


def _table(attrs: Mapping[Any, Any], name: str) -> dict[str, Any]:
    """A root attribute that holds a JSON table; empty where it holds something else."""
    try:
        found: dict[str, Any] = read_json(attrs, name, {})
    except ResultError:
        return {}
    return found


def _sentences(text: Any) -> list[str]:
    """Sentences of a JSON list; none where the text is something else."""
    try:
        found = json.loads(str(text or "[]"))
    except json.JSONDecodeError:
        return []
    return [x for x in found if isinstance(x, str)] if isinstance(found, list) else []


def _list(text: Any) -> list[Mapping[str, Any]]:
    """Tables of a JSON list; none where the text is something else."""
    try:
        found = json.loads(str(text or "[]"))
    except json.JSONDecodeError:
        return []
    return [x for x in found if isinstance(x, dict) and "name" in x] if isinstance(found, list) else []


def _spacing(data: Mapping[Any, Any]) -> str:
    """Size of the cells of a grid."""
    steps = []
    for name in ("grid_lat", "grid_lon"):
        axis = np.atleast_1d(np.asarray(data.get(name, ()), dtype=float))
        if len(axis) < 2:
            return ""
        steps.append(f"{np.median(np.diff(axis)):.3g}°")
    return f" of {steps[0]} × {steps[1]}"


def _period(constant: xr.Dataset) -> str:
    if "time" not in constant.coords or constant["time"].dtype.kind not in "MO":
        return ""
    first, last = (str(x)[:7] for x in constant["time"].values[[0, -1]])
    return f", {first} to {last}"


def _kernel(name: str) -> str:
    """A kernel in words, with its article."""
    if name.startswith("matern"):
        return f"a Matérn-{name[6]}/{name[7:]}"
    return f"a {name}" if "," not in name else f"one of the kernels {name}"


def _noise(constant: xr.Dataset) -> str:
    """What the noise is like: its covariance where it has one, which was estimated before sampling."""
    if "noise_kernel" not in constant.attrs:
        return ", independent between cells and times"
    unit = " km" if "lat" in constant.coords else ""
    return (
        " with a level of each cell, "
        f"{100 * float(constant.attrs['noise_share']):.0f} % of whose variance is correlated in space "
        f"({_kernel(str(constant.attrs['noise_kernel'])).removeprefix('a ')}, length-scale "
        f"{float(constant.attrs['noise_length_scale']):.0f}{unit}), and a correlation of "
        f"{float(constant.attrs['noise_decay']):.2f} between neighbouring times, all estimated from the data beforehand"
    )


def _level(modes: xr.Dataset) -> str:
    return f"{100 * float(modes.attrs.get('interval_level', 0.95)):g} %"
