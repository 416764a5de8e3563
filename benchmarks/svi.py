"""Gradient steps per CPU second of a variational autoencoder 64-128-8 on scikit-learn's digits, batches of 128.

The same networks, data and step sizes in each row; the raw loop and Pyro's `SVI` are written as their users would.
`fit_svi` is timed as it is called, from step to step, with its history, checks and progress; ``call`` counts the whole
call, captures and compilation included, and draws none. Repeats alternate between the rows, so that a busy machine
slows all of them; ratios are taken within a repeat. ``nats`` is the loss per image over the last steps, which shows
that all rows do the same work. The compiler starts from an empty cache in the first repeat; later ones find its files.
"""

from __future__ import annotations

import common  # isort: skip  (pins threads before numpy is loaded)

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.infer
import torch
from torch import Tensor, nn

from probmodels.inference import Problem, fit_svi

LATENT, HIDDEN, BATCH, LR = 8, 128, 128, 1e-3
_WARM = 50  # steps before the clock starts


def digits() -> Tensor:
    """Binary images (1797, 64)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SystemExit("this benchmark reads scikit-learn's digits: pip install scikit-learn") from error
    return (torch.tensor(load_digits().data / 16.0, dtype=torch.float32) > 0.5).float()


class VAE:
    """Networks and programs; ``pick`` says whether the plate picks the rows of a batch, or they come as the data."""

    def __init__(self, seed: int, *, pick: bool = False) -> None:
        self.pick = pick
        torch.manual_seed(seed)
        self.encoder = nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2 * LATENT))
        self.decoder = nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 64))

    def model(self, x: Tensor) -> None:
        """Images (row, 64) from standard normal codes."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("row", len(x)) as rows:
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(rows), LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x[rows] if self.pick else x)

    def guide(self, x: Tensor) -> None:
        """Codes from images."""
        pyro.module("encoder", self.encoder)
        with pyro.plate("row", len(x)) as rows:
            loc, log_scale = self.encoder(x[rows] if self.pick else x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def raw(fused: bool) -> Callable[..., Any]:
    """A loop in plain torch, with the divergence in closed form."""

    def run(x: Tensor, num_steps: int, seed: int, loss: str) -> dict[str, float]:
        vae = VAE(seed)
        parameters = [*vae.encoder.parameters(), *vae.decoder.parameters()]
        optimizer = torch.optim.Adam(parameters, LR, fused=fused)

        def step(rows: Tensor) -> float:
            optimizer.zero_grad()
            loc, log_scale = vae.encoder(rows).chunk(2, -1)
            scale = log_scale.exp()
            logits = vae.decoder(loc + scale * torch.randn_like(loc))
            fit = nn.functional.binary_cross_entropy_with_logits(logits, rows, reduction="sum")
            value = fit + 0.5 * (loc * loc + scale * scale - 1 - 2 * log_scale).sum()
            value.backward()
            optimizer.step()
            return value.item() / BATCH

        return loop(x, num_steps, seed, step)

    return run


def peer(validate: bool) -> Callable[..., Any]:
    """Pyro's `SVI` with its own optimiser."""

    def run(x: Tensor, num_steps: int, seed: int, loss: str) -> dict[str, float]:
        vae = VAE(seed)
        with pyro.get_param_store().scope(), pyro.validation_enabled(validate):
            optimizer = pyro.optim.Adam({"lr": LR})
            svi = pyro.infer.SVI(vae.model, vae.guide, optimizer, getattr(pyro.infer, loss)())
            return loop(x, num_steps, seed, lambda rows: svi.step(rows) / BATCH)

    return run


def loop(x: Tensor, num_steps: int, seed: int, step: Callable[[Tensor], float]) -> dict[str, float]:
    """Run a step over random batches."""
    began, start, losses = time.process_time(), 0.0, []
    for number, rows in zip(range(num_steps), batches(x, seed), strict=False):
        if number == _WARM:
            start = time.process_time()
        losses.append(step(rows))
    end = time.process_time()
    return {
        "steps": (num_steps - _WARM) / (end - start),
        "call": num_steps / (end - began),
        "nats": float(np.mean(losses[-200:])),
    }


def batches(x: Tensor, seed: int) -> Iterator[Tensor]:
    """Random rows."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(x), generator=generator)
        for start in range(0, len(x) - BATCH + 1, BATCH):
            yield x[order[start : start + BATCH]]


def ours(compile: str) -> Callable[..., Any]:
    """`fit_svi`, the clock read by a callback."""

    def run(x: Tensor, num_steps: int, seed: int, loss: str) -> dict[str, float]:
        vae = VAE(seed, pick=True)
        problem = Problem("vae", vae.model, vae.guide, (x,), batch_plates=("row",), loss=loss)
        clock = {}

        def read(step: Any) -> None:
            if step.number in (_WARM, num_steps):
                clock[step.number] = time.process_time()

        wall, began = time.perf_counter(), time.process_time()
        result = fit_svi(
            problem,
            num_steps=num_steps,
            lr=LR,
            batch_size=BATCH,
            num_samples=1,
            compile=compile,
            seed=seed,
            callbacks=[read],
            progress=False,
        )
        end, wall = time.process_time(), time.perf_counter() - wall
        if result.tree.attrs["execution"] != compile:
            raise SystemExit(f"asked for {compile}, ran {result.tree.attrs['execution']}")
        return {
            "steps": (num_steps - _WARM) / (clock[num_steps] - clock[_WARM]),
            "call": num_steps / (end - began),
            "nats": float(result.tree["fit"]["loss"][-200:].mean()) / len(x),
            "extra wall s": wall - float(result.tree["fit"]["seconds"].sum()),
        }

    return run


ROWS: dict[str, Callable[..., Any]] = {
    "raw torch": raw(fused=False),
    "raw torch, fused Adam": raw(fused=True),
    "Pyro SVI, defaults": peer(validate=True),
    "Pyro SVI, no validation": peer(validate=False),
    "fit_svi, eager": ours("eager"),
    "fit_svi, graph": ours("graph"),
    "fit_svi, inductor": ours("inductor"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--loss", default="TraceMeanField_ELBO", help="of Pyro and of ours; raw torch has the default one"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    options = parser.parse_args()
    x = digits()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in options.rows}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for repeat in range(options.repeats):
            for name in options.rows:
                found[name].append(ROWS[name](x, options.steps, options.seed + repeat, options.loss))

    def column(name: str, key: str) -> np.ndarray:
        return np.array([run[key] for run in found[name]])

    rows = []
    for name in options.rows:
        row = {"": name, "steps / CPU s": common.spread(column(name, "steps"))}
        for other in ("raw torch", "Pyro SVI, defaults"):
            if other in found:
                row[f"to {other}"] = common.spread(column(name, "steps") / column(other, "steps"))
                row[f"to {other}, call"] = common.spread(column(name, "call") / column(other, "call"))
        extra = f"{column(name, 'extra wall s')[0]:.1f}" if "extra wall s" in found[name][0] else ""
        rows.append({**row, "nats": f"{column(name, 'nats').mean():.2f}", "first call beyond steps, wall s": extra})
    common.report("svi", rows, steps=options.steps, repeats=options.repeats, loss=options.loss, seed=options.seed)


if __name__ == "__main__":
    main()
