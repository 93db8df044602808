"""Where runs are started: what a job is, and a file for each of the places, which writes it as text."""
