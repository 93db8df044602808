"""Inference: text token by token with a cache, in batches whose rows join and leave, and scores of text."""
