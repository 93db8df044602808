"""One get_sweep(arg) per file, plain data: the rows of a table (see experiments/sweeps/sweep.py)."""
