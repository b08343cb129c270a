"""Blocks: one operation a file, from the uses of a weight to the rows a and g."""
