"""The mathematics of a row."""
