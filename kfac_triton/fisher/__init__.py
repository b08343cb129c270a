"""Where the samples of a layer come from: which passes, which part of a batch, which gradients, which layers."""
