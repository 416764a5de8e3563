"""Results: labelled draws in ArviZ's group layout, and the state of the guide that made them."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any

import cftime
import numpy as np
import pandas as pd
import xarray as xr
from torch import Tensor

from probmodels.datasets.calendars import decode_times
from probmodels.datasets.headers import check_declared_sizes, check_netcdf
from probmodels.errors import CheckpointError, ProbmodelsError, ResultError, SpecError
from probmodels.inference.diagnostics.findings import Report, label
from probmodels.inference.diagnostics.importance import RESAMPLED
from probmodels.inference.diagnostics.report import diagnose, summarize
from probmodels.inference.labels import group_of, read_json, to_dataset
from probmodels.inference.problem import Problem
from probmodels.inference.runtime.checkpoint import check_room
from probmodels.inference.runtime.ops import clean_attrs, versions, write_atomically
from probmodels.inference.runtime.packing import pack, unpack
from probmodels.methods import get_method, refuse_code
from probmodels.options import Draws, Fraction, Natural, OneOf, Seed, checked, hint, options_of

__all__ = ["Result", "build_tree", "changed_data", "check_target"]

_FORMAT = 1
_TREE, _GUIDE = "result.nc", "guide.safetensors"
ADDED = ("log_likelihood", "posterior_predictive", "prior", "prior_predictive")
_JSON: Mapping[str, Any] = {  # root attributes, and of what kind they are
    "options": {},
    "options_lost": [],
    "observed_by_model": [],
    "versions": {},
    "diagnosed": None,
    "rounded": [],
}
_SHOWN = 12  # variables that a result shows of itself
_ENTRIES = 4  # and of each of them
_SEARCHED = 10_000  # entries among which those that vary are looked for
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {  # of root attributes
    "method": ((str,), "the name of a method"),
    "engine": ((str,), "the name of an engine"),
    "created": ((str,), "a date"),
    "seed": ((int, np.integer), "a whole number"),
    "finite_support": ((int, np.integer), "0 or 1"),
    "guide_sha256": ((str,), "a checksum"),
}
_SUM = "guide_sha256"  # root attribute of the file: checksum of the guide beside it, empty where there is none
_TOLERANCE = 1e-5  # relative to the largest value, so that single precision does not count as other data


@dataclass
class Result:
    """Posterior draws and all that belongs to them.

    Attributes
    ----------
    tree
        Groups ``posterior``, ``marginals``, ``sample_stats``, ``invariants``, ``observed_data``, ``constant_data``,
        ``fit`` and those made on request; root attributes ``method``, ``engine``, ``seed``, ``spec``, ``versions``,
        ``created``.
    guide_state
        Parameters and buffers of model and guide; None where there is no guide.
    """

    tree: xr.DataTree
    guide_state: dict[str, Tensor] | None = None

    def __repr__(self) -> str:
        """Method, engine, draws, variables with their dims, groups; no verdict, which takes `diagnose`."""
        lines = [self._title]
        groups = self.tree.children
        if "posterior" in groups:
            posterior = self.posterior
            width = max((len(str(name)) for name in posterior.data_vars), default=0)
            shown = list(posterior.data_vars.items())[:_SHOWN]
            for name, values in shown:
                own = ", ".join(f"{dim} {size}" for dim, size in values.sizes.items() if dim not in ("chain", "draw"))
                lines.append(f"  {name:{width}}  {own or 'scalar'}")
            if len(posterior.data_vars) > _SHOWN:
                lines.append(f"  … and {len(posterior.data_vars) - _SHOWN} more")
        others = [name for name in groups if name != "posterior"]
        lines += [f"  groups: {', '.join(others)}"] if others else []
        lines += ["  guide: fitted, see params()"] if self.guide_state is not None else []
        return "\n".join([*lines, "  verdict: not computed, see diagnose()"])

    def _repr_html_(self) -> str:
        from probmodels.inference.diagnostics import _html

        table, note = self.head(_SHOWN)
        return _html.block(self._title, _html.frame(table), _html.text(note), self.tree._repr_html_())

    @checked(ResultError)
    def head(self, most: Natural | None = None) -> tuple[pd.DataFrame, str]:
        """Summary of scalars and of the first entries of arrays that vary, for a screen.

        Parameters
        ----------
        most
            Number of variables; None for all.

        Returns
        -------
        tuple
            A table as from `summary`, and a sentence on what it leaves out, which may be empty.
        """
        drawn = {
            name: values for name, values in self.group("posterior").items() if {"chain", "draw"} <= {*values.dims}
        }
        chosen, more = {}, [f"{len(drawn) - most} more variables"] if most is not None and len(drawn) > most else []
        for name, variable in list(drawn.items())[:most]:
            values = variable.transpose("chain", "draw", ...)
            draws: np.ndarray = values.values
            shown = list(islice(_moving(draws), _ENTRIES))
            for place in shown:
                chosen[label(name, values, place)] = (("chain", "draw"), draws[:, :, *place])
            if (left := values[0, 0].size - len(shown)) > 0:
                more.append(f"{left} more of {name}")
        return summarize(xr.Dataset(chosen)), f"… and {', '.join(more)}" if more else ""

    @property
    def _title(self) -> str:
        attrs = self.tree.attrs
        sizes = self.group("posterior").sizes
        draws = f", {sizes.get('chain', 1)} × {sizes['draw']} draws" if "draw" in sizes else ""
        return f"Result of {attrs.get('method', 'a method')} by {attrs.get('engine', 'an engine')}{draws}"

    @property
    def _diagnosed(self) -> list[str]:
        """Names of the posterior variables that diagnostics judge."""
        chosen = read_json(self.tree.attrs, "diagnosed", None)
        return list(self) if chosen is None else [str(name) for name in chosen]

    @property
    def posterior(self) -> xr.Dataset:
        """Posterior draws, dims (chain, draw, ...)."""
        if "posterior" not in self.tree.children:
            raise ResultError(f"the result has no group 'posterior'; it has {list(self.tree.children)}")
        return self.group("posterior")

    def __getitem__(self, name: str) -> xr.DataArray:
        """Draws of a posterior variable, dims (chain, draw, ...)."""
        posterior = self.group("posterior")
        if name not in [*posterior.data_vars]:  # a list, since what is given may have no hash
            raise ResultError(f"the posterior has no {name!r}{hint(name, posterior.data_vars)}")
        return posterior[name]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self.group("posterior").data_vars

    def __iter__(self) -> Iterator[str]:
        return (str(name) for name in self.group("posterior").data_vars)

    @property
    def sample_stats(self) -> xr.Dataset:
        """Statistics of the draws, dims (chain, draw, ...), such as ``diverging`` or ``log_weight``."""
        return self.group("sample_stats")

    @checked(ResultError)
    def group(self, name: str) -> xr.Dataset:
        """A group of the tree by name; an empty dataset where the result has none."""
        return group_of(self.tree, name)

    def rebuild(self) -> Problem:
        """The problem that the result came from, made again from the data and options that the result keeps.

        It has the guide of the method. Where another was fitted, give it that one again:
        ``with_guide(result.rebuild(), "low_rank")``.

        Raises
        ------
        ResultError
            If the problem was built by hand, its options cannot be kept in a file, or the method refuses them.
        """
        attrs = {**self.group("observed_data").attrs, **self.tree.attrs}  # older files have options beside the data
        written = read_json(attrs, "spec", {}).get("method")
        name = written if isinstance(written, str) and "." in written else str(attrs.get("method"))  # a dotted path
        try:
            refuse_code(name)
            make_problem = get_method(name).make_problem
        except SpecError as error:
            raise ResultError(
                f"give the problem itself, since {name!r} is no registered method: it was built by hand, or the "
                f"package of the method is not installed ({error})"
            ) from error
        if "options" not in attrs:
            raise ResultError(f"the result keeps no options of {name}; make the problem again with make_problem")
        if lost := read_json(attrs, "options_lost", []):
            raise ResultError(
                f"the options {', '.join(lost)} of {name} are objects that no file holds; make the problem again with "
                "make_problem"
            )
        options = read_json(attrs, "options", {})
        observed = self.group("observed_data")
        computed = read_json(attrs, "observed_by_model", [])
        data = [observed[[x for x in observed.data_vars if x not in computed]], self.group("constant_data")]
        lacking = [option.name for option in options_of(make_problem, skip=1).values() if option.required]
        if lacking := [option for option in lacking if option not in options]:
            raise ResultError(f"the result keeps no {', '.join(lacking)} of {name}; make the problem again")
        try:
            merged = xr.merge([part for part in data if part.variables], join="exact", compat="equals")
            problem: Problem = make_problem(merged, **options)
        except (ProbmodelsError, xr.MergeError) as error:
            raise ResultError(f"the problem of this result of {name} cannot be made again: {error}") from error
        return problem

    def check_problem(self, problem: Problem, *, data: bool = True) -> None:
        """Check that a problem is the one that the result came from.

        Parameters
        ----------
        problem
            The problem.
        data
            Whether it has to hold the same data.

        Raises
        ------
        ResultError
            If it has another name than the method of the result, or holds other data.
        """
        method = self.tree.attrs.get("method", problem.name)  # which results made by hand may lack
        if method != problem.name:
            raise ResultError(
                f"the result is of {method!r}, not of {problem.name!r}; give the problem that it came from"
            )
        if data and (changed := changed_data(self.tree, problem)):
            raise ResultError(
                f"{problem.name}: the problem holds other data than the result was inferred from: {', '.join(changed)} "
                "differ; give the problem of the same data (predict takes new data)"
            )

    def params(self) -> dict[str, Tensor]:
        """Fitted parameters of model and guide by name, constrained; empty for MCMC."""
        state = self.guide_state or {}
        raw = {k.removeprefix("param/"): v for k, v in state.items() if k.startswith("param/")}
        return raw | {k.removeprefix("constrained/"): v for k, v in state.items() if k.startswith("constrained/")}

    @checked(ResultError)
    def summary(self, var_names: str | Sequence[str] | None = None, *, ci_prob: Fraction = 0.94) -> pd.DataFrame:
        """Mean, sd, highest-density interval, ess, r_hat and Monte Carlo error of every entry of the posterior.

        Parameters
        ----------
        var_names
            Posterior variables; None for those that diagnostics judge.
        ci_prob
            Probability of the interval.
        """
        names = [var_names] if isinstance(var_names, str) else var_names
        names = self._diagnosed if names is None else list(names)
        lost = [name for name in names if name not in self.posterior]
        if lost:
            raise ResultError(f"the posterior has no {lost}; it has {list(self.posterior.data_vars)}")
        return summarize(self.posterior[names], ci_prob=ci_prob)

    def diagnose(self, **limits: Any) -> Report:
        """Verdict on the draws; see `probmodels.inference.diagnostics.report.diagnose`."""
        return diagnose(self, **limits)

    def to_arviz(self) -> Any:
        """What ArviZ takes: an ``InferenceData`` for arviz 0.23, the tree itself for arviz 1.x.

        Fill groups that its functions need with `add`::

            idata = result.add("log_likelihood", problem).add("posterior_predictive", problem).to_arviz()
            az.loo(idata)
            az.plot_ppc(idata)
        """
        from probmodels.inference.diagnostics._arviz import to_arviz

        return to_arviz(self.tree)

    @checked(ResultError)
    def add(
        self,
        name: Annotated[str, OneOf(ADDED)],
        problem: Problem | None = None,
        *,
        num_samples: Draws | None = None,
        seed: Seed = 0,
    ) -> Result:
        """A result with one more group, under ArviZ's name; this one stays as it is.

        Parameters
        ----------
        name
            ``"log_likelihood"``: log density of every observation at every draw. ``"posterior_predictive"``: new values
            of the observed sites, one for each draw. ``"prior"`` or ``"prior_predictive"``: draws of the prior, of
            which the observed sites are in ``prior_predictive`` and all others in ``prior``; both groups are added.
        problem
            The problem that was inferred; None to make it again by `rebuild`.
        num_samples
            Number of draws over all chains, evenly spaced among those of the posterior; None for all of them. Of the
            prior: number of draws, 500 for None.
        seed
            Seed of the new values.

        Returns
        -------
        Result
            Shares the draws with this one; it replaces a group of that name.

        Raises
        ------
        ResultError
            If the problem cannot be made again, is another than the one that was inferred, or has other parameters than
            the result.
        ProblemError
            If the posterior does not fit the problem, it observes nothing, or observations have no likelihood each.
        """
        from probmodels.inference import predictive
        from probmodels.inference.programs.programs import with_parameters

        problem = self.rebuild() if problem is None else problem
        self.check_problem(problem, data=name in ("log_likelihood", "posterior_predictive"))
        posterior = predictive.thin(self.posterior, num_samples)
        with with_parameters(problem, self.guide_state) as trained:
            if name == "log_likelihood":
                groups = {name: predictive.log_likelihood(trained, posterior)}
            elif name == "posterior_predictive":
                if self.guide_state is not None and set(problem.transient) & set(problem.names("latent")):
                    groups = {name: self.predict(problem, num_samples=num_samples, seed=seed)}
                else:
                    groups = {name: predictive.posterior_predictive(trained, posterior, seed=seed)}
            else:
                count = 500 if num_samples is None else num_samples
                drawn = predictive.prior_predictive(trained, num_samples=count, seed=seed)
                observed = problem.names("observed")
                groups = {"prior": drawn.drop_vars(observed), "prior_predictive": drawn[observed]}
                groups = {key: group for key, group in groups.items() if group.data_vars}
        tree = self.tree.copy()
        for key, dataset in groups.items():
            tree[key] = xr.DataTree(dataset)
        return replace(self, tree=tree)

    @checked(ResultError)
    def predict(
        self, problem: Problem | None = None, *, num_samples: Draws | None = None, seed: Seed = 0
    ) -> xr.Dataset:
        """New values of the observed sites, dims (chain, draw, ...).

        With a fitted guide, latent sites are drawn from the guide given the arguments of ``problem``, so that new data
        may have other sizes; otherwise, and for draws of `importance_resample`, the posterior draws are used.

        Parameters
        ----------
        problem
            The problem that was inferred, or one with new data; None to make the former again by `rebuild`.
        num_samples
            Number of draws over all chains; None for as many as the posterior has.
        seed
            Seed of the new values.

        Raises
        ------
        ResultError
            If the problem cannot be made again, is of another method, or has other parameters than the result.
        ProblemError
            If the problem observes nothing, or the posterior does not fit it.
        """
        from probmodels.inference import predictive
        from probmodels.inference.programs.programs import fitted, sample_guide, with_parameters

        problem = self.rebuild() if problem is None else problem
        self.check_problem(problem, data=False)
        predictive.check_observed(problem)
        posterior = self.posterior
        if self.guide_state is not None and RESAMPLED not in self.tree.attrs:
            count = num_samples if num_samples is not None else posterior.sizes["draw"]
            with fitted(problem, self.guide_state, seed=seed) as (model, guide):
                draws, _ = sample_guide(problem, model, guide, num_samples=count, predict=True)
            observed = {name: draws[name] for name in problem.names("observed")}
            return to_dataset(observed, problem.dims(), problem.coords)
        with with_parameters(problem, self.guide_state) as trained:
            return predictive.posterior_predictive(trained, predictive.thin(posterior, num_samples), seed=seed)

    @checked(ResultError)
    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write ``result.nc`` and, where there is a guide, ``guide.safetensors``.

        Draws of the variables that the problem names in ``rounded``, and of invariants, are rounded in the file by
        less than 1.5 % of their posterior standard deviation, and packed as whole numbers, which `load` unpacks; all
        others keep every digit.

        Parameters
        ----------
        folder
            Where to; made where it is missing.
        overwrite
            Whether to replace a result that lies there.

        Returns
        -------
        Path
            The folder.

        Raises
        ------
        ResultError
            If another result lies there and ``overwrite`` is False, or the folder cannot be written.
        """
        from safetensors.torch import save_file

        folder = check_target(folder, overwrite=overwrite)
        try:
            if self.guide_state is not None:
                state = {name: value.detach().cpu().contiguous().clone() for name, value in self.guide_state.items()}
                write_atomically(folder / _GUIDE, lambda file: save_file(state, str(file)))
            else:
                (folder / _GUIDE).unlink(missing_ok=True)
            tree = pack(self.tree, read_json(self.tree.attrs, "rounded", []))
            tree.attrs = clean_attrs({**self.tree.attrs, "probmodels_format": _FORMAT, _SUM: _checksum(folder)})
            write_atomically(folder / _TREE, lambda file: tree.to_netcdf(file, engine="netcdf4"))
        except OSError as error:
            raise ResultError(f"cannot write a result to {folder}: {error}; choose another folder") from error
        return folder

    @classmethod
    @checked(ResultError)
    def load(cls, folder: str | Path, problem: Problem | None = None) -> Result:
        """Read what `save` wrote.

        Parameters
        ----------
        folder
            The folder, or its ``result.nc``.
        problem
            Where given, the state of the guide is tried on it.

        Raises
        ------
        ResultError
            If there is no result, it is damaged, the guide that was saved with it is lost, or it belongs to another
            method than ``problem``.
        """
        path = Path(folder)
        path = path.parent if path.name == _TREE else path
        tree = _read_tree(path)
        _check_guide(path, tree.attrs.pop(_SUM, None))
        state = _read_state(path)
        result = cls(tree, state)
        if problem is not None:
            result.check_problem(problem, data=False)
            if state is not None:
                from probmodels.inference.programs.programs import fitted

                with fitted(problem, state, seed=0):
                    pass
        return result


