"""K-FAC for PyTorch: the natural gradient of Martens & Grosse (2015) as an optimizer."""

from kfac_triton.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from kfac_triton.operations.custom import LayerBlock
from kfac_triton.optimizer import KFAC
from kfac_triton.tuned import load_tuned
from kfac_triton.version import __version__

__all__ = ["KFAC", "Bernoulli", "Categorical", "Gaussian", "LayerBlock", "Likelihood", "__version__", "load_tuned"]
