"""Trajectories of two masses between springs (Sec. 4.5, B.5): the simulator and the transformer that models them."""