def _read_tree(folder: Path) -> xr.DataTree:
    """The tree of a folder, checked for what every result has."""
    file = folder / _TREE
    if not file.exists():
        raise ResultError(f"no {_TREE} in {folder}; give the folder that Result.save wrote")
    try:
        check_netcdf(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", xr.SerializationWarning)  # of dates that are no nanoseconds
            with xr.open_datatree(file, engine="netcdf4") as opened:
                for node in opened.subtree:
                    check_declared_sizes(node.to_dataset(), file)
                tree = unpack(opened.load())
        for node in tree.subtree:
            dates = {name: _numpy_dates(x) for name, x in node.coords.items() if x.dtype == object and x.ndim == 1}
            node.coords.update({name: x for name, x in dates.items() if x is not None})
    except Exception as error:  # libraries raise whatever they like for a damaged file
        raise ResultError(f"{file} cannot be read ({error}); it is damaged, or no result of Result.save") from error
    try:
        written = int(tree.attrs.get("probmodels_format", 0))
    except (TypeError, ValueError):
        written = 0
    if written != _FORMAT:
        raise ResultError(f"{file} was not written by Result.save of this version (format {_FORMAT})")
    try:
        if "posterior" not in tree.children:
            raise ResultError(f"it has no group 'posterior', but {list(tree.children)}")
        for name, (kind, what) in _KINDS.items():  # results made by hand may lack them
            if not isinstance(tree.attrs.get(name, kind[0]()), kind):
                raise ResultError(f"its root attribute {name!r} has to be {what}, not {tree.attrs[name]!r:.60}")
        _check_draws(tree["posterior"].to_dataset())
        spec = read_json(tree.attrs, "spec", {})
        if not isinstance(output := spec.get("output", {}), dict) or not isinstance(output.get("path", ""), str):
            raise ResultError(f"its root attribute 'spec' has output = {output!r}, where a table with a path belongs")
        for name, default in _JSON.items():
            read_json(tree.attrs, name, default)
    except ResultError as error:
        raise ResultError(f"{file} is damaged: {error}; run the inference again") from error
    return tree


def _numpy_dates(values: xr.DataArray) -> xr.DataArray | None:
    """Dates in seconds where files gave objects, as outside of the years 1678 to 2261; None for other objects."""
    if not all(isinstance(value, cftime.datetime) for value in values.values.tolist()):
        return None
    return values.copy(data=decode_times(values.values, {}, where=str(values.name))[0])


def _check_draws(posterior: xr.Dataset) -> None:
    for name, values in posterior.data_vars.items():
        if not {"chain", "draw"} <= set(values.dims):
            raise ResultError(f"posterior variable {name!r} has dims {values.dims}, without 'chain' and 'draw'")
        if values.dtype.kind not in "biuf":
            raise ResultError(f"posterior variable {name!r} holds no numbers, but {values.dtype}")
        if not values.sizes["chain"] * values.sizes["draw"]:
            raise ResultError(f"posterior variable {name!r} has no draws")


def _checksum(folder: Path) -> str:
    """Checksum of the guide in a folder; empty where there is none."""
    file = folder / _GUIDE
    if not file.exists():
        return ""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_guide(folder: Path, expected: str | None) -> None:
    """Check that the guide in a folder is the one that was saved with the result; older files do not say which."""
    try:
        found = _checksum(folder)
    except OSError as error:
        raise ResultError(f"{folder / _GUIDE} cannot be read ({error}); run the inference again") from error
    if expected is None or found == expected:
        return
    if not found:
        raise ResultError(
            f"{folder} lacks {_GUIDE}, the fitted guide that was saved with {_TREE}; copy both files, or run the "
            "inference again"
        )
    raise ResultError(
        f"{folder / _GUIDE} is damaged or of another result: it is not the file that was saved with {_TREE}; copy both "
        "files, or run the inference again"
    )


def _read_state(folder: Path) -> dict[str, Tensor] | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / _GUIDE
    try:
        return load_file(str(file)) if file.exists() else None
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ResultError(f"{file} cannot be read ({error}); run the inference again") from error


def check_target(folder: str | Path, *, overwrite: bool = False) -> Path:
    """Check that a result can be saved, which is better known before a run than after it.

    Parameters
    ----------
    folder
        Where `Result.save` is to write; made where it is missing.
    overwrite
        Whether a result that lies there may be replaced.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ResultError
        If a result lies there and ``overwrite`` is False, or the folder cannot be written.
    """
    folder = Path(folder)
    if (folder / _TREE).exists() and not overwrite:
        raise ResultError(f"{folder} holds a result already; choose another folder or pass overwrite=True")
    try:
        check_room(folder, 0)
    except CheckpointError as error:
        raise ResultError(f"no result can be saved: {error}") from error
    return folder


def build_tree(
    problem: Problem,
    posterior: xr.Dataset,
    *,
    engine: str,
    seed: int,
    settings: Mapping[str, Any],
    groups: Mapping[str, xr.Dataset] | None = None,
) -> xr.DataTree:
    """Tree of a finished run: draws aligned, invariants computed, data and provenance beside them."""
    if problem.align is not None:
        posterior = problem.align(posterior)
    found: dict[str, xr.Dataset] = {"posterior": posterior, **(groups or {})}
    if problem.invariants is not None:
        found["invariants"] = problem.invariants(posterior)
    computed = _computed(problem)
    found |= _data_groups(problem, computed)
    tree = xr.DataTree.from_dict({f"/{name}": dataset for name, dataset in found.items()})
    tree.attrs = clean_attrs(
        {
            "method": problem.name,
            "engine": engine,
            "seed": seed,
            "spec": json.dumps({"method": problem.name, "inference": {"engine": engine, **settings}}, default=str),
            **_keep_options(problem.options),
            **({"observed_by_model": json.dumps(computed)} if computed else {}),
            "versions": json.dumps(versions()),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "finite_support": int(_is_finite(problem)),
            "diagnosed": json.dumps(list(problem.diagnosed) if problem.diagnosed is not None else None),
            **({"rounded": json.dumps(list(problem.rounded))} if problem.rounded else {}),
        }
    )
    return tree


def _moving(draws: np.ndarray) -> Iterator[Any]:
    """Places of the entries of draws (chain, draw, ...) that vary, among the first ones; all where none does."""
    places = islice(np.ndindex(draws.shape[2:]), _SEARCHED)
    moves = (place for place in places if (draws[:, :, *place] != draws[0, 0, *place]).any())
    first = next(moves, None)
    return np.ndindex(draws.shape[2:]) if first is None else chain([first], moves)


def changed_data(tree: xr.DataTree, problem: Problem) -> list[str]:
    """Variables of which a problem holds other data than the ones that a result was inferred from.

    Parameters
    ----------
    tree
        Tree of the result; without groups of data nothing can be compared.
    problem
        The problem.

    Returns
    -------
    list
        Names of observed and constant data whose sizes or values differ, and of observed sites that only one has.
    """
    found = _data_groups(problem, _computed(problem))
    changed = []
    for name in ("observed_data", "constant_data"):
        held, new = group_of(tree, name), found.get(name, xr.Dataset())
        if not held.variables:
            continue
        if name == "observed_data":
            changed += sorted(map(str, set(held.data_vars) ^ set(new.data_vars)))
        shared = [key for key in held.variables if key in new.variables]
        changed += [str(key) for key in shared if not _alike(held[key].values, new[key].values)]
    return list(dict.fromkeys(changed))


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays hold the same, up to single precision; arrays of objects that are no texts pass."""
    if one.shape != other.shape:
        return False
    if {one.dtype.kind, other.dtype.kind} <= set("biuf"):
        one, other = one.astype(np.float64), other.astype(np.float64)
        scale = np.abs(one[np.isfinite(one)]).max(initial=0.0)
        return np.allclose(other, one, rtol=_TOLERANCE, atol=_TOLERANCE * scale, equal_nan=True)
    if "O" in (one.dtype.kind, other.dtype.kind):
        return all(a == b for a, b in zip(one.ravel(), other.ravel(), strict=True) if isinstance(a, str))
    return bool(np.array_equal(one, other, equal_nan=one.dtype.kind in "mM" and other.dtype.kind in "mM"))


def _is_finite(problem: Problem) -> bool:
    """Whether what a guide draws has finitely many values, so that importance weights are bounded."""
    latent = [site for site in problem.sites.values() if site.kind == "latent" and not site.enumerated]
    return bool(latent) and all(site.finite for site in latent)


def _keep_options(options: Mapping[str, Any]) -> dict[str, str]:
    """Root attributes for the options of ``make_problem``: their JSON, and the names of those that have none."""
    kept, lost = {}, []
    for name, value in options.items():
        try:
            kept[name] = json.loads(json.dumps(value, default=_as_json))
        except TypeError:
            lost.append(name)
    return {"options": json.dumps(kept)} | ({"options_lost": json.dumps(lost)} if lost else {})


def _as_json(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def _computed(problem: Problem) -> list[str]:
    """Observed sites whose values the model makes of the data, and the data do not hold by that name."""
    held = set() if problem.data is None else set(problem.data.data_vars)
    return [name for name in problem.names("observed") if name not in held]


def _data_groups(problem: Problem, computed: Sequence[str]) -> dict[str, xr.Dataset]:
    observed = problem.names("observed")
    data = problem.data if problem.data is not None else xr.Dataset()
    seen = [str(name) for name in data.data_vars if name in observed]
    groups = {"observed_data": data[seen], "constant_data": data.drop_vars(seen)}
    if computed:
        values = problem.observed(computed)
        groups["observed_data"] = xr.merge(
            [groups["observed_data"], to_dataset(values, problem.dims(), problem.coords, ())], join="exact"
        )
    return {name: group for name, group in groups.items() if group.variables}
