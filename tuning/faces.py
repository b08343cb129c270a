"""FACES: turned, scaled and cut out of the 400 Olivetti photographs, after the recipe of Hinton & Salakhutdinov (2006).

A picture is a square of 75 x 75 pixels of a photograph scaled by 1.4 to 1.8 and turned by -90 to 90 degrees, its centre
up to 4 pixels (of the photograph) from the middle, reduced to 25 x 25 by means over 3 x 3. Every pixel has mean 0 over
the training pictures, and one scale gives all of them unit variance. One number ties it to the published set: a
30-component PCA leaves a squared error of 136 a picture on the test set.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

PHOTOGRAPHS, PER_PERSON, SIDE = 400, 10, 64
TRAIN_PEOPLE, TEST_PEOPLE = range(25), range(30, 40)
WINDOW, REDUCED = 75, 25
TURN, SCALE, JITTER = math.pi / 2, (1.4, 1.8), 4.0
SEED = 2006
CHUNK = 1_000  # pictures drawn at a time


def draw(photographs: Tensor, turn: Tensor, scale: Tensor, centre: Tensor) -> Tensor:
    """Pictures (n, 625) of photographs (n, 64, 64): `turn` (n,) in radians, `scale` (n,), `centre` (n, 2) as offsets
    (x, y) in the photograph's pixels; beyond its rim the photograph goes on as it ends."""
    middle = (SIDE - 1) / 2
    at = torch.arange(WINDOW) - (WINDOW - 1) / 2
    y, x = torch.meshgrid(at, at, indexing="ij")
    cosine, sine, scale = (t[:, None, None] for t in (turn.cos(), turn.sin(), scale))
    source = torch.stack([x * cosine - y * sine, x * sine + y * cosine], dim=-1) / scale.unsqueeze(-1)
    window = F.grid_sample(
        photographs.unsqueeze(1),
        (source + centre[:, None, None]) / middle,
        mode="bilinear",
        padding_mode="border",
        align_corners=True,
    )
    return F.avg_pool2d(window, WINDOW // REDUCED).flatten(1)


def generate(photographs: Tensor, train: int, test: int, seed: int = SEED) -> tuple[Tensor, Tensor]:
    """`train` pictures of the first 25 people and `test` of the last ten, each photograph as often as any other.

    photographs (400, 64, 64) of any floating-point scale, ten of each of 40 people in order.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = [
        _of_people(photographs, people, n, generator) for people, n in ((TRAIN_PEOPLE, train), (TEST_PEOPLE, test))
    ]
    mean = parts[0].mean(0)
    scale = (parts[0] - mean).square().mean().sqrt()
    return (parts[0] - mean) / scale, (parts[1] - mean) / scale


def _of_people(photographs: Tensor, people: range, count: int, generator: torch.Generator) -> Tensor:
    own = photographs[people.start * PER_PERSON : people.stop * PER_PERSON]
    which = torch.randperm(count, generator=generator) % len(own)
    turn = TURN * (2 * torch.rand(count, generator=generator) - 1)
    scale = SCALE[0] + (SCALE[1] - SCALE[0]) * torch.rand(count, generator=generator)
    centre = JITTER * (2 * torch.rand(count, 2, generator=generator) - 1)
    return torch.cat(
        [
            draw(own[which[i : i + CHUNK]], turn[i : i + CHUNK], scale[i : i + CHUNK], centre[i : i + CHUNK])
            for i in range(0, count, CHUNK)
        ]
    )
