"""Calibration of the Bayesian SVD: coverage of its intervals, and its errors beside those of the plain SVD.

``sbc`` is simulation-based calibration (Talts et al. 2018, https://arxiv.org/abs/1804.06788): truths drawn from the
model's prior, data from its likelihood, and the truth ranked among posterior draws of the block sampler, started as it
always starts. The ranks are uniform if and only if sampler, model and data preparation agree. Among the ranked
quantities is the log-likelihood, which a posterior that forgot part of the data would betray (Modrák et al. 2023).
Configurations: all entries seen; a fifth missing, with a flat intercept in each cell; shared and local effects under
proper priors, with area weights, complete and with a fifth missing; uniform frames. Negative controls, which must fail:
frames inferred under the uniform prior, and a sampler without rotations, which mixes too slowly for this many sweeps.
Finer errors are found by the joint distribution test in `tests/test_bayesian_svd_calibration.py`.

``coverage`` simulates larger fields (n = m = 60, k = 3) with given singular values: share of 95 % intervals that hold
the truth, and root mean square errors over those of the plain SVD, of cells' means where entries are missing.
"""

from __future__ import annotations

import common  # isort: skip  (pins threads before numpy is loaded)

import argparse
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from pyro import poutine

from probmodels.bayesian_svd import make_problem
from probmodels.bayesian_svd.model import LowRankNormal, MatrixData, frame_prior
from probmodels.bayesian_svd.sampler import BlockGibbs
from probmodels.inference.diagnostics.calibration import Calibration, sbc
from probmodels.inference.problem import Problem

Array = common.Array
RANK = 3
GRID = [0.1, 0.15, 0.2, 0.3, 0.4, 0.55, 0.75, 1.0]
WEAK = {"scale": 3.0, "noise_prior": (5.0, 0.75)}  # signals about as large as noise, so that the prior matters


class Setting(NamedTuple):
    """A configuration of `sbc`: options of `make_problem`, share of missing entries, what inference does otherwise."""

    options: Mapping[str, Any] = {}
    missing: float = 0.0
    wrong: Mapping[str, Any] = {}
    num_passes: int = 10


EFFECTS = {
    "fixed_effects": ("intercept", "trend"),
    "shared_effects": ("trend",),
    "effect_scale": 1.0,
    "area_weights": np.linspace(0.3, 1.7, 14),
}
SETTINGS = {
    "complete": Setting(),
    "gaps": Setting({"fixed_effects": ("intercept",)}, 0.2),
    "effects": Setting(EFFECTS),
    "effects and gaps": Setting(EFFECTS, 0.2),
    "uniform frames": Setting({"frame_prior": "uniform"}),
}
CONTROLS = {
    "control: wrong frame prior": Setting(wrong={"frame_prior": "uniform"}),
    "control: no rotations": Setting(num_passes=0),
}


def problem(values: Array, options: Mapping[str, Any]) -> Problem:
    """A Bayesian SVD of a small matrix on unit intervals, all hyperparameters fixed."""
    n, m = values.shape
    coords = {"cell": np.linspace(0, 1, n), "time": np.linspace(0, 1, m)}
    settings = {
        "rank": RANK,
        "fixed_effects": (),
        "kernel_space": "matern72",
        "kernel_time": "matern72",
        "length_scales_space": GRID,
        "length_scales_time": GRID,
        "nugget": 1e-4,
        "tail": 0.0,
        "area_weights": False,
        **WEAK,
        **options,
    }
    if options.get("frame_prior") == "uniform":  # has no kernels
        settings = {k: v for k, v in settings.items() if k.split("_")[0] not in ("kernel", "length", "nugget", "tail")}
    return make_problem(xr.DataArray(values, dims=("cell", "time"), coords=coords), **settings)


def holes(rng: np.random.Generator, shape: tuple[int, int], share: float, least: int) -> Array:
    """Mask of missing entries, which leaves each row ``least`` entries and each column two."""
    while True:
        missing = rng.random(shape) < share
        if (~missing).sum(1).min() >= least and (~missing).sum(0).min() >= 2:
            return missing


def log_likelihood(data: MatrixData, draw: Mapping[str, torch.Tensor]) -> float:
    """Log likelihood of the observed entries, local effects marginalised."""
    shared = draw.get("shared_effects", torch.zeros(0, dtype=torch.float64))
    value = data.z if data.gaps is None else data.gaps.observed
    return float(LowRankNormal(data, draw["U"], draw["d"], draw["V"], draw["sigma"], shared).log_prob(value))


