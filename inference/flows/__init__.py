"""Objectives and exploration of generative flow networks."""
