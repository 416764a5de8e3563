"""Markov chain Monte Carlo: kernels, chains and the engine `run_mcmc`."""
