"""The models of the benchmarks against log densities written a second time in numpy, from their formulas."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
import xarray as xr
from numpy.typing import NDArray
from pyro import poutine
from scipy import integrate, stats
from torch.distributions import biject_to

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import peers
import reference as ref

Array = NDArray[np.float64]
Values = Mapping[str, Any]  # of the variables of the reference, vectors together
norm = stats.norm.logpdf
POINTS = 6


# -- the same posteriors once more ------------------------------------------------------------------------------------


def half_cauchy(x: float, scale: float) -> float:
    return stats.halfcauchy.logpdf(x, scale=scale)


def arK(d: Any, v: Values) -> float:
    lp = norm(v["alpha"], 0, 10) + norm(v["beta"], 0, 10).sum() + half_cauchy(v["sigma"], 2.5)
    for t in range(d["K"], d["T"]):
        mean = v["alpha"] + sum(v["beta"][k] * d["y"][t - k - 1] for k in range(d["K"]))
        lp += norm(d["y"][t], mean, v["sigma"])
    return lp


def arma(d: Any, v: Values) -> float:
    lp = norm(v["mu"], 0, 10) + norm([v["phi"], v["theta"]], 0, 2).sum() + half_cauchy(v["sigma"], 2.5)
    error = d["y"][0] - (v["mu"] + v["phi"] * v["mu"])
    lp += norm(error, 0, v["sigma"])
    for t in range(1, d["T"]):
        error = d["y"][t] - (v["mu"] + v["phi"] * d["y"][t - 1] + v["theta"] * error)
        lp += norm(error, 0, v["sigma"])
    return lp


def eight_schools(d: Any, v: Values) -> float:
    z = (v["theta"] - v["mu"]) / v["tau"]
    lp = norm(v["mu"], 0, 5) + half_cauchy(v["tau"], 5) + norm(z).sum()
    return lp + norm(d["y"], v["theta"], d["sigma"]).sum()


def garch(d: Any, v: Values) -> float:
    sigma = d["sigma1"]
    lp = norm(d["y"][0], v["mu"], sigma)
    for t in range(1, d["T"]):
        sigma = np.sqrt(v["alpha0"] + v["alpha1"] * (d["y"][t - 1] - v["mu"]) ** 2 + v["beta1"] * sigma**2)
        lp += norm(d["y"][t], v["mu"], sigma)
    return lp


def linear(d: Any, v: Values, response: Any, *columns: Any) -> float:
    """Log likelihood of a linear regression with an intercept, term by term."""
    mean = v["beta"][0] + sum(v["beta"][k + 1] * np.asarray(column) for k, column in enumerate(columns))
    return norm(np.asarray(response), mean, v["sigma"]).sum()


def earnings(*columns: Callable[[Any], Any], log: Any = np.log) -> Callable[[Any, Values], float]:
    return lambda d, v: linear(d, v, log(d["earn"]), *(column(d) for column in columns))


def height(d: Any) -> Array:
    return np.asarray(d["height"], dtype=float)


def male(d: Any) -> Array:
    return np.asarray(d["male"], dtype=float)


def z(d: Any) -> Array:
    return stats.zscore(height(d), ddof=1)


def kidiq(*columns: Callable[[Any], Any], cauchy: bool = True) -> Callable[[Any, Values], float]:
    def density(d: Any, v: Values) -> float:
        prior = half_cauchy(v["sigma"], 2.5) if cauchy else 0.0
        return prior + linear(d, v, d["kid_score"], *(column(d) for column in columns))

    return density


def school(d: Any, origin: float = 0.0) -> Array:
    return np.asarray(d["mom_hs"]) - origin


def iq(d: Any, origin: float = 0.0) -> Array:
    return np.asarray(d["mom_iq"]) - origin


def blr(d: Any, v: Values) -> float:
    lp = norm(v["beta"], 0, 10).sum() + stats.halfnorm.logpdf(v["sigma"], scale=10)
    return lp + norm(d["y"], np.asarray(d["X"]) @ v["beta"], v["sigma"]).sum()


def nes(d: Any, v: Values) -> float:
    lp = 0.0
    for row in range(d["N"]):
        ages = [float(d["age_discrete"][row] == group) for group in (2, 3, 4)]
        before, after = ("real_ideo", "race_adj"), ("educ1", "gender", "income")
        terms = [1.0, *(d[name][row] for name in before), *ages, *(d[name][row] for name in after)]
        lp += norm(d["partyid7"][row], np.dot(v["beta"], terms), v["sigma"])
    return lp


def absorption(d: Any, v: Values) -> float:
    def slope(t: float, c: Array) -> Array:
        return d["D"] * v["k_a"] / d["V"] * np.exp(-v["k_a"] * t) - v["V_m"] / d["V"] * c / (v["K_m"] + c)

    found = integrate.solve_ivp(slope, (0, d["times"][-1]), [0.0], "LSODA", d["times"], rtol=1e-10, atol=1e-12)
    lp = sum(half_cauchy(v[name], 1) for name in ("k_a", "K_m", "V_m", "sigma"))
    return lp + stats.lognorm.logpdf(d["C_hat"], v["sigma"], scale=found.y[0]).sum()


def centred(d: Any, v: Values) -> float:
    lp = norm(v["mu"], 0, 5) + half_cauchy(v["tau"], 5) + norm(v["theta"], v["mu"], v["tau"]).sum()
    return lp + norm(d["y"], v["theta"], d["sigma"]).sum()


def kilpisjarvi(d: Any, v: Values) -> float:
    lp = norm(v["alpha"], d["pmualpha"], d["psalpha"]) + norm(v["beta"], d["pmubeta"], d["psbeta"])
    return lp + norm(d["y"], v["alpha"] + v["beta"] * np.asarray(d["x"]), v["sigma"]).sum()


def mesquite(*columns: Callable[[Any], Any], log: Any = np.log) -> Callable[[Any, Values], float]:
    def density(d: Any, v: Values) -> float:
        arrays = {key: np.asarray(value) for key, value in d.items()}
        return linear(d, v, log(arrays["weight"]), *(column(arrays) for column in columns))

    return density


def volume(d: Any) -> Array:
    return np.log(d["diam1"] * d["diam2"] * d["canopy_height"])


def area(d: Any) -> Array:
    return np.log(d["diam1"] * d["diam2"])


def gp(d: Any, v: Values) -> float:
    x = np.asarray(d["x"])
    cov = v["alpha"] ** 2 * np.exp(-((x[:, None] - x) ** 2) / 2 / v["rho"] ** 2) + v["sigma"] * np.eye(d["N"])
    lp = stats.gamma.logpdf(v["rho"], 25, scale=1 / 4) + stats.halfnorm.logpdf(v["alpha"], scale=2)
    return lp + stats.halfnorm.logpdf(v["sigma"]) + stats.multivariate_normal.logpdf(d["y"], np.zeros(d["N"]), cov)


def mixture(d: Any, v: Values) -> float:
    parts = [np.log(w) + norm(d["y"], v["mu"][k], v["sigma"][k]) for k, w in enumerate((v["theta"], 1 - v["theta"]))]
    lp = norm(v["mu"], 0, 2).sum() + stats.halfnorm.logpdf(v["sigma"], scale=2).sum()
    return lp + stats.beta.logpdf(v["theta"], 5, 5) + np.logaddexp(*parts).sum()


def logistic(d: Any, v: Values) -> float:
    signs = 1 - 2 * d["y"]
    return norm(v["w"]).sum() - np.logaddexp(0, signs * (d["features"] @ v["w"])).sum()


def forward(transition: Array, emission: Array) -> float:
    """Log density of a hidden Markov model whose first state has no term, emission (time, state)."""
    log_alpha = emission[0]
    for term in emission[1:]:
        log_alpha = np.logaddexp.reduce(log_alpha[:, None] + np.log(transition), axis=0) + term
    return np.logaddexp.reduce(log_alpha)


def hmm(d: Any, v: Values) -> float:
    emission = norm(np.asarray(d["y"])[:, None], v["mu"], 1)
    return norm(v["mu"], [3, 10]).sum() + forward(np.array([v["theta1"], v["theta2"]]), emission)


def drives(d: Any, v: Values) -> float:
    lp = sum(stats.dirichlet.logpdf(v[f"theta{k}"], d["alpha"][k - 1]) for k in (1, 2))
    lp += norm(v["phi"], [0, 3]).sum() + norm(v["lambda"], [0, 3]).sum()
    u, w = np.asarray(d["u"])[:, None], np.asarray(d["v"])[:, None]
    emission = stats.expon.logpdf(u, scale=1 / v["phi"]) + stats.expon.logpdf(w, scale=1 / v["lambda"])
    return lp + forward(np.array([v["theta1"], v["theta2"]]), emission)


SIZES = ("diam1", "diam2", "canopy_height", "total_height", "density")
SECOND: dict[str, Callable[[Any, Values], float]] = {
    "arK-arK": arK,
    "arma-arma11": arma,
    "bball_drive_event_0-hmm_drive_0": drives,
    "earnings-log10earn_height": earnings(height, log=np.log10),
    "earnings-logearn_height": earnings(height),
    "earnings-logearn_height_male": earnings(height, male),
    "earnings-logearn_interaction_z": earnings(z, male, lambda d: z(d) * male(d)),
    "earnings-logearn_logheight_male": earnings(lambda d: np.log(height(d)), male),
    "eight_schools-eight_schools_centered": centred,
    "eight_schools-eight_schools_noncentered": eight_schools,
    "garch-garch11": garch,
    "gp_pois_regr-gp_regr": gp,
    "hmm_example-hmm_example": hmm,
    "kidiq-kidscore_interaction": kidiq(school, iq, lambda d: school(d) * iq(d)),
    "kidiq-kidscore_momhs": kidiq(school),
    "kidiq-kidscore_momhsiq": kidiq(school, iq),
    "kidiq-kidscore_momiq": kidiq(iq),
    "kidiq_with_mom_work-kidscore_interaction_c": kidiq(
        lambda d: school(d, school(d).mean()),
        lambda d: iq(d, iq(d).mean()),
        lambda d: school(d, school(d).mean()) * iq(d, iq(d).mean()),
        cauchy=False,
    ),
    "kidiq_with_mom_work-kidscore_interaction_c2": kidiq(
        lambda d: school(d, 0.5), lambda d: iq(d, 100), lambda d: school(d, 0.5) * iq(d, 100), cauchy=False
    ),
    "kilpisjarvi_mod-kilpisjarvi": kilpisjarvi,
    "low_dim_gauss_mix-low_dim_gauss_mix": mixture,
    "mesquite-logmesquite": mesquite(*(lambda d, k=k: np.log(d[k]) for k in SIZES), lambda d: d["group"]),
    "mesquite-logmesquite_logva": mesquite(volume, area, lambda d: d["group"]),
    "mesquite-logmesquite_logvash": mesquite(
        volume,
        area,
        lambda d: np.log(d["diam1"] / d["diam2"]),
        lambda d: np.log(d["total_height"]),
        lambda d: d["group"],
    ),
    "mesquite-logmesquite_logvolume": mesquite(volume),
    "mesquite-mesquite": mesquite(*(lambda d, k=k: d[k] for k in (*SIZES, "group")), log=np.asarray),
    **{f"nes{year}-nes": nes for year in (1972, 1976, 1980, 1984, 1988, 1996, 2000)},
    "one_comp_mm_elim_abs-one_comp_mm_elim_abs": absorption,
    "sblri-blr": blr,
}


# -- points -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=ref.NAMES)
def posterior(request: pytest.FixtureRequest, test_data: Callable[[str], Path]) -> ref.Reference:
    test_data(f"posteriordb/{request.param}.json")
    return ref.load(request.param)


@cache
def content(name: str) -> Any:
    return json.loads(ref.data_file(name).read_text())["data"]


def sites_of(trace: Any) -> list[str]:
    """Names of what a model samples, observes or computes by name; no factors, no plates."""
    nodes = trace.nodes.items()
    return [name for name, n in nodes if n["type"] == "sample" and type(n["fn"]).__name__ not in ("_Subsample", "Unit")]


def points(model: Callable[..., None], args: tuple[Any, ...], count: int, scale: float = 0.7) -> list[Any]:
    """Unconstrained points with the values of the sites there, deterministics included, and the log density."""
    trace: Any = poutine.trace(model).get_trace(*args)
    latent = [name for name in sites_of(trace) if not trace.nodes[name]["is_observed"]]
    maps = {name: biject_to(trace.nodes[name]["fn"].support) for name in latent}
    shapes = {name: maps[name].inv(trace.nodes[name]["value"]).shape for name in latent}
    generator = torch.Generator().manual_seed(1)
    out = []
    for _ in range(count):
        free = {
            name: (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()
            for name, shape in shapes.items()
        }
        values = {name: maps[name](z) for name, z in free.items()}
        trace = poutine.trace(poutine.condition(model, values)).get_trace(*args)
        sites = {name: trace.nodes[name]["value"].detach().numpy() for name in sites_of(trace)}
        out.append((free, sites, trace.log_prob_sum()))
    return out


@pytest.fixture(autouse=True)
def seeded() -> None:
    pyro.set_rng_seed(0)


def agree(found: list[Any], second: Callable[[Values], float], atol: float = 1e-8) -> None:
    """Log densities equal up to one constant, with finite gradients."""
    ours = np.array([lp.item() for _, _, lp in found])
    theirs = np.array([second(sites) for _, sites, _ in found])
    assert np.ptp(theirs) > 1  # the points tell models apart
    np.testing.assert_allclose(ours - ours[0], theirs - theirs[0], rtol=1e-9, atol=atol)
    for free, _, lp in found:
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(lp, list(free.values())))


# -- tests ------------------------------------------------------------------------------------------------------------


def test_log_density_is_that_of_the_formulas(posterior: ref.Reference) -> None:
    # The steps through the differential equation are for the posterior, where it is not stiff.
    scale, atol = (0.4, 5e-3) if posterior.model is ref.absorption else (0.7, 1e-8)
    found = points(posterior.model, posterior.args, POINTS, scale)
    agree(found, lambda sites: SECOND[posterior.name](content(posterior.name), sites), atol)


def test_problem_is_valid_picklable_and_in_double_precision(posterior: ref.Reference) -> None:
    problem = pickle.loads(pickle.dumps(posterior.problem)).validate()
    shapes = {name: problem.sites[name].shape for name in problem.names("latent", "deterministic")}
    for name in posterior.summary:
        site, _, index = name.partition("[")
        assert shapes[site] == () if not index else shapes[site][0] >= int(index[:-1])
    for name, _, lp in points(posterior.model, posterior.args, 1):
        assert lp.dtype == torch.float64, name


def iid(posterior: ref.Reference, shift: float) -> xr.Dataset:
    """Independent normal draws with the reference's means and sds, means off by ``shift`` sds.

    Without a variance, draws follow the quantiles instead: normals bent to go through them.
    """
    rng = np.random.default_rng(2)
    sites: dict[str, list[Array]] = {}
    for name, known in posterior.summary.items():
        normal = shift + rng.standard_normal((4, 1000))
        if name in posterior.heavy:
            low, middle, high = (np.log(known[key]) for key in ("q05", "q50", "q95"))
            draws = np.exp(middle + normal / 1.645 * np.where(normal < 0, middle - low, high - middle))
        else:
            draws = known["mean"] + known["sd"] * normal
        sites.setdefault(name.partition("[")[0], []).append(draws)
    scalar = {name for name in posterior.summary if "[" not in name}
    return xr.Dataset(
        {
            name: (("chain", "draw"), parts[0])
            if name in scalar
            else (("chain", "draw", f"{name}_dim"), np.stack(parts, -1))
            for name, parts in sites.items()
        }
    )


def test_check_accepts_draws_of_the_reference_and_refuses_shifted_ones(posterior: ref.Reference) -> None:
    good, bad = (ref.check(posterior, iid(posterior, shift)) for shift in (0.0, 0.2))
    assert [row["variable"] for row in good] == list(posterior.summary)
    assert max(row["z"] for row in good) < 4
    judged = [row for row in good if row["variable"] not in posterior.heavy]
    assert all(abs(row["sd_ratio"] - 1) < 0.06 for row in judged)  # 5 standard errors at 4000 draws
    assert all(abs(row["sd_ratio"] - 1) < 5 * row["sd_error"] for row in judged)
    assert all(0.5 < row["sd_error"] / np.sqrt(1 / 8000 + 1 / 20000) < 2 for row in judged)  # as of normals
    assert min(row["z"] for row in bad) > 5


QUICK = ("kidiq-kidscore_momiq", "mesquite-mesquite", "nes1980-nes", "sblri-blr")
DEAR = (  # 140 CPU seconds together: left to the benchmark
    "bball_drive_event_0-hmm_drive_0",
    "hmm_example-hmm_example",
    "low_dim_gauss_mix-low_dim_gauss_mix",
    "one_comp_mm_elim_abs-one_comp_mm_elim_abs",
)
FUNNEL = "eight_schools-eight_schools_centered"


@pytest.mark.parametrize("name", QUICK)
def test_vectorised_chains_meet_the_reference(name: str, test_data: Callable[[str], Path]) -> None:
    test_data(f"posteriordb/{name}.json")
    found = ref.measure(name, "chees", num_samples=250, seed=1)
    assert ref.within(found), found
    assert found["verdict"] == "passed", found["reasons"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ref.NAMES if name not in (*QUICK, *DEAR)])
def test_longer_chains_meet_the_reference_or_fail_their_verdict(name: str, test_data: Callable[[str], Path]) -> None:
    test_data(f"posteriordb/{name}.json")
    found = ref.measure(name, "chees", seed=0)
    if name == FUNNEL:  # no metric whitens it
        assert found["verdict"] == "failed"
        assert found["divergences"] > 0
    else:
        assert ref.within(found), found
        assert found["verdict"] == "passed", found["reasons"]


@pytest.mark.parametrize(
    ("name", "second"),
    [
        (
            "logistic",
            lambda d, v: norm(v["w"]).sum() - np.logaddexp(0, (1 - 2 * d["y"]) * (d["features"] @ v["w"])).sum(),
        ),
        ("gaussian", lambda d, v: -v["x"] @ d["precision"] @ v["x"] / 2),
        ("eight_schools", eight_schools),
    ],
)
def test_models_for_timing(name: str, second: Callable[[Any, Values], float]) -> None:
    problem = ref.speed_problem(name).validate()
    args = tuple(arg.double() for arg in problem.args)
    data = {key: value.astype(np.float32).astype(np.float64) for key, value in ref.speed_data(name).items()}
    agree(points(problem.model, args, POINTS), lambda sites: second(data, sites))


def test_linear_recursion_is_the_loop() -> None:
    inputs = torch.randn(13, dtype=torch.float64)
    x, wanted = 0.0, []
    for value in inputs.tolist():
        x = value - 0.8 * x
        wanted.append(x)
    found = ref.linear_recursion(inputs, torch.tensor(-0.8, dtype=torch.float64))
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12)


def test_unknown_names_and_absent_files_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="choose one of"):
        ref.load("arK")
    with pytest.raises(ValueError, match="choose one of"):
        ref.speed_problem("lr")
    monkeypatch.setenv("PROBMODELS_TEST_DATA", str(tmp_path))
    with pytest.raises(ref.ReferenceDataError, match="PROBMODELS_TEST_DATA"):
        ref.load(ref.NAMES[0])


@pytest.mark.slow
def test_a_peer_is_measured_in_a_process_of_its_own() -> None:
    out = peers.run_peer("pyro-eager", "gaussian", chains=2, warmup=3, draws=20, seed=1, max_tree_depth=2)
    assert (out["chains"], out["draws"], out["max_tree_depth"]) == (2, 20, 2)
    assert 0 < out["cpu_warmup"] + out["cpu_sample"] < out["cpu_total"] - out["cpu_import"] + 1e-3
    assert out["min_ess"] > 0
    with pytest.raises(peers.PeerError, match="no_such_argument"):
        peers.run_peer("pyro", "gaussian", chains=1, warmup=3, draws=6, seed=1, no_such_argument=2)
    with pytest.raises(ValueError, match="choose from"):
        peers.run_peer("pyro", "schools", chains=1, warmup=3, draws=6, seed=1)


def test_draws_of_all_peers_are_judged_alike() -> None:
    rng = np.random.default_rng(3)
    sites = {"mu": rng.standard_normal((4, 500)), "tau": rng.random((4, 500)), "z": rng.standard_normal((4, 500, 8))}
    draws = peers.stack(sites, "eight_schools")
    assert draws.shape == (4, 500, 10)
    np.testing.assert_array_equal(draws[..., 1], sites["tau"])
    ess, r_hat = peers.min_ess(draws)
    assert ess > 1400  # of 2000 independent draws
    assert r_hat < 1.02
    assert peers.min_ess(draws + np.arange(4)[:, None, None])[1] > 1.3
