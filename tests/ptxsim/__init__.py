"""A functional simulator of the PTX that the emitters write; see README.md."""