def quantities(data: MatrixData, draw: Mapping[str, torch.Tensor]) -> dict[str, Array]:
    """Quantities that are ranked: parameters with their labels, and functions that no change of sign alters."""
    u, v, d = (data.space.basis @ draw["U"]).numpy(), (data.time.basis @ draw["V"]).numpy(), draw["d"].numpy()
    signal = (u * d) @ v.T
    out = {
        "d": d,
        "d sorted": np.sort(d),
        "sigma": np.asarray(float(draw["sigma"])),
        "norm of d": np.asarray(np.linalg.norm(d)),
        "u v of a mode": np.stack([u[3] * v[4], u[9] * v[2]]).ravel(),
        "u u of a mode": np.stack([u[5] * u[9], v[2] * v[8]]).ravel(),
        "two modes": u[3, :2] * v[4, :2] * u[6, 1:] * v[7, 1:],
        "projectors": np.stack([u[2] @ u[7], v[1] @ v[6], u[4] @ u[4]]),
        "signal": np.stack([signal[2, 3], signal[10, 8], signal[0, 0]]),
        "log likelihood": np.asarray(log_likelihood(data, draw)),
    }
    for name in ("length_scale_space", "length_scale_time", "shared_effects"):
        if name in draw:
            out[name] = draw[name].numpy()
    if "fixed_effects" in draw:
        out["fixed_effects"] = draw["fixed_effects"].numpy()[[0, 6]].ravel()
    return out


class Model:
    """Simulator and inference of one configuration, as `probmodels.inference.diagnostics.calibration.sbc` takes
    them."""

    def __init__(self, setting: Setting, *, burn: int, thin: int, num_draws: int) -> None:
        self.setting, self.burn, self.thin, self.num_draws = setting, burn, thin, num_draws
        # A stand-in for data: prior, bases and designs do not depend on them.
        any_values = np.random.default_rng(0).standard_normal((14, 11))
        self.template = problem(any_values, setting.options)

    def simulate(self, rng: np.random.Generator) -> tuple[dict[str, Array], Array]:
        """Truth and data (n, m) from the model itself; flat effects, which have no prior, are given some values."""
        data: MatrixData = self.template.args[0]
        torch.manual_seed(int(rng.integers(2**31)))
        trace = poutine.trace(self.template.model).get_trace(*self.template.args, **self.template.kwargs)
        truth = {name: trace.nodes[name]["value"] for name in trace.stochastic_nodes if name != "fixed_effects"}
        u, v = data.space.basis @ truth["U"], data.time.basis @ truth["V"]
        values = ((u * truth["d"]) @ v.T).numpy()
        n, m = values.shape
        num_effects = data.design.shape[1]
        precision = float(data.effect_precision)
        effects = rng.standard_normal((n, num_effects)) * (precision**-0.5 if precision else 5.0)
        values += effects @ data.design.numpy().T
        root_weight = np.sqrt(data.weight.numpy())[:, None]
        if num_effects:
            named = np.linalg.solve(data.design_root.numpy(), effects.T).T / root_weight
            truth["fixed_effects"] = torch.as_tensor(named)
        if "shared_effects" in truth:
            times = np.linspace(0, 1, m)
            values += root_weight * (times - times.mean()) * truth["shared_effects"].numpy()
        values += float(truth["sigma"]) * rng.standard_normal((n, m))
        values /= root_weight
        if self.setting.missing:
            values[holes(rng, (n, m), self.setting.missing, num_effects + 2)] = np.nan
        made = problem(values, self.setting.options).args[0]
        return quantities(made, truth), values

    def infer(self, values: Array, seed: int) -> xr.Dataset:
        """Draws of the same quantities by the block sampler."""
        made = problem(values, {**self.setting.options, **self.setting.wrong})
        data = made.args[0]
        kernel = BlockGibbs(made, num_passes=self.setting.num_passes)
        kernel.seed(seed)
        kernel.setup(self.burn)
        params = kernel.initial_params
        found = []
        for step in range(self.burn + self.thin * self.num_draws):
            params = kernel.sample(params)
            if step >= self.burn and (step - self.burn) % self.thin == self.thin - 1:
                found.append(quantities(data, kernel.export(params)))
        stacked = {name: np.stack([one[name] for one in found])[None] for name in found[0]}
        return xr.Dataset(
            {name: (("chain", "draw", *_axes(name, v.ndim - 2)), v) for name, v in stacked.items()},
        )


