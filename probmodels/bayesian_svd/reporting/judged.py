"""Whether model and sampler can be trusted: sections of the report on both."""

from __future__ import annotations

import numpy as np
import xarray as xr
from markupsafe import Markup

from probmodels._page import paragraphs
from probmodels.bayesian_svd.checks import misfit, noise_in_words
from probmodels.bayesian_svd.reporting.facts import Facts

__all__ = ["fit_section", "sampler_section"]


def fit_section(facts: Facts, modes: xr.Dataset) -> Markup:
    found, noise = misfit(modes), noise_in_words(facts.constant)
    outside, lag, near = 100 * found["outside"], found["lag"], found.get("neighbour")
    text = (
        "If the model were right, data drawn from it would vary at each cell about as much as those observed. The map "
        "of predictive p-values shows the share of replicated data that vary more: near 0 the model has too little "
        f"variance at the cell (a process of its own that no mode holds), near 1 too much. Here {outside:.0f} % of the "
        "cells lie outside the central 95 %, where about 5 % would be expected at most."
    )
    if outside > 10:
        text += f" {_sentence(noise.levels)}. Intervals are too narrow where p is near 0."
    second = (
        f"The residuals of neighbouring times have a median correlation of {lag:.2f}{noise.beyond}; if the model were "
        "right it would be zero."
    )
    if lag > 0.2:
        second += f" {_sentence(noise.times)}, so that intervals are too narrow: {noise.instead}."
    if near is not None:
        second += f" That of neighbouring cells is {near:.2f}, and would be zero too."
        if near > 0.3:
            second += f" {_sentence(noise.cells)}, so that intervals are too narrow: {noise.instead}."
    known = (
        "All intervals hold that the number of modes is not known: those that the data do not ask for can vanish."
        if "number_of_modes" in modes
        else "All intervals are conditional on the number of modes: what further modes hold counts as noise."
    )
    return paragraphs(text, second, known)


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:]


def sampler_section(facts: Facts, modes: xr.Dataset) -> Markup:
    if "mode_r_hat" not in modes:
        return paragraphs("There is one chain, so that agreement between chains cannot be judged.")
    r_hat = modes["mode_r_hat"].values
    good = 100 * float(np.mean(r_hat[np.isfinite(r_hat)] <= 1.01))
    worst = float(np.nanmax(r_hat))
    return paragraphs(
        f"{facts.num_chains} chains started apart. R-hat compares the spread between them with that within; at "
        f"{good:.1f} % of the entries of the maps it is at most 1.01, the largest is {worst:.3f}."
    )
