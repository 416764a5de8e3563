"""What a result of a Bayesian SVD keeps of its data, labels of its sites, and those whose convergence is judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from probmodels.bayesian_svd.model import MatrixData
from probmodels.bayesian_svd.noise import Noise

__all__ = ["constant_data", "diagnosed_sites", "keep_kernels", "keep_noise", "labels_of_sites"]


def constant_data(
    matrix: xr.DataArray,
    weight: np.ndarray,
    reduced: MatrixData,
    reference: tuple[np.ndarray, np.ndarray],
    local: xr.DataArray,
    common: xr.DataArray,
) -> xr.Dataset:
    """What a result keeps of the data, to expand its draws."""
    space, time = reduced.space, reduced.time
    constant = xr.Dataset(
        {
            "data": matrix.rename("data"),
            "weight": ("cell", weight),
            "basis_space_matrix": (("cell", "basis_space"), space.basis.numpy()),
            "length_scales_space": ("length_index_space", space.length_scales.numpy()),
            "reference_space": (("basis_space", "mode"), reference[0]),
            "reference_time": (("basis_time" if len(time.basis) else "time", "mode"), reference[1]),
        }
    )
    if len(time.basis):
        constant["basis_time_matrix"] = ("time", "basis_time"), time.basis.numpy()
        constant["length_scales_time"] = "length_index_time", time.length_scales.numpy()
    if reduced.series is not None:
        series = reduced.series
        constant["time_steps"] = "step", series.steps.numpy()
        constant.attrs |= {"series": series.process, "time_step": series.step}
        if series.process != "ar1":
            constant["length_scales_time"] = "length_index_time", series.step * series.scale.numpy()
    if local.sizes["effect"]:
        constant["fixed_effects_design"] = local
    if common.sizes["effect"]:
        constant["shared_effects_design"] = common.rename(effect="shared_effect")
    return constant


def keep_kernels(constant: xr.Dataset, options: Mapping[str, Any], families: Mapping[str, Sequence[str]]) -> None:
    """The kernel of each side, or those of its modes."""
    for name, kinds in families.items():
        alike = isinstance(options[f"kernel_{name}"], str)
        constant.attrs[f"kernel_{name}"] = kinds[0] if alike else ",".join(kinds)


def keep_noise(constant: xr.Dataset, noise: Noise, weight: np.ndarray, noise_rank: int) -> None:
    """What summaries need of the covariance of the noise: levels in data units, correlation, persistence."""
    constant["noise_level"] = "cell", noise.level / np.sqrt(weight)
    constant["noise_vectors"] = ("cell", "noise_component"), noise.vectors.astype(np.float32)
    constant["noise_values"] = "noise_component", noise.values
    constant.attrs |= {"noise_kernel": noise.kernel, "noise_length_scale": noise.length_scale}
    constant.attrs |= {"noise_share": float(noise.share.mean()), "noise_decay": noise.decay}
    constant.attrs["noise_rank"] = noise_rank


def labels_of_sites(rank: int, matrix: xr.DataArray, local: xr.DataArray, common: xr.DataArray) -> dict[str, Any]:
    """Labels of the axes of sites; effects only where there are some."""
    coords: dict[str, Any] = {
        "mode": range(1, rank + 1),
        "cell": matrix["cell"].values,
        "time": matrix["time"].values,
        "effect": local["effect"].values,
        "shared_effect": common["effect"].values,
    }
    return {name: labels for name, labels in coords.items() if len(labels)}


def diagnosed_sites(data: MatrixData) -> tuple[str, ...]:
    """Sites whose convergence is judged: length-scales only where there is a choice."""
    names = ["U", "V" if data.series is None else "F", "d", "sigma"]
    names += ["length_scale_space"] * (len(data.space.length_scales) > 1)
    names += ["length_scale_time"] * (len(data.time.length_scales) > 1)
    names += ["autocorrelation"] * (data.series is not None and len(data.series.scale) > 1)
    names += ["shared_effects"] * bool(len(data.shared))
    return tuple(names)
