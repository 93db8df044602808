"""One get_sweep(arg) per file, plain data: the rows of a table (see the head of experiments/sweep.py)."""
