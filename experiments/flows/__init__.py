"""Paths, couplings and rectified flow: how many evaluations a flow needs, on two problems in the plane."""

from experiments.flows.experiment import EXPERIMENT as EXPERIMENT
