"""Sweeps: rows of runs, the runs they ask for, and how those are made."""
