"""Measures of samples, graphs, latents and dependence."""
