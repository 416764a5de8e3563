"""Damage files and see that each is read whole or refused, by the project's own errors and in bounded time.

Usage: ``python benchmarks/fuzz_files.py [--count 10000] [--seed 0] [--kind fields|results]``. Good files, in the
classic formats of NetCDF and in NetCDF-4, are mutated and read in a worker of bounded address space: fields of 24
months by `load_sst`, results by `Result.load`. Mutations change bytes, numbers, blocks and lengths, half of the times
in the first two kilobytes. As NetCDF-4 has checksums that find nearly all of these, half of its files are changed
through the library instead: attributes of other types and texts, names, values, groups. Printed are counts by outcome,
and what must not be: foreign exceptions, hangs, crashes of libraries, and what was returned in part. "Unmade" are files
at which the library failed while it wrote. Exits with 1 if there is any that must not be.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

import netCDF4
import numpy as np
import xarray as xr

from probmodels import Result
from probmodels.datasets.sst import load_sst
from probmodels.errors import ProbmodelsError

_ROOM = 2 << 30  # bytes of address space that a worker may add
_PATIENCE = 20.0  # seconds for one file
_ATTRIBUTES = (
    *("units", "calendar", "bounds", "coordinates", "scale_factor", "add_offset", "valid_range", "valid_max"),
    *("missing_value", "standard_name", "axis", "flag_values", "grid_mapping", "climatology", "_Unsigned", "options"),
    *("spec", "diagnosed", "versions", "observed_by_model", "method", "probmodels_format", "mends"),
)
_BAD = ("foreign", "hang", "crash", "partial")


def field_files(folder: Path) -> list[bytes]:
    """Fields of 24 months, 5 by 7 cells, in all formats, plain and packed, with bounds and attributes."""
    rng = np.random.default_rng(0)
    months = np.arange(24)
    values = 15 + 5 * np.cos(months * np.pi / 6)[:, None, None] + rng.normal(size=(24, 5, 7))
    values[:, 0, :2] = np.nan
    coords = {
        "time": (np.datetime64("1990-01") + months).astype("datetime64[ns]"),
        "lat": ("lat", np.linspace(-20.0, 20.0, 5), {"units": "degrees_north", "standard_name": "latitude"}),
        "lon": ("lon", np.linspace(150.0, 210.0, 7), {"units": "degrees_east", "axis": "X"}),
    }
    attrs = {"units": "degC", "long_name": "sea surface temperature", "valid_range": np.array([-5.0, 45.0], "f4")}
    data = xr.Dataset({"sst": (("time", "lat", "lon"), values.astype("f4"), attrs)}, coords)
    data["time"].encoding = {"units": "days since 1800-01-01", "calendar": "standard", "dtype": "f8"}
    packed = {"dtype": "i2", "scale_factor": 0.01, "add_offset": 10.0, "_FillValue": np.int16(-32768)}
    files = []
    for name in ("NETCDF3_CLASSIC", "NETCDF3_64BIT", "NETCDF4", "NETCDF4_CLASSIC"):
        for encoding in ({}, packed) if name.startswith("NETCDF3") else ({}, {**packed, "zlib": True}):
            own = data.assign(sst=data["sst"].drop_attrs().assign_attrs(units="degC")) if encoding else data
            path = folder / "good.nc"
            own.to_netcdf(
                path, format=name, encoding={"sst": encoding}, unlimited_dims=["time"] if not encoding else []
            )
            files.append(path.read_bytes())
    with netCDF4.Dataset(folder / "good.nc", "w", format="NETCDF3_64BIT_DATA") as file:
        for key in ("time", "lat", "lon"):
            file.createDimension(key, data.sizes[key])
            file.createVariable(key, "f8", (key,))[:] = 30.4375 * months if key == "time" else data[key].values
            file[key].units = {"time": "days since 1990-01-01", "lat": "degrees_north", "lon": "degrees_east"}[key]
        file.createVariable("sst", "f4", ("time", "lat", "lon"))[:] = data["sst"].values
    return [*files, (folder / "good.nc").read_bytes()]


def result_files(folder: Path) -> list[bytes]:
    """Results of the usual groups."""
    rng = np.random.default_rng(0)
    draws = {"chain": range(2), "draw": range(10)}
    months = (np.datetime64("1990-01") + np.arange(24)).astype("datetime64[ns]")
    files = []
    for size in (3, 8):
        groups = {
            "posterior": xr.Dataset(
                {
                    "theta": (("chain", "draw", "school"), rng.normal(size=(2, 10, size))),
                    "tau": (("chain", "draw"), rng.gamma(2, size=(2, 10))),
                },
                {**draws, "school": [f"school {i}" for i in range(size)]},
            ),
            "sample_stats": xr.Dataset({"diverging": (("chain", "draw"), np.zeros((2, 10), bool))}, draws),
            "observed_data": xr.Dataset({"y": (("time",), rng.normal(size=24))}, {"time": months}),
        }
        tree = xr.DataTree.from_dict({f"/{name}": group for name, group in groups.items()})
        tree.attrs = {
            "method": "schools",
            "engine": "mcmc",
            "seed": 0,
            "created": "2026-01-01",
            "diagnosed": '["theta"]',
        }
        tree.attrs |= {"spec": json.dumps({"method": "schools", "inference": {"engine": "mcmc"}}), "versions": "{}"}
        Result(tree).save(folder / f"good-{size}")
        files.append((folder / f"good-{size}" / "result.nc").read_bytes())
    return files


def mutate(good: bytes, rng: np.random.Generator) -> bytes:
    """A damaged copy."""
    data = bytearray(good)
    for _ in range(int(rng.integers(1, 5))):
        reach = min(len(data), 2048) if rng.random() < 0.5 else len(data)
        at = int(rng.integers(max(reach - 8, 1)))
        kind = int(rng.integers(8))
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[at] = int(rng.integers(256))
        elif kind == 2:  # a number, small or huge
            value = int(rng.choice([0, 1, 2, 255, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1]))
            data[at : at + 4] = value.to_bytes(4, "big" if data[:3] == b"CDF" else "little")
        elif kind == 3:
            data[at : at + 8] = bytes([int(rng.choice([0, 127, 255]))]) * 8
        elif kind == 4:
            data[at : at + 8] = np.float64(rng.choice([np.nan, np.inf, 1e300, -1.0, 1e20])).tobytes()
        elif kind == 5:  # a block moved elsewhere
            start, length = int(rng.integers(len(data))), int(rng.integers(1, 64))
            data[at : at + length] = data[start : start + length]
        elif kind == 6:  # a letter
            letters = [i for i in range(at, min(at + 64, len(data))) if 65 <= data[i] < 123]
            for i in letters[:1]:
                data[i] = int(rng.integers(32, 127))
        elif rng.random() < 0.3:
            del data[int(rng.integers(1, len(data))) :]
        else:
            del data[at : at + int(rng.integers(1, 9))]
    return bytes(data)


def rewrite(path: Path, rng: np.random.Generator) -> None:
    """Change a NetCDF-4 file through the library, so that its checksums are right."""
    with netCDF4.Dataset(path, "a") as file:
        for _ in range(int(rng.integers(1, 4))):
            groups = [file, *file.groups.values()]
            group = groups[int(rng.integers(len(groups)))]
            variables = list(group.variables.values())
            holder = variables[int(rng.integers(len(variables)))] if variables and rng.random() < 0.7 else group
            with contextlib.suppress(Exception):  # what the library does not let one write
                _change(file, group, holder, rng)


def _change(file: netCDF4.Dataset, group: Any, holder: Any, rng: np.random.Generator) -> None:
    names = holder.ncattrs()
    name = names[int(rng.integers(len(names)))] if names and rng.random() < 0.7 else str(rng.choice(_ATTRIBUTES))
    kind = int(rng.integers(6))
    if kind == 0 and names:
        holder.delncattr(name)
    elif kind == 1:
        choices: list[Any] = [
            "",
            "nan",
            "{}",
            "[1]",
            "null",
            5,
            -1.5,
            np.nan,
            [1.0, 2.0],
            np.int8(3),
            ["a", "b"],
            "é" * 300,
        ]
        holder.setncattr(name, choices[int(rng.integers(len(choices)))])
    elif kind == 2 and isinstance(found := getattr(holder, name, None), str) and found:
        at = int(rng.integers(len(found)))
        holder.setncattr(name, found[:at] + chr(int(rng.integers(32, 127))) + found[at + int(rng.integers(2)) :])
    elif kind == 3:
        old = list(group.variables) if rng.random() < 0.6 else list(group.dimensions)
        rename = group.renameVariable if old and old[0] in group.variables else group.renameDimension
        rename(old[int(rng.integers(len(old)))], str(rng.choice(["x", "chain", "time", "lat", "draw", "a b"])))
    elif kind == 4 and holder is group and group is not file:
        file.renameGroup(group.name, str(rng.choice(["posterior", "prior", "x"])))
    elif holder is not group and holder.size and holder.dtype != str:
        flat = np.asarray(holder[:]).ravel()
        flat[int(rng.integers(flat.size))] = (
            rng.choice([np.nan, np.inf, 0.0, -1.0, 1e20]) if flat.dtype.kind == "f" else 0
        )
        holder[:] = flat.reshape(holder.shape)


def read_field(folder: Path) -> str:
    """What is wrong with the field of a file, which is nothing where it has the form that is promised."""
    field = load_sst(folder / "result.nc")
    good = field.dims == ("time", "lat", "lon") and field.dtype == np.float64 and field.sizes["time"] >= 10
    good &= bool(field["ocean"].any()) and bool(np.isfinite(field.values[:, field["ocean"].values]).any(axis=0).all())
    good &= not np.isinf(field.values).any() and isinstance(json.loads(field.attrs["mends"]), list)
    for name in ("time", "lat", "lon"):
        good &= bool((np.diff(field[name].values.astype(float)) > 0).all())
    return "" if good else f"a field {dict(field.sizes)} of another form"


def read_result(folder: Path) -> str:
    """What is wrong with the result of a file."""
    posterior = Result.load(folder).posterior
    good = all({"chain", "draw"} <= set(v.dims) and v.values.size for v in posterior.data_vars.values())
    return "" if good else "a posterior without draws"


READERS: dict[str, tuple[Callable[[Path], list[bytes]], Callable[[Path], str]]] = {
    "fields": (field_files, read_field),
    "results": (result_files, read_result),
}


def make(seed: int, goods: Sequence[bytes], folder: Path, line: Connection) -> None:
    """Write the damaged files of the indices that come in, and answer with their folders.

    In a process apart from the reader's, since the library is not safe when it renames.
    """
    silence()
    while (index := line.recv()) is not None:
        rng = np.random.default_rng((seed, index))
        good, own = goods[index % len(goods)], folder / str(index)  # the library knows open files by their place
        own.mkdir()
        path = own / "result.nc"
        if good[:3] != b"CDF" and rng.random() < 0.5:
            path.write_bytes(good)
            with contextlib.suppress(Exception):
                rewrite(path, rng)
        else:
            path.write_bytes(mutate(good, rng))
        line.send(own)


def work(kind: str, line: Connection) -> None:
    """Read the files of the folders that come in, and answer with the outcome of each and the most memory, in kB."""
    with Path("/proc/self/statm").open() as stream:
        held = int(stream.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + _ROOM, held + _ROOM))
    silence()
    while (own := line.recv()) is not None:
        try:
            wrong = READERS[kind][1](own)
            outcome = ("partial", wrong) if wrong else ("read", "")
        except ProbmodelsError as error:
            outcome = (type(error).__name__, str(error))
        except BaseException as error:
            outcome = ("foreign", f"{type(error).__name__}: {error}")
        shutil.rmtree(own)
        line.send((*outcome, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


def silence() -> None:
    """Nothing of what libraries print and warn of."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    warnings.simplefilter("ignore")


