"""A problem: what to infer, as a Pyro program with its data, its guide and the names of its dimensions."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import pyro
import torch
import xarray as xr
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.infer.reparam.reparam import Reparam
from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from probmodels.errors import ProblemError
from probmodels.inference.runtime.netcdf import fault_of_labels, fault_of_name
from probmodels.inference.runtime.ops import is_enumerable, is_generated, is_improper, isolated, uniform_start
from probmodels.inference.runtime.tensors import with_tensors
from probmodels.options import hint

__all__ = ["Outer", "Problem", "Site", "fault_of_enumeration"]

_PRIOR_TRIES, _OTHER_TRIES = 10, 90  # draws of the prior, and of uniform starts, that may be impossible


@dataclass(frozen=True)
class Site:
    """What engines need to know about a sample site of the model.

    Attributes
    ----------
    kind
        ``latent``, ``generated`` (drawn from its conditional after inference), ``observed`` or ``deterministic``.
    dims
        One name per axis of the value.
    shape
        Shape of the value.
    discrete
        Whether it is a latent site of discrete support.
    enumerated
        Whether the model marks it ``infer={"enumerate": ...}``: losses sum over it, and guides leave it out.
    finite
        Whether it is a latent site of finitely many values.
    improper
        Whether it is a latent site of an improper prior, from which nothing can be drawn.
    """

    name: str
    kind: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    discrete: bool
    enumerated: bool = False
    finite: bool = False
    improper: bool = False


@dataclass(frozen=True)
class Outer:
    """What the hyperparameters of a problem are judged by, for `fit_bilevel`.

    Attributes
    ----------
    problem
        Has the parameters of the inner problem, by name, and other data or another loss; hyperparameters minimise it.
    hyper
        Parameters that are held while the inner problem is solved: name to the constraint that values are projected
        on, or None. A parameter that carries a constraint of its own needs none.
    stop
        Problem on data of its own whose observed sites judge a round for early stopping; None for the outer loss.
    """

    problem: Problem
    hyper: Mapping[str, Constraint | None]
    stop: Problem | None = None

    def problems(self) -> list[Problem]:
        """All problems that it holds."""
        return [self.problem, *([self.stop] if self.stop is not None else [])]

    def mapped(self, function: Callable[[Problem], Problem]) -> Outer:
        """The same with every problem changed alike."""
        return replace(self, problem=function(self.problem), stop=None if self.stop is None else function(self.stop))


@dataclass(frozen=True)
class Problem:
    """What to infer.

    Model sites marked ``infer={"generated": True}`` are leaves that enter no likelihood: engines hide them while
    fitting and draw them afterwards, once per posterior draw. ``infer={"event_dims": [...]}`` names the event axes
    of a site; plates name the rest.

    Attributes
    ----------
    name
        Name of the method.
    model
        Pyro program.
    guide
        Pyro program with the arguments of the model; None where only MCMC applies. Engines work on a copy.
    args, kwargs
        What model and guide receive.
    coords
        Dimension name to labels.
    data
        Labelled data: variables named as observed sites become group ``observed_data``, the rest ``constant_data``.
    batch_plates
        Plates that an engine may subsample.
    loss
        Name of an ELBO of ``pyro.infer`` or of an objective of `probmodels.inference.flows.balance`, or an ELBO.
    kernel
        Makes the method's own MCMC kernel from the problem, with ``num_chains`` where that moves all chains at once;
        module-level, so that it pickles.
    reparam
        Pyro reparametrisations used by gradient-based MCMC.
    align
        Maps posterior draws (chain, draw, ...) to draws with sign, order and rotation fixed.
    invariants
        Functions of the aligned draws that label switching and rotation leave alone; diagnosed beside them.
    diagnosed
        Posterior variables that diagnostics judge; None for all.
    transient
        Sites too large to keep draws of: results hold their mean and sd over draws, in group ``marginals``. With
        `run_mcmc`, deterministic or generated ones.
    rounded
        Large sites whose draws a saved result rounds, by less than 1.5 % of their posterior sd. What ties
        entries of a site together, as a sum of one, then holds to that error.
    outer
        Hyperparameters and what they are judged by; for `fit_bilevel`.
    options
        Options of the ``make_problem`` that made it, as they were given; kept with results.
    """

    name: str
    model: Callable[..., Any]
    guide: Callable[..., Any] | None = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    coords: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    data: xr.Dataset | None = None
    batch_plates: tuple[str, ...] = ()
    loss: str | ELBO = "Trace_ELBO"
    kernel: Callable[..., Any] | None = None
    reparam: Mapping[str, Reparam] = field(default_factory=dict)
    align: Callable[[xr.Dataset], xr.Dataset] | None = None
    invariants: Callable[[xr.Dataset], xr.Dataset] | None = None
    diagnosed: tuple[str, ...] | None = None
    transient: tuple[str, ...] = ()
    rounded: tuple[str, ...] = ()
    outer: Outer | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known: dict[str, tuple[type | tuple[type, ...], str]] = {
            "name": (str, "a text"),
            "args": ((tuple, list), "a tuple, as (y,) for one argument"),
            "kwargs": (Mapping, "a dict of arguments by name"),
            "coords": (Mapping, "a dict of labels by dim"),
            "data": ((xr.Dataset, type(None)), "an xarray.Dataset, or None"),
        }
        for key, (kind, said) in known.items():
            if not isinstance(value := getattr(self, key), kind):
                raise ProblemError(f"Problem {self.name!r}: {key} is a {type(value).__name__}; give {said}")
        for key in ("model", "guide"):
            if not callable(program := getattr(self, key)) and not (key == "guide" and program is None):
                raise ProblemError(f"Problem {self.name!r}: {key}={program!r} is no Pyro program; give a function")

    def __repr__(self) -> str:
        """Name, sites with their kind and dims, plates, guide and what engines are told; the data are left out."""
        rows = self._rows()
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
        lines = [f"  {name:{widths[0]}}  {kind:{widths[1]}}  {dims}" for name, kind, dims in rows]
        return "\n".join([f"Problem {self.name!r}", *lines, *(f"  {key}: {text}" for key, text in self._hints())])

    def _repr_html_(self) -> str:
        from probmodels.inference.diagnostics import _html

        rows = _html.rows(("site", "kind", "dims"), self._rows())
        return _html.block(f"Problem {self.name!r}", rows, _html.rows((), self._hints()))

    def _rows(self) -> list[tuple[str, str, str]]:
        """Name, kind, and dims with their sizes of every site; none where the model cannot be run."""
        try:
            sites = self.sites.values()
        except Exception:  # of any model, while it is being written
            return []
        kinds = {site.name: f"{'discrete ' if site.discrete else ''}{site.kind}" for site in sites}
        sizes = {s.name: ", ".join(f"{d} {n}" for d, n in zip(s.dims, s.shape, strict=True)) for s in sites}
        return [(name, kinds[name], sizes[name] or "scalar") for name in kinds]

    def _hints(self) -> list[tuple[str, str]]:
        """Plates, guide and what engines are told, in words."""
        try:
            with isolated(seed=0), torch.no_grad():
                nodes: Any = self._trace(self.model, "model").nodes.values()
            frames = {f.name: f.size for node in nodes for f in node.get("cond_indep_stack", ()) if f.vectorized}
            plates = ", ".join(f"{x} {n}{' (may be subsampled)' * (x in self.batch_plates)}" for x, n in frames.items())
        except Exception as error:
            return [("model", f"cannot be run: {error}")]
        guide = "none, for run_mcmc" if self.guide is None else _name_of(self.guide)
        told = {
            "plates": plates or "none",
            "guide": guide,
            "loss": self.loss if isinstance(self.loss, str) else type(self.loss).__name__,
            "kernel": _name_of(self.kernel) if self.kernel is not None else "",
            "reparametrised": ", ".join(self.reparam),
            "transient": ", ".join(self.transient),
            "rounded": ", ".join(self.rounded),
            "outer": self.outer.problem.name if self.outer is not None else "",
            "diagnosed": ", ".join(self.diagnosed or ()),
        }
        return [(key, text) for key, text in told.items() if text]

    @cached_property
    def sites(self) -> dict[str, Site]:
        """Sample sites of the model by name, in program order; factors and subsampling sites are left out."""
        with isolated(seed=0), torch.no_grad(), pyro.validation_enabled(False):
            nodes = self._trace(self.model, "model").nodes
        return {name: self._describe(name, node) for name, node in nodes.items() if _is_variable(node)}

    def dims(self) -> dict[str, list[str]]:
        """Names of the axes of every site, from its plates and its ``event_dims``."""
        return {name: list(site.dims) for name, site in self.sites.items()}

    def names(self, *kinds: str) -> list[str]:
        """Names of the sites of the given kinds, in program order."""
        return [name for name, site in self.sites.items() if site.kind in kinds]

    def check_proper(self) -> None:
        """Refuse to draw from the prior where there is none.

        Raises
        ------
        ProblemError
            If a site has an improper prior.
        """
        if flat := [site.name for site in self.sites.values() if site.improper]:
            raise ProblemError(
                f"{self.name}: sites {flat} have improper priors, which cannot be drawn; give them proper ones, or let "
                "chains start by init='pathfinder' or 'uniform'"
            )

    def observed(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Values of observed sites as the model holds them."""
        with isolated(seed=0), torch.no_grad(), pyro.validation_enabled(False):
            nodes: Any = self._trace(self.model, "model").nodes
        return {name: nodes[name]["value"].detach().cpu().numpy() for name in names}

    def programs(self, memo: dict[int, Any] | None = None) -> tuple[Callable[..., Any], Callable[..., Any] | None]:
        """Copies of model and guide that an engine may change; what they share stays shared.

        Parameters
        ----------
        memo
            Memo of earlier copies, as `copy.deepcopy` takes it, with which these shall share what the originals do.

        Raises
        ------
        ProblemError
            If a module cannot be copied, as a guide that has been called before.
        """
        modules = self.guide.modules() if isinstance(self.guide, nn.Module) else ()
        # Copying an AutoGuide empties its reference to the model, in the original as well as in the copy.
        links = [(module, module._model, module.master) for module in modules if isinstance(module, AutoGuide)]
        memo = {} if memo is None else memo
        try:
            copies = copy.deepcopy((self.model, self.guide), memo)
            for module, model, _ in links:
                memo[id(module)]._model = copy.deepcopy(model, memo)
            return copies
        except (RuntimeError, TypeError) as error:
            raise ProblemError(
                f"{self.name}: model or guide cannot be copied ({error}); give the problem a guide "
                "that has not been called yet, built from plain modules and tensors"
            ) from error
        finally:
            for module, model, master in links:
                module._model, module.master = model, master

    def validate(self, *, guide: bool = True, density: bool = True) -> Problem:
        """Check names, shapes and densities with one run of model and guide each.

        Parameters
        ----------
        guide
            Whether to check the guide as well; MCMC does without.
        density
            Whether the density must be finite somewhere among draws of the prior and uniform starts; engines that are
            told where to start do without.

        Returns
        -------
        Problem
            Itself.

        Raises
        ------
        ProblemError
            If guide and model do not fit, labels do not fit the shapes, a result could not be saved with the names and
            labels of the problem, a parameter of the guide carries the name of one of the model, or the log density is
            not finite.
        """
        self._check_names()
        self._check_labels()
        self._check_files()
        if guide and self.guide is not None:
            self._check_guide()
        elif density:
            self._check_prior()
        return self

    def to(self, device: str | torch.device) -> Problem:
        """The same problem with all tensors and modules that it reaches on ``device``; see `mapped`."""
        return self.mapped(lambda tensor: tensor.to(device))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Problem:
        """The same problem with every tensor replaced that programs, arguments, loss, kernel and outer problem reach.

        What shared a tensor or module does so afterwards; this problem is left as it is. ``align`` and ``invariants``
        stay as they are, since they take labelled arrays.
        """
        found = with_tensors(replace(self, align=None, invariants=None), change)
        return replace(found, align=self.align, invariants=self.invariants)

    def _trace(self, program: Callable[..., Any], role: str) -> Trace:
        try:
            return poutine.trace(program).get_trace(*self.args, **self.kwargs)
        except ProblemError:
            raise
        except Exception as error:
            if why := self._explain(program, error):
                raise ProblemError(f"{self.name}: {why.format(role=role)}") from error
            error.add_note(f"while running the {role} of problem {self.name!r}")
            raise

    def _explain(self, program: Callable[..., Any], error: Exception) -> str:
        """What an error of a program says about the problem; empty where it may be a fault inside of the program."""
        first = str(error).partition("\n")[0].replace("{", "{{").replace("}", "}}")
        if isinstance(error, ValueError):  # distributions refuse their arguments so; Pyro adds a table
            said = str(error).partition("Trace Shapes:")[0].strip().replace("{", "{{").replace("}", "}}")
            return f"running the {{role}} fails: {said}"
        if first.startswith("Multiple sample sites named"):
            what = f"{first[0].lower()}{first[1:]}; rename one: sites and plates need names of their own"
            return f"running the {{role}} fails: {what}"
        if why := self._fault_of_call(program):
            return f"the {{role}} does not take the args and kwargs of the problem: {why}"
        if isinstance(error, TypeError | RuntimeError | AttributeError | Warning) and (arrays := self.arrays()):
            return f"running the {{role}} fails: {first}{arrays}"
        return ""

    def _fault_of_call(self, program: Callable[..., Any]) -> str:
        """Why a program cannot be called with the arguments of the problem; empty where it can, or nobody knows."""
        body = program.forward if isinstance(program, nn.Module) else program
        try:
            inspect.signature(body).bind(*self.args, **self.kwargs)
        except TypeError as error:
            return str(error)
        except ValueError:  # of callables that have no signature
            return ""
        return ""

    def arrays(self) -> str:
        """Which arguments are arrays or lists and no tensors, as the end of a message; empty where none is."""
        given = {f"args[{place}]": value for place, value in enumerate(self.args)}
        given |= {f"kwargs[{name!r}]": value for name, value in self.kwargs.items()}
        kinds = (np.ndarray, pd.Series, pd.DataFrame, xr.DataArray, xr.Dataset, list, tuple)
        found = [f"{where} is a {type(value).__name__}" for where, value in given.items() if isinstance(value, kinds)]
        return f"; {', '.join(found)}: give tensors, as torch.as_tensor makes them" if found else ""

    def _describe(self, name: str, node: Mapping[str, Any]) -> Site:
        if not isinstance(node["value"], Tensor):
            raise ProblemError(
                f"{self.name}: site {name!r} observes a {type(node['value']).__name__}; give it a tensor, as "
                "torch.as_tensor makes them"
            )
        infer, fn, shape = node["infer"], node["fn"], tuple(node["value"].shape)
        frames = [frame for frame in node["cond_indep_stack"] if frame.vectorized]
        declared = infer.get("event_dims")
        kind = _kind_of(node)
        num_event = fn.event_dim if declared is None else len(declared)
        if kind == "deterministic":
            if declared is None and frames and _in_plates(shape, frames):
                num_event = 0  # pyro.deterministic calls every axis an event axis unless told otherwise
        elif num_event != fn.event_dim:
            raise ProblemError(
                f"{self.name}: site {name!r} names {num_event} event_dims {list(declared or ())} "
                f"but its distribution has {fn.event_dim} event axes; name each of them once"
            )
        num_batch = len(shape) - num_event
        dims = _plate_dims(name, shape, num_batch, frames)
        if declared is not None and num_event:
            dims[max(num_batch, 0) :] = list(declared)
        self._check_own_dims(name, dims, shape, declared)
        discrete = kind == "latent" and bool(getattr(fn.support, "is_discrete", False))
        enumerated = discrete and bool(infer.get("enumerate"))
        if enumerated and (fault := fault_of_enumeration(fn, {frame.dim for frame in frames})):
            raise ProblemError(f"{self.name}: enumerated site {name!r} {fault}")
        finite, improper = discrete and not _is_unbounded(fn.support), kind == "latent" and is_improper(fn)
        return Site(name, kind, tuple(dims), shape, discrete, enumerated, finite, improper)

    def _check_own_dims(self, name: str, dims: Sequence[str], shape: tuple[int, ...], declared: Any) -> None:
        """Refuse dims of a site that do not name each of its axes once."""
        if len(dims) != len(shape):
            raise ProblemError(f"{self.name}: site {name!r} of shape {shape} cannot carry the event_dims {declared}")
        if len(set(dims)) < len(dims) or {"chain", "draw"} & set(dims):
            raise ProblemError(
                f"{self.name}: site {name!r} has dims {dims}; each name may stand once, and never 'chain' or 'draw'"
            )

    def _check_names(self) -> None:
        plates = {dim for site in self.sites.values() for dim in site.dims}
        for what, given, known in (
            ("batch_plates", self.batch_plates, plates),
            ("reparam", self.reparam, set(self.names("latent", "observed"))),
            ("transient", self.transient, set(self.names("latent", "generated", "deterministic"))),
            ("rounded", self.rounded, set(self.names("latent", "generated", "deterministic"))),
        ):
            for name in given:
                if name not in known:
                    raise ProblemError(f"{self.name}: {what} names {name!r}, which the model lacks{hint(name, known)}")

    def _check_files(self) -> None:
        """Refuse what no result could be saved with, while nothing has been computed yet."""
        data = xr.Dataset() if self.data is None else self.data
        for what, names in (
            ("site", list(self.sites)),
            ("dim", [dim for site in self.sites.values() for dim in site.dims]),
            ("dim of coords", list(self.coords)),
            ("dim of data", list(data.sizes)),
            ("variable of data", list(data.variables)),
        ):
            for name in names:
                if why := fault_of_name(name):
                    raise ProblemError(f"{self.name}: {what} {name!r} cannot be saved: {why}; rename it")
        named: dict[str, Any] = {dim: f"coords[{dim!r}]" for dim in self.coords}
        for where, labels in (
            *((where, self.coords[dim]) for dim, where in named.items()),
            *((f"data[{name!r}]", values.values.ravel()) for name, values in data.variables.items()),
        ):
            if why := fault_of_labels(labels):
                raise ProblemError(f"{self.name}: {where} cannot be saved: {why}")
        self._check_dims()

    def _check_dims(self) -> None:
        """Refuse dims that no dataset could have together."""
        sizes: dict[str, tuple[int, str]] = {}
        for site in self.sites.values():
            for dim, size in zip(site.dims, site.shape, strict=True):
                first, other = sizes.setdefault(dim, (size, site.name))
                if first != size:
                    raise ProblemError(
                        f"{self.name}: dim {dim!r} has size {first} in site {other!r} and {size} in site "
                        f"{site.name!r}; give them different names, by plates or infer={{'event_dims': [...]}}"
                    )
        for name in self.sites:
            if name in sizes or name in ("chain", "draw"):
                raise ProblemError(
                    f"{self.name}: site {name!r} has the name of a dim, so that results would take its draws for "
                    "labels; rename the one or the other"
                )
        seen = [name for name in self.names("observed") if self.data is not None and name in self.data]
        if self.data is None or not seen or len(seen) == len(self.names("observed")):
            return
        beside = self.data[seen]  # the sites that data lack
        for key, size in beside.sizes.items():
            dim, labels = str(key), beside.indexes.get(key)
            differ = labels is not None and dim in self.coords and not labels.equals(pd.Index(self.coords[dim]))
            if differ or sizes.get(dim, (size, ""))[0] != size:
                raise ProblemError(
                    f"{self.name}: data give dim {dim!r} of {seen} another size or other labels than coords and model "
                    "do; give both the same"
                )

    def _check_spelling(self) -> None:
        """Refuse labels of a dim that no site has, where they were meant for another."""
        sizes = {dim: size for s in self.sites.values() for dim, size in zip(s.dims, s.shape, strict=True)}
        known = {*sizes, *getattr(self.kernel, "dims", {}), *(() if self.data is None else map(str, self.data.sizes))}
        bare = {dim: size for dim, size in sizes.items() if dim not in self.coords}
        for dim, labels in self.coords.items():
            # Methods label dims that only some variants have; labels that fit a dim without any were meant for it.
            fits = [name for name, size in bare.items() if size == len(labels) and not re.search(r"_dim_\d+$", name)]
            near = hint(dim, bare, otherwise=False) or (f"; did you mean {fits[0]!r}?" if fits else "")
            if dim not in known and near:
                raise ProblemError(f"{self.name}: coords names {dim!r}, which no site has{near}")

    def _check_labels(self) -> None:
        self._check_spelling()
        for site in self.sites.values():
            for dim, size in zip(site.dims, site.shape, strict=True):
                if dim in self.coords and len(self.coords[dim]) != size:
                    raise ProblemError(
                        f"{self.name}: coords[{dim!r}] holds {len(self.coords[dim])} labels, "
                        f"but site {site.name!r} of shape {site.shape} has size {size} there"
                    )
        if self.data is not None:
            for name, size in self.data.sizes.items():
                if name in self.coords and len(self.coords[str(name)]) != size:
                    raise ProblemError(
                        f"{self.name}: coords[{name!r}] holds {len(self.coords[str(name)])} labels, "
                        f"but data has size {size} there"
                    )

    def _check_prior(self) -> None:
        """Refuse a model without density at all draws of the prior and all starts that are uniform about zero.

        Where discrete sites are summed out, an impossible draw says nothing about the sum.
        """
        model = poutine.reparam(self.model, dict(self.reparam)) if self.reparam else self.model
        starts = [model] * _PRIOR_TRIES + [InitMessenger(uniform_start)(model)] * _OTHER_TRIES
        summed = any(site.discrete for site in self.sites.values())
        bad: dict[str, str] = {}
        fault: ProblemError | None = None
        with isolated(seed=0), torch.no_grad():
            for start in starts:
                try:
                    trace = self._trace(start, "model")
                    found = self._non_finite(trace)
                except ProblemError as error:  # a scale that underflows is refused by its distribution
                    fault = fault or error
                    continue
                if not found or (summed and "nan" not in found.values()):
                    return
                bad = bad if "nan" in bad.values() else found
                nodes: Any = trace.nodes
                if any(not torch.isfinite(nodes[name]["value"]).all() for name in found if self._is_data(name)):
                    break
        if bad:
            raise ProblemError(
                f"{self.name}: the log density is not finite at prior draws and elsewhere: {_spell(bad)}"
            )
        if fault is not None:
            raise fault

    def _is_data(self, name: str) -> bool:
        return name in self.sites and self.sites[name].kind == "observed"

    def _non_finite(self, trace: Trace) -> dict[str, str]:
        """Sites with a log density that is not finite, and what it is: ``nan`` or ``inf``."""
        validating = poutine.util.is_validation_enabled()
        poutine.util.enable_validation(False)  # or pyro would warn of what is raised as an error here
        sums: dict[str, Tensor] = {}
        try:
            for name, node in trace.nodes.items():
                if node["type"] == "sample" and not is_generated(node):
                    sums[name] = self._log_density(name, node)
        finally:
            poutine.util.enable_validation(validating)
        return {n: "nan" if torch.isnan(v) else "inf" for n, v in sums.items() if not torch.isfinite(v)}

    def _log_density(self, name: str, node: Any) -> Tensor:
        """Log density of a site in a trace, summed."""
        value = node["value"]
        try:
            found = node["fn"].log_prob(value, *node["args"], **node["kwargs"])
            return scale_and_mask(found, node["scale"], node["mask"]).sum()
        except NotImplementedError as error:
            raise ProblemError(
                f"{self.name}: site {name!r} has a {type(node['fn']).__name__}, whose log density is not known; give "
                f"the problem reparam={{{name!r}: ...}} for run_mcmc, or another distribution"
            ) from error
        except (ValueError, RuntimeError, TypeError, AttributeError, IndexError) as error:
            kind = "observed" if node["is_observed"] else "drawn"
            advice = ""
            if isinstance(value, Tensor) and not value.is_floating_point() and not isinstance(error, ValueError):
                advice = f"; the values are of type {value.dtype}: give numbers, as value.float() makes them"
            raise ProblemError(
                f"{self.name}: site {name!r} has no log density at its {kind} values: {error}{advice}"
            ) from error

    def _check_guide(self) -> None:
        model, guide = self.programs()
        assert guide is not None
        with isolated(seed=0), torch.no_grad():
            self._trace(model, "model")
            model_params = dict(pyro.get_param_store().named_parameters())
        with isolated(seed=0), torch.no_grad():
            guide_trace = self._trace(guide, "guide")
            store = dict(pyro.get_param_store().named_parameters())
            # An automatic guide runs the model once, which makes its parameters too; they are no sites of the guide.
            own = {name for name, node in guide_trace.nodes.items() if node["type"] == "param"}
            guide_params = {name: value for name, value in store.items() if name in own}
            drawn: dict[str, Any] = {n: s for n, s in guide_trace.nodes.items() if _is_variable(s)}
            drawn = {n: s for n, s in drawn.items() if not s["is_observed"] and not s["infer"].get("is_auxiliary")}
            self._check_guide_sites(drawn)
            for name in sorted(set(model_params) & set(guide_params)):
                if model_params[name] is not guide_params[name]:
                    raise ProblemError(
                        f"{self.name}: model and guide both have a parameter {name!r}, which pyro would make one "
                        "tensor; rename one of them, or share one module on purpose with pyro.module"
                    )
            replayed = poutine.replay(model, trace=guide_trace)
            bad = self._non_finite(self._trace(replayed, "model")) or self._non_finite(guide_trace)
        if getattr(self.loss, "floor", None) is not None:  # the objective takes impossible values for hardly possible
            bad = {name: value for name, value in bad.items() if value == "nan"}
        if bad:
            raise ProblemError(f"{self.name}: the log density at a draw of the guide is not finite: {_spell(bad)}")

    def _check_guide_sites(self, drawn: Mapping[str, Mapping[str, Any]]) -> None:
        latent = set(self.names("latent"))
        for name in self.names("latent"):
            if name not in drawn and not self.sites[name].enumerated:
                extra = sorted(set(drawn) - latent)
                near = hint(name, extra, otherwise=False) or f"; it samples {sorted(drawn)}"
                raise ProblemError(f"{self.name}: the guide does not sample {name!r}{near}")
        for name, node in drawn.items():
            if name not in self.sites:
                near = hint(name, latent, otherwise=False)
                raise ProblemError(
                    f"{self.name}: the guide samples {name!r}, which the model does not{near}; "
                    "mark a helper site of the guide with infer={'is_auxiliary': True}"
                )
            site = self.sites[name]
            if site.kind != "latent":
                raise ProblemError(
                    f"{self.name}: the guide samples {name!r}, which is {site.kind} in the model; leave it out of "
                    "the guide (for an automatic guide, hide it with poutine.block)"
                )
            if tuple(node["value"].shape) != site.shape:
                raise ProblemError(
                    f"{self.name}: site {name!r} has shape {tuple(node['value'].shape)} in the guide "
                    f"and {site.shape} in the model"
                )


