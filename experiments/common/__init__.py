"""Common parts of the experiments: registry, folder of a run, figures and report."""
