"""Checkpoints of the GPT-2 and OPT families in the form of Hugging Face, read and written."""
