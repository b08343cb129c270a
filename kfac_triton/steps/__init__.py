"""One step: gradients in, parameters moved; the numbers that change from step to step, and the rules of the move."""
