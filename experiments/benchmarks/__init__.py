"""What is timed or compiled: training steps."""
