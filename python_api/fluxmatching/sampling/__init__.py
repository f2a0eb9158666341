"""Samplers, noise schedules and likelihoods of learned fields."""
