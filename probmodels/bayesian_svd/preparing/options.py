"""Options of `make_problem` that go together, and those that the branch in question does not use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from probmodels.errors import DataError
from probmodels.options import refuse_unused

__all__ = ["check_options", "kernels_of_modes", "labelling"]

_SIDES = ("space", "time")
_LENGTHS = {name: (f"length_scales_{name}", f"length_prior_{name}") for name in _SIDES}


def kernels_of_modes(options: Mapping[str, Any]) -> dict[str, list[str]]:
    """Kernel of each mode, in space and in time."""
    found, rank = {}, options["rank"]
    for name in _SIDES:
        kernel = "identity" if options["frame_prior"] == "uniform" else options[f"kernel_{name}"]
        found[name] = [kernel] * rank if isinstance(kernel, str) else list(kernel)
        if len(found[name]) != rank:
            raise DataError(
                f"kernel_{name} lists {len(found[name])} kernels for {rank} modes; give one name or one per mode"
            )
    return found


def labelling(options: Mapping[str, Any]) -> str:
    """How draws are labelled: as asked, by default by size where modes have the same kernels."""
    alike = all(isinstance(options[f"kernel_{name}"], str) for name in _SIDES)
    if options["frame_prior"] == "macg" and not alike:
        raise DataError(
            "the prior 'macg' has one kernel for all modes: give kernel_space and kernel_time as one name each"
        )
    return str(options["order"] or ("scale" if alike else "label"))


def check_options(
    function: Callable[..., Any], options: Mapping[str, Any], families: Mapping[str, Sequence[str]]
) -> None:
    """Refuse options of this function that the frame prior, kernels, noise and effects in question do not use."""

    def refuse(branch: str, *names: str) -> None:
        refuse_unused(function, branch, **{name: options[name] for name in names})

    if not options["hold_out"]:
        refuse("hold_out=0", "hold_out_block")
    _check_frames(refuse, options)
    _check_noise(options, refuse)
    _check_kernels(refuse, options, families)
    _check_effects(refuse, options)


def _check_frames(refuse: Callable[..., None], options: Mapping[str, Any]) -> None:
    """Refuse what a uniform prior of the patterns, and series that are a process, do not use."""
    if options["series"] == "frame" and options["shrinkage"] != "none":
        raise DataError("shrinkage needs series that are a process: series='ar1', 'matern32', ...")
    matern = options["series"].startswith("matern")  # whose series have length-scales too
    if options["frame_prior"] == "uniform":
        kernels = ("kernel_space", "kernel_time", *_LENGTHS["space"], *(() if matern else _LENGTHS["time"]))
        refuse("frame_prior='uniform'", *kernels, "num_length_scales", "period", "nugget", "tail", "max_basis")
    if options["series"] != "frame":
        unused = ("period",) if matern else (*_LENGTHS["time"], "period")
        refuse(f"series={options['series']!r}", "kernel_time", *unused)


def _check_kernels(
    refuse: Callable[..., None], options: Mapping[str, Any], families: Mapping[str, Sequence[str]]
) -> None:
    """Refuse what kernels without a length-scale, or with given ones, do not use."""
    smooth = [name for name, kinds in families.items() if set(kinds) != {"identity"}]
    for name, (scales, prior) in _LENGTHS.items():
        if name not in smooth and not (name == "time" and options["series"].startswith("matern")):
            refuse(f"kernel_{name}='identity'", scales, prior)
        elif options[scales] is not None and len(options[scales]) == 1:
            refuse(f"a single value of {scales}", prior)
    if not smooth:
        refuse("kernels 'identity'", "nugget", "tail", "max_basis")
    if options["tail"] == 0:
        refuse("tail=0", "max_basis")
    if all(options[_LENGTHS[name][0]] is not None for name in smooth):
        refuse("the length-scales given", "num_length_scales")
    if "periodic" not in families["time"]:
        refuse("kernels that are not 'periodic'", "period")
    elif options["period"] is None:
        raise DataError("kernel_time 'periodic' needs a period; give it in the unit of the time axis")


def _check_effects(refuse: Callable[..., None], options: Mapping[str, Any]) -> None:
    """Refuse what the effects do not use."""
    named = {*options["fixed_effects"], *options["shared_effects"]}
    if not named:
        refuse("no effects", "effect_scale", "covariates")
    if options["effect_scale"] is not None and options["tail"]:  # effects of proper prior need bases of full rank
        refuse("a proper prior of the effects", "tail")
    for name in options["covariates"] or ():
        if name not in named:
            raise DataError(f"covariates[{name!r}] is in neither fixed_effects nor shared_effects; name it there")


def _check_noise(options: Mapping[str, Any], refuse: Callable[..., None]) -> None:
    """Refuse options that do not go with the noise."""
    if options["noise"] == "white":
        refuse("noise='white'", "noise_rank")
        return
    if options["series"] == "frame":
        raise DataError("noise='correlated' needs series that are a process: series='ar1', 'matern32', ...")
    for name in ("effect_scale", "shared_effects"):
        if options[name]:
            raise DataError(f"noise='correlated' has effects of flat prior, each cell's own: leave out {name}")
    if options["noise_rank"] is None and options["shrinkage"] != "none":
        raise DataError(
            "shrinkage with noise='correlated' needs noise_rank, the number of modes about which noise is estimated "
            "(about as many as rank it comes out too small, and the number of modes too large); probmodels ranks finds "
            "it (--set model.noise_rank=4)"
        )
    if options["noise_rank"] is not None and options["noise_rank"] > options["rank"]:
        raise DataError(f"noise_rank={options['noise_rank']}; give at most the rank, {options['rank']}")
