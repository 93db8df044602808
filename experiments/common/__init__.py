"""What programs share: how they start, their flags, and what they load."""