def fault_of_enumeration(fn: Any, plates: set[int]) -> str:
    """Why a discrete site cannot be enumerated, given the dims of the plates around it; empty where it can."""
    if not is_enumerable(fn):
        return (
            f"cannot be enumerated: its {type(fn).__name__} does not list its values; let each element be a "
            "Categorical, OneHotCategorical or Bernoulli in a plate"
        )
    for axis, size in enumerate(fn.batch_shape):
        if size > 1 and (dim := axis - len(fn.batch_shape)) not in plates:
            return (
                f"has batch shape {tuple(fn.batch_shape)}, of which axis {axis} stands in no plate; put the site in "
                f"pyro.plate(..., dim={dim}), so that its elements are enumerated one by one"
            )
    return ""


def _name_of(program: Any) -> str:
    """Name of a function, class of a module or of another object."""
    return str(getattr(program, "__name__", type(program).__name__))


def _plate_dims(name: str, shape: Sequence[int], num_batch: int, frames: Iterable[Any]) -> list[str]:
    """Dims of a site: names of plates, and names made from that of the site where no plate fits."""
    dims = [f"{name}_dim_{axis}" for axis in range(len(shape))]
    for frame in frames:
        axis = num_batch + frame.dim
        if 0 <= axis < num_batch and shape[axis] == frame.size:
            dims[axis] = frame.name
    return dims


def _kind_of(node: Mapping[str, Any]) -> str:
    """Kind of a sample site."""
    if node["infer"].get("_deterministic"):
        return "deterministic"
    return "observed" if node["is_observed"] else "generated" if is_generated(node) else "latent"


def _in_plates(shape: Sequence[int], frames: Iterable[Any]) -> bool:
    """Whether a shape has an axis of the right size for each plate."""
    return all(-len(shape) <= frame.dim and shape[frame.dim] == frame.size for frame in frames)


def _is_variable(node: Mapping[str, Any]) -> bool:
    """Whether a trace node is a random variable or a deterministic one, not a factor or a subsample."""
    return node["type"] == "sample" and not isinstance(node["fn"], _Subsample | pyro.distributions.Unit)


def _spell(bad: Mapping[str, str]) -> str:
    sites = ", ".join(f"{name!r} gives {what}" for name, what in bad.items())
    return f"site {sites}; look for missing values in the data, scales of zero and values outside the support"


def _is_unbounded(support: Constraint) -> bool:
    """Whether a discrete support has infinitely many values, as counts have."""
    while isinstance(base := getattr(support, "base_constraint", None), Constraint):
        support = base
    return isinstance(support, type(constraints.nonnegative_integer))
