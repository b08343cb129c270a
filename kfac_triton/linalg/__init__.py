"""Linear algebra of the curvature: pure functions of tensors."""
