"""Offline work on trained models: what they use, and what they can do without."""
