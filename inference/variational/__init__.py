"""Engines that fit a guide or a model by gradients: `fit_svi`, `fit_em`, and what they share."""