def _axes(name: str, number: int) -> tuple[str, ...]:
    return tuple(f"{name}_{axis}" for axis in range(number))


def calibrate(
    setting: Setting, *, num_replicates: int, num_draws: int = 79, burn: int = 300, thin: int = 20, seed: int = 0
) -> Calibration:
    """Simulation-based calibration of the block sampler in one configuration."""
    model = Model(setting, burn=burn, thin=thin, num_draws=num_draws)
    return sbc(model.simulate, model.infer, num_replicates=num_replicates, num_draws=num_draws, seed=seed)


def run_sbc(options: argparse.Namespace) -> None:
    rows = []
    for name, setting in {**SETTINGS, **CONTROLS}.items():
        if options.only and name not in options.only:
            continue
        start = time.process_time()
        found = calibrate(
            setting,
            num_replicates=options.replicates,
            num_draws=options.draws,
            burn=options.burn,
            thin=options.thin,
            seed=options.seed,
        )
        limit = found.alpha / found.num_tests
        cut = round(0.025 * (options.draws + 1))  # ranks outside the central interval on each side
        nominal = 1 - 2 * cut / (options.draws + 1)
        for variable in found.ranks.data_vars:
            lowest = [float(p[variable].min()) for p in (found.ks, found.chi_square)]
            ranks = found.ranks[variable]
            covered = ((ranks >= cut) & (ranks <= options.draws - cut)).mean("replicate")
            rows.append(
                {
                    "configuration": name,
                    "quantity": str(variable),
                    "entries": int(found.ks[variable].size),
                    "lowest KS p": lowest[0],
                    "lowest chi-square p": lowest[1],
                    "Bonferroni limit": limit,
                    f"{nominal:.1%} intervals hold": float(covered.mean()),
                    "least": float(covered.min()),
                    "most": float(covered.max()),
                    "uniform": "yes" if min(lowest) > limit else "NO",
                }
            )
        verdict = "passed" if found.ok else "FAILED"
        print(f"{name}: {verdict}, {time.process_time() - start:.0f} CPU s", flush=True)
        print(found, flush=True)
    common.report("calibration_sbc", rows, **vars(options))


# -- coverage ---------------------------------------------------------------------------------------------------------

SIZE = 60
SCALES = np.array([30.0, 20.0, 12.0])


def field_problem(values: Array) -> Problem:
    """Sixty points, sixty times, an intercept in each cell, default priors; both axes from -5 to 5."""
    axis = np.linspace(-5, 5, SIZE)
    grid = np.linspace(1, 5, 24).tolist()
    return make_problem(
        xr.DataArray(values, dims=("cell", "time"), coords={"cell": axis, "time": axis}),
        rank=RANK,
        kernel_time="matern72",
        length_scales_space=grid,
        length_scales_time=grid,
        area_weights=False,
    )


def _signed(frames: Array, others: Array, reference: tuple[Array, Array]) -> tuple[Array, Array]:
    """Frames (..., n, k) and (..., m, k) with the signs that data give them."""
    sign = np.einsum("...nk,nk->...k", frames, reference[0]) + np.einsum("...mk,mk->...k", others, reference[1])
    sign = np.where(sign < 0, -1.0, 1.0)[..., None, :]
    return frames * sign, others * sign


