"""Approximations of a layer's block of the Fisher matrix: one structure a file."""
