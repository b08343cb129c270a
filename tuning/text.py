"""Characters to learn from: Shakespeare's plays, or sentences that a small grammar makes up."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kfac_triton.tuning.datasets import locate

HELD_OUT = 0.1  # the share at the end that is not trained on
SEED, GENERATED = 20150319, 400_000  # of the grammar, and how many characters it makes
STARTS = ("the", "a", "every", "some", "no")
NOUNS = ("king", "fool", "river", "house", "lady", "sword", "night", "letter", "crown", "winter", "raven", "ship")
VERBS = ("sees", "loves", "fears", "finds", "leaves", "forgets", "follows", "keeps")
LINKS = (", and ", ", but ", "; yet ", ". ", ".\n", "?\n", "!\n")


@dataclass(frozen=True)
class Text:
    """Characters as numbers, int64 (n,), of what is trained on and what is held out; `letters` says which is which."""

    train: Tensor
    test: Tensor
    letters: str
    provenance: dict[str, Any]


def load_shakespeare(folder: str | os.PathLike[str] | None = None) -> Text:
    """The 1,115,394 characters of tinyshakespeare/input.txt, from `folder` or the usual ones; where there is none, and
    no folder was named, a grammar's sentences.

    Raises:
        Mistake: it is not in `folder`.
    """
    found = locate(folder, _shakespeare_in, "no tinyshakespeare/input.txt there")
    if found is None:
        return _text("sentences", f"generated, seed {SEED}", generated(GENERATED))
    return _text("tinyshakespeare", "input.txt of char-rnn", found.read_text(encoding="utf-8"))


def _shakespeare_in(folder: Path) -> Path | None:
    candidates = (folder / "tinyshakespeare" / "input.txt", folder / "tinyshakespeare.txt")
    return next((path for path in candidates if path.is_file()), None)


def generated(characters: int) -> str:
    """Sentences of a subject, a verb and an object, whose adjective depends on the noun."""
    random = np.random.default_rng(SEED)
    rows = random.integers(0, 2**31, (characters // 16, 6))
    parts: list[str] = []
    for start, noun, verb, other, last, link in rows.tolist():
        subject = NOUNS[noun % len(NOUNS)]
        parts += [
            STARTS[start % len(STARTS)], " ", subject, " ", VERBS[(verb + noun) % len(VERBS)], " the ",
            NOUNS[(other % 4 + noun) % len(NOUNS)], LINKS[last % len(LINKS) if link % 3 else 0],
        ]  # fmt: skip
    return "".join(parts)[:characters]


def _text(name: str, source: str, text: str) -> Text:
    letters = "".join(sorted(set(text)))
    number = {letter: i for i, letter in enumerate(letters)}
    whole = torch.tensor([number[letter] for letter in text], dtype=torch.int64)
    kept = int(len(whole) * (1 - HELD_OUT))
    digest = hashlib.sha256(text.encode()).hexdigest()
    provenance = {"name": name, "source": source, "digest": digest, "size": f"{kept} + {len(whole) - kept}"}
    return Text(whole[:kept], whole[kept:], letters, provenance)
