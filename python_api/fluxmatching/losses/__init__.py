"""Losses of Flux Matching and score matching, and what they are made of."""
