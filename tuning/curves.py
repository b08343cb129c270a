"""CURVES: random quadratic Bezier strokes on 28 x 28 pixels, a stand-in for the set of Hinton & Salakhutdinov (2006).

Three control points, each coordinate uniform in [4.55, 22.45]; the curve (1-t)^2 p0 + 2t(1-t) p1 + t^2 p2 at 60
values of t; a pixel is max over the samples of exp(-d^2 / (2 * 0.7^2)), d its distance to the sample, stored as a
byte. Two numbers tie it to the published set: an 18-component PCA leaves a squared error of 5.90 an image on the test
set.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SIDE = 28
SAMPLES = 60
WIDTH = 0.7
LOW, HIGH = 4.55, 22.45
SEED = 1503
CHUNK = 100  # images drawn at a time: their floats stay in the cache


def draw(control: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Images (n, 784) of the control points (n, 3, 2).

    The Gaussian of a distance is a product of one of rows and one of columns, so an image is a maximum of outer
    products.
    """
    t = np.linspace(0, 1, SAMPLES, dtype=np.float32)
    basis = np.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2])  # (3, samples)
    points = np.einsum("ks,nkd->nsd", basis, control)  # (n, samples, 2)
    grid = np.arange(SIDE, dtype=np.float32)
    bumps = np.exp(-((points[..., None] - grid) ** 2) / (2 * WIDTH**2))  # (n, samples, 2, side)
    image = np.zeros((len(control), SIDE, SIDE), np.float32)
    for sample in range(SAMPLES):
        outer = bumps[:, sample, 1, :, None] * bumps[:, sample, 0, None, :]
        np.maximum(image, outer, out=image)
    return np.rint(image.reshape(len(control), -1) * 255).astype(np.uint8)


def generate(count: int, seed: int = SEED) -> NDArray[np.uint8]:
    """`count` images (count, 784); the same bytes for the same seed."""
    control = np.random.default_rng(seed).uniform(LOW, HIGH, (count, 3, 2)).astype(np.float32)
    return np.concatenate([draw(control[start : start + CHUNK]) for start in range(0, count, CHUNK)])
