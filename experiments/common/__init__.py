"""What all experiments share: the registry, a run's folder, figures and the report."""
