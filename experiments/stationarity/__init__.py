"""Stationarity: a learned field that is no gradient keeps a mixture over long runs from a bad start."""

from experiments.stationarity.experiment import EXPERIMENT as EXPERIMENT
