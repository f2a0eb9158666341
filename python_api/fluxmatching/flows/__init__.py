"""Flows between distributions: paths, couplings, closed-form velocities, losses."""
