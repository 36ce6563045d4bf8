"""Naive float64 versions of what the package does, and the toy models they are compared on."""
