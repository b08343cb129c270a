"""The networks of the built-in tasks that are no chains of linear layers, small enough for two cores."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """Two 3 x 3 convolutions with BatchNorm around a shortcut (He et al. 2016); `stride` 2 halves the image."""

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        same = channels == out and stride == 1
        shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.shortcut = nn.Identity() if same else shortcut

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.inner(x) + self.shortcut(x))


def resnet(side: int = 28) -> nn.Sequential:
    """Rows of side x side pixels to ten logits: a strided stem of 8 channels, residual blocks of 8, 16 and 32."""
    return nn.Sequential(
        nn.Unflatten(1, (1, side, side)), nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        Residual(8, 8), Residual(8, 16, 2), Residual(16, 32, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, 10),
    )  # fmt: skip


class CharLSTM(nn.Module):
    """Characters (N, T) to scores of the next one (N, T, letters): an embedding, one LSTM, a linear layer."""

    def __init__(self, letters: int, width: int = 32, hidden: int = 128) -> None:
        super().__init__()
        self.table = nn.Embedding(letters, width)
        self.layer = nn.LSTM(width, hidden, batch_first=True)
        self.head = nn.Linear(hidden, letters)

    def forward(self, characters: Tensor) -> Tensor:
        scores: Tensor = self.head(self.layer(self.table(characters))[0])
        return scores


class CausalBlock(nn.Module):
    """A block of a transformer that looks back alone, its norms in front (Radford et al. 2019)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        split = self.project(self.before(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        looked = F.scaled_dot_product_attention(split[0], split[1], split[2], is_causal=True)
        x = x + self.out(looked.transpose(1, 2).flatten(2))
        x = x + self.narrow(F.gelu(self.widen(self.between(x))))
        return x


class CharGPT(nn.Module):
    """Characters (N, T) to scores of the next one (N, T, letters), with learned positions."""

    def __init__(self, letters: int, length: int, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(letters, width), nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(CausalBlock(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, letters)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, characters: Tensor) -> Tensor:
        x = self.table(characters) + self.places[: characters.shape[1]]
        scores: Tensor = self.head(self.norm(self.blocks(x)))
        return scores


class Adder(nn.Module):
    """Sequences of (value, mark) (N, T, 2) to one number (N, 1): the last state of an LSTM, and a linear layer."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.layer, self.head = nn.LSTM(2, hidden, batch_first=True), nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.head(self.layer(x)[0][:, -1])
        return total


class DigitsViT(nn.Module):
    """Rows of 8 x 8 pixels to ten logits: patches of 2 x 2, a class token, learned positions, two blocks (Dosovitskiy
    et al. 2021)."""

    def __init__(self, width: int = 32, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.places = nn.Parameter(0.02 * torch.randn(1, 17, width))
        block = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x.unflatten(1, (1, 8, 8))).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), patches], dim=1) + self.places
        logits: Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return logits