class Worker:
    """A process that answers to what it is sent, begun anew after it has died or not answered in time."""

    def __init__(self, target: Callable[..., None], *args: Any) -> None:
        self.target, self.args = target, args
        self.process: Any = None

    def ask(self, question: Any) -> Any:
        """The answer; "hang" or "crash" where there is none."""
        if self.process is None:
            context = multiprocessing.get_context("fork")
            self.line, far = context.Pipe()
            self.process = context.Process(target=self.target, args=(*self.args, far), daemon=True)
            self.process.start()
            far.close()
        self.line.send(question)
        try:
            if self.line.poll(_PATIENCE):
                return self.line.recv()
            answer = "hang"
        except EOFError:
            answer = "crash"
        self.end()
        return answer

    def end(self) -> None:
        """Kill the process."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
        self.process = None


def fuzz(kind: str, count: int, seed: int) -> tuple[dict[str, int], list[str], float]:
    """Counts by outcome, a line on each of those that must not be, and the most memory of a reader in MB."""
    found: collections.Counter[str] = collections.Counter()
    said: list[str] = []
    most = 0.0
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        maker = Worker(make, seed, READERS[kind][0](folder), folder)
        reader = Worker(work, kind)
        for index in range(count):
            made = maker.ask(index)
            answer = reader.ask(made) if isinstance(made, Path) else ("unmade", "", 0.0)
            outcome, text, memory = (answer, "", 0.0) if isinstance(answer, str) else answer
            found[outcome] += 1
            most = max(most, memory / 1024)
            if outcome in _BAD:
                said.append(f"{kind} {index}: {outcome} {text}")
        maker.end()
        reader.end()
    return dict(found), said, most


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="files of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=list(READERS), action="append")
    options = parser.parse_args(arguments)
    bad = 0
    for kind in options.kind or READERS:
        began = time.monotonic()
        counts, said, most = fuzz(kind, options.count, options.seed)
        listed = ", ".join(f"{name} {number}" for name, number in sorted(counts.items()))
        print(f"{kind}: {listed}; at most {most:.0f} MB; {time.monotonic() - began:.0f} s", flush=True)
        print("".join(f"  {text[:300]}\n" for text in said[:40]), end="")
        bad += len(said)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
