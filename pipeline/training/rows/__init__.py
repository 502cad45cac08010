"""Train many trials at once, as the rows of one matrix."""
