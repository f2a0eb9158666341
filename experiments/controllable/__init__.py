"""Controllable generative fields (Sec. 4.1, B.1): losses of fields that keep the target and of others."""

from experiments.controllable.experiment import EXPERIMENT as EXPERIMENT
