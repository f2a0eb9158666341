"""The paper's experiments: `python -m experiments list | run NAME | report`."""
