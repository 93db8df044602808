"""Models in use: text token by token with a cache, in batches that change, and scores of text."""