def cover_one(template: Problem, prior: str, snr: float, missing: float, sweeps: int, burn: int, seed: int) -> Any:
    """Coverage of each parameter and ratios of errors in one simulated field."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    data: MatrixData = template.args[0]
    frames, scales = [], []
    for side in (data.space, data.time):
        index = rng.integers(0, len(side.length_scales), RANK)
        own = torch.full((RANK, len(side.length_scales)), -np.inf, dtype=torch.float64)
        own[np.arange(RANK), index] = 0.0
        frames.append((side.basis @ frame_prior(side._replace(log_weights=own), prior).sample()).numpy())
        scales.append(side.length_scales[index].numpy())
    d = SCALES * (1 + 0.1 * rng.standard_normal(RANK))
    order = np.argsort(-d)
    d = d[order]
    (u, v), scales = (f[:, order] for f in frames), [s[order] for s in scales]
    signal = (u * d) @ v.T
    sigma = float(np.sqrt(signal.var() / snr))
    values = signal + sigma * rng.standard_normal(signal.shape) + 3.0 * rng.standard_normal((SIZE, 1))
    if missing:
        values[holes(rng, values.shape, missing, 3)] = np.nan

    made = field_problem(values)
    kernel = BlockGibbs(made)
    kernel.seed(seed)
    kernel.setup(burn)
    params = kernel.initial_params
    kept: list[dict[str, torch.Tensor]] = []
    for step in range(sweeps):
        params = kernel.sample(params)
        if step >= burn:
            kept.append(params)
    draws = {name: torch.stack([one[name] for one in kept]).numpy() for name in kept[0]}
    basis = [side.basis.numpy() for side in made.args[0][3:5]]
    order = np.argsort(-draws["d"], axis=1)
    labelled = {
        name: np.take_along_axis(x, order if x.ndim == 2 else order[:, None], -1)
        for name, x in draws.items()
        if x.ndim > 1
    }
    filled = np.where(np.isnan(values), np.nanmean(values, 1, keepdims=True), values)
    left, size, right = np.linalg.svd(filled - filled.mean(1, keepdims=True), full_matrices=False)
    reference = left[:, :RANK], right[:RANK].T
    plain = (reference[0] * size[:RANK]) @ reference[1].T
    u, v = _signed(u, v, reference)
    us, vs = _signed(basis[0] @ labelled["U"], basis[1] @ labelled["V"], reference)

    def held(x: Array, truth: Array) -> float:
        low, high = np.quantile(x, [0.025, 0.975], axis=0)
        return float(((low < truth) & (truth < high)).mean())

    step = float(data.space.length_scales[1] - data.space.length_scales[0])

    def spread(x: Array) -> Array:  # a cell of the grid for each of its points, as the interval of a grid is too wide
        return x + step * (rng.random(x.shape) - 0.5)

    def error(x: Array, truth: Array) -> float:
        return float(np.sqrt(((x - truth) ** 2).mean()))

    mean_signal = np.einsum("snk,sk,smk->nm", us, labelled["d"], vs, optimize=True) / len(us)
    return {
        "U": held(us, u),
        "V": held(vs, v),
        "d": held(labelled["d"], d),
        "sigma^2": held(draws["sigma"] ** 2, np.asarray(sigma**2)),
        "length-scale of U": held(spread(labelled["length_scale_space"]), spread(scales[0])),
        "length-scale of V": held(spread(labelled["length_scale_time"]), spread(scales[1])),
        "RMSE of U": error(us.mean(0), u) / error(reference[0], u),
        "RMSE of V": error(vs.mean(0), v) / error(reference[1], v),
        "RMSE of signal": error(mean_signal, signal) / error(plain, signal),
    }


def run_coverage(options: argparse.Namespace) -> None:
    template = field_problem(np.random.default_rng(0).standard_normal((SIZE, SIZE)))
    rows = []
    for prior, generator in (("conditioned", "own prior"), ("projected", "paper's generator")):
        for snr in (10.0, 1.0):
            for missing in (0.0, 0.2):
                start = time.process_time()
                runs = [
                    cover_one(template, prior, snr, missing, options.sweeps, options.burn, options.seed + r)
                    for r in range(options.replicates)
                ]
                row: dict[str, Any] = {"frames": generator, "SNR": snr, "missing": missing}
                for name in runs[0]:
                    values = np.array([run[name] for run in runs])
                    error = values.std(ddof=1) / np.sqrt(len(values))
                    row[name] = (
                        f"{np.median(values):.2f}" if name.startswith("RMSE") else f"{values.mean():.3f} ± {error:.3f}"
                    )
                rows.append(row)
                print(common.table([row]), f"{time.process_time() - start:.0f} CPU s", flush=True)
    common.report("calibration_coverage", rows, **vars(options))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    ranks = commands.add_parser("sbc", help="simulation-based calibration")
    ranks.add_argument("--replicates", type=int, default=400)
    ranks.add_argument("--draws", type=int, default=79)
    ranks.add_argument("--burn", type=int, default=300)
    ranks.add_argument("--thin", type=int, default=20)
    ranks.add_argument("--only", nargs="+", choices=[*SETTINGS, *CONTROLS], help="some configurations; default all")
    shares = commands.add_parser("coverage", help="coverage and errors on larger fields")
    shares.add_argument("--replicates", type=int, default=100)
    shares.add_argument("--sweeps", type=int, default=1300)
    shares.add_argument("--burn", type=int, default=300)
    for one in (ranks, shares):
        one.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    run_sbc(options) if options.command == "sbc" else run_coverage(options)


if __name__ == "__main__":
    main()
