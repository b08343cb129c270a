"""Approximations of the Fisher matrix: one structure a file."""
