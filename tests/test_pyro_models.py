"""Models of Pyro's tutorials and examples: which of them have a graph, and that it gives what Pyro gives."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer.mcmc.util import initialize_model
from pyro.ops.integrator import potential_grad
from pyro_models import MODELS

from probmodels import run_mcmc
from probmodels.errors import CaptureError
from probmodels.inference.programs.potential import Potential
from probmodels.inference.runtime.ops import isolated, uniform_start

PAGE = Path(__file__).parents[1] / "docs" / "pyro_models.md"
CHAINS = 4
WITHOUT = [name for name, entry in MODELS.items() if entry.reason]


@pytest.fixture(autouse=True)
def _quiet():
    """Neither parameters of other models nor warnings of theirs: some use what torch and Pyro call outdated."""
    with isolated(seed=0), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def places(potential, near):
    """Points (point, size) in [-1, 1], or closely about given values of sites."""
    generator = torch.Generator().manual_seed(1)
    noise = (2 * torch.rand(CHAINS, potential.size, generator=generator) - 1).to(potential.like)
    if not near:
        return noise
    values = potential.constrain(torch.zeros_like(noise[0]))[0]
    values |= {site: torch.tensor(value).reshape(potential.problem.sites[site].shape) for site, value in near.items()}
    return potential.from_draw(values) + 0.1 * noise


def by_pyro(problem, potential, points):
    """Potentials (point,) and gradients (point, size) of Pyro's own HMC at ``points`` (point, size)."""
    model = poutine.reparam(problem.model, dict(problem.reparam))
    rows = [
        {name: z[slot.start : slot.stop].reshape(slot.shape) for name, slot in potential.slots.items()} for z in points
    ]
    options = {"init_strategy": uniform_start, "initial_params": rows[0], "max_plate_nesting": 3}
    _, function, _, _ = initialize_model(model, problem.args, problem.kwargs, **options)
    with pyro.validation_enabled(False):
        found = [potential_grad(function, row) for row in rows]
    gradients = [torch.cat([gradient[name].reshape(-1) for name in potential.slots]) for gradient, _ in found]
    return torch.stack([value for _, value in found]), torch.stack(gradients)


@pytest.mark.parametrize("name", MODELS)
def test_density_and_gradient_of_a_model_are_those_of_pyro(name):
    problem, reason = MODELS[name].make(), MODELS[name].reason
    potential = Potential(problem)
    points = places(potential, MODELS[name].near)
    if reason:
        with pytest.raises(CaptureError) as caught:
            potential.captured()
        assert all(part in str(caught.value) for part in reason)
        rows = [potential.evaluate(point) for point in points]
        values, gradients = (torch.stack(parts) for parts in zip(*rows, strict=True))
    else:
        with torch.no_grad():
            values, gradients = potential.batched(CHAINS)(points)
    wanted, slopes = by_pyro(problem, potential, points)
    assert torch.isfinite(wanted).all()
    assert torch.isfinite(slopes).all()
    # Single precision, of sums of up to some hundred terms.
    torch.testing.assert_close(values, wanted, rtol=1e-5, atol=1e-5 * max(1.0, float(wanted.abs().max())))
    torch.testing.assert_close(gradients, slopes, rtol=1e-4, atol=1e-5 * max(1.0, float(slopes.abs().max())))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "flow as a prior" else [pytest.mark.slow]) for name in WITHOUT]
)
def test_models_without_a_graph_fall_back_to_nuts_and_say_why(name):
    sizes = {"num_chains": 1, "warmup_steps": 0, "num_samples": 1}
    result = run_mcmc(MODELS[name].make(), progress=False, **sizes)
    what, code = MODELS[name].reason
    assert result.tree.attrs["kernel"] == "NUTSKernel"
    assert what in result.tree.attrs["fallback"]
    assert code in result.tree.attrs["fallback"]


def row(name):
    entry = MODELS[name]
    path, why = ("NUTS", "{}, at `{}`".format(*entry.reason)) if entry.reason else ("vectorised HMC", "")
    return " | ".join([f"| {name}", entry.follows, path, why]).rstrip() + " |"


def test_the_page_lists_the_models_as_they_are():
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if re.match(r"\| (?!model \||-)", line)]
    assert rows == [row(name) for name in MODELS]
