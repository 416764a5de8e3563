"""Every option of every method against values that hardly any option takes: refused as a DataError, or used."""

from __future__ import annotations

import pytest
from wrong_values import WRONG

from probmodels import METHODS, get_method
from probmodels.errors import DataError
from probmodels.options import options_of

# Values that an option does take. What is the default of an option is taken as well and not listed.
_KNOWLEDGE = {
    "required": ("empty list",),
    "forbidden": ("empty list",),
    "tiers": ("empty list",),
    "order": ("empty list",),
}
TAKEN: dict[str, dict[str, tuple[str, ...]]] = {
    "acyclic_sem": _KNOWLEDGE | {"sparsity": ("zero",), "threshold": ("zero",), "seed": ("zero",)},
    "bayesian_svd": {
        "fixed_effects": ("empty list",),
        "shared_effects": ("empty list",),
        "length_scales_space": ("list",),
        "nugget": ("zero",),
        "hold_out": ("zero",),
        "tail": ("zero",),
        "area_weights": ("true",),
    },
    "conditional_vae": {"num_values": ("none",), "num_classes": ("none",), "seed": ("zero",)},
    "causal_graph": _KNOWLEDGE | {"anneal": ("zero",)},
    "causal_vae": {
        "graph": ("empty list", "none"),
        "num_style": ("zero",),
        "label_weight": ("zero",),
        "semi_supervised": ("true",),
        "equations_weight": ("zero",),
        "mask_weight": ("zero",),
        "seed": ("zero",),
    },
    "bayesian_network": {
        "standardise": ("true",),
        "epsilon": ("zero",),
        "anneal": ("zero",),
        "seed": ("zero",),
    },
    "discrete_vae": {"layers": ("zero",), "guide_layers": ("zero",), "log_z": ("true",)},
    "noisy_edges": {
        "blocks": ("true",),
        "labels": ("true",),
        "similarity": ("empty list",),
        "propensity": ("true",),
        "all_pairs": ("true",),
    },
    "diffusion": {
        "dropout": ("zero",),
        "energy": ("true",),
        "conditional": ("true",),
        "learn_ends": ("true",),
        "label_dropout": ("zero",),
    },
    "grammar": {"parents": ("true",), "left_branching": ("negative", "zero"), "epsilon": ("zero",)},
    "score_composition": {},
    "meta_regularization": {
        "normalise": ("true",),
        "flip": ("zero",),
        "degrees": ("zero",),
        "shift": ("zero",),
        "zoom": ("zero",),
        "erase": ("zero",),
        "generator": ("none",),
        "num_classes": ("none",),
        "seed": ("zero",),
    },
    "modality_structure": {
        "in_modal": ("true",),
        "orthogonality": ("zero",),
        "contrast": ("zero",),
        "uniformity": ("zero",),
        "fusion": ("zero",),
        "masked": ("zero",),
        "path": ("zero",),
        "consistency": ("zero",),
        "augmented_consistency": ("zero",),
        "shift": ("zero",),
        "flip": ("zero",),
        "erase": ("zero",),
        "inferred": ("empty list",),
    },
    "lds": {"candidates": ("zero",), "rate": ("zero",)},
    "vib_gsl": {
        "skip": ("zero",),
        "edge_beta": ("zero",),
        "observed_rate": ("none",),
        "feature_mask": ("true",),
    },
    "hierarchical_mixture": {"learn_sigma": ("true",), "learn_weights": ("true",), "log_z": ("true",)},
}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_options_are_refused_as_data_errors_or_used(name: str) -> None:
    method = get_method(name)
    problem = method.tiny()
    wrong = []
    for option in options_of(method.make_problem, skip=1).values():
        for kind, value in WRONG.items():
            taken = kind in TAKEN[name].get(option.name, ()) or value is option.default
            try:
                method.make_problem(problem.data, **{**problem.options, option.name: value}).validate()
            except DataError as error:
                if taken:
                    wrong.append(f"{option.name}={kind} is refused: {error}")
            except Exception as error:
                wrong.append(f"{option.name}={kind} raises {type(error).__name__}: {error}")
            else:
                if not taken:
                    wrong.append(f"{option.name}={kind} is taken")
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_option_says_what_it_takes_and_is_described(name: str) -> None:
    options = options_of(get_method(name).make_problem, skip=1)
    assert options
    assert not [option.name for option in options.values() if not option.doc]
    assert not TAKEN[name].keys() - options.keys()
