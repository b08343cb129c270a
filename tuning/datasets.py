"""The data sets of the built-in tasks, each with its provenance: name, source, sha256 of the bytes, size.

Files are looked for in an explicit folder (only there, when one is given), in `$KFAC_DATA`, in the usual folders, and
then downloaded where there is a network. Pixels come as rows of float32, in [0, 1] but for those of FACES.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import kfac_triton.tuning.curves as curves_recipe
import kfac_triton.tuning.faces as faces_recipe
from kfac_triton.tuning.errors import Mistake

# torchvision's names and md5 sums
MNIST_FILES = {
    "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
}
MNIST_MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/")
OLIVETTI_FILE, OLIVETTI_BRIGHTEST = "olivettifaces.mat", 242
DOWNLOAD_SECONDS = 20


@dataclass(frozen=True)
class Dataset:
    """Rows of the training and the test set, float32 (n, d); labels are int64 (n,), empty where the set has none."""

    train: Tensor
    test: Tensor
    train_labels: Tensor
    test_labels: Tensor
    provenance: dict[str, Any]


@lru_cache(maxsize=1)
def load_curves(train: int = 20_000, test: int = 10_000) -> Dataset:
    """The generated CURVES set; it needs no file."""
    pixels = curves_recipe.generate(train + test)
    none = np.zeros(0, np.uint8)
    return _dataset("curves", f"generated, seed {curves_recipe.SEED}", pixels[:train], pixels[train:], none, none)


def load_faces(folder: str | os.PathLike[str] | None = None, train: int = 20_000, test: int = 5_000) -> Dataset:
    """FACES, drawn from the 400 Olivetti photographs (AT&T Laboratories Cambridge): olivettifaces.mat, or what
    scikit-learn downloads.

    Raises:
        Mistake: the file is not in `folder`; or, without one, it is nowhere and cannot be downloaded; or it is damaged.
    """
    return _draw_faces(
        locate(folder, _olivetti_in, f"no {OLIVETTI_FILE} there, in the folder itself or in olivetti/"), train, test
    )


@lru_cache(maxsize=1)
def load_digits() -> Dataset:
    """scikit-learn's 1,797 digits of 8 x 8 pixels: every fifth is a test image.

    Raises:
        Mistake: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ImportError as error:
        raise Mistake("data set 'digits' comes with scikit-learn: pip install 'kfac-triton[bench]'") from error
    images, labels = sklearn_digits(return_X_y=True)
    pixels = np.rint(images * (255 / 16)).astype(np.uint8)
    held_out = np.arange(len(pixels)) % 5 == 4
    return _dataset("digits", "scikit-learn", pixels[~held_out], pixels[held_out], labels[~held_out], labels[held_out])


def load_fashion(folder: str | os.PathLike[str] | None = None) -> Dataset:
    """Fashion-MNIST's 60,000 + 10,000 garments from its four IDX files, of Debian's package dataset-fashion-mnist or in
    `folder`; where there are none, and no folder was named, CURVES' strokes stand in, to be sorted by their length.
    """
    found = locate(folder, _fashion_in, f"no Fashion-MNIST there; it needs {_wanted()}, in fashion-mnist/")
    return _generated_fashion() if found is None else _read_mnist(found, "fashion-mnist", "Fashion-MNIST IDX files")


def load_mnist(folder: str | os.PathLike[str] | None = None) -> Dataset:
    """The 60,000 + 10,000 MNIST digits from the four IDX files, gzipped or not.

    Raises:
        Mistake: the files are not in `folder`; or, without one, they are nowhere and cannot be downloaded.
    """
    return _read_mnist(find_mnist(folder), "mnist", "MNIST IDX files")


def find_mnist(folder: str | os.PathLike[str] | None = None) -> Path:
    """The folder that holds the four files, after a download if need be."""
    found = locate(folder, _mnist_in, f"no MNIST there; it needs {_wanted()}, in the folder itself or in mnist/")
    return found or _download_mnist(cache_folder() / "mnist")


def usual_folders() -> list[Path]:
    """Where data is looked for without an explicit folder, in this order."""
    named = os.environ.get("KFAC_DATA")
    home = Path.home()
    usual = [cache_folder(), Path("data"), home / "data", home / ".cache" / "torchvision", Path("/usr/share/datasets")]
    return [Path(named), *usual] if named else usual


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kfac_triton"


def locate(folder: str | os.PathLike[str] | None, look: Callable[[Path], Path | None], complaint: str) -> Path | None:
    """What `look` finds in `folder`, or without one in the usual folders, None where it is in none of those.

    Raises:
        Mistake: with `complaint`, it is not in `folder`.
    """
    if folder is None:
        return next((found for place in usual_folders() if (found := look(place)) is not None), None)
    found = look(Path(folder))
    if found is None:
        raise Mistake(f"--data {folder}: {complaint}")
    return found


def _mnist_in(folder: Path) -> Path | None:
    for place in (folder / "mnist", folder / "MNIST" / "raw", folder):
        if all(_file(place, name) is not None for name in MNIST_FILES):
            return place
    return None


def _fashion_in(folder: Path) -> Path | None:
    for place in (folder / "fashion-mnist", folder / "FashionMNIST" / "raw"):
        if all(_file(place, name) is not None for name in MNIST_FILES):
            return place
    return None


@lru_cache(maxsize=1)
def _generated_fashion(train: int = 20_000, test: int = 5_000) -> Dataset:
    """Strokes in ten classes of equal size, by the ink that they take."""
    pixels = curves_recipe.generate(train + test, curves_recipe.SEED + 1)
    rank = np.argsort(np.argsort(pixels.sum(1, dtype=np.int64), kind="stable"), kind="stable")
    labels = (rank * 10 // len(rank)).astype(np.uint8)
    source = f"generated, seed {curves_recipe.SEED + 1}: Fashion-MNIST was not found"
    return _dataset("strokes", source, pixels[:train], pixels[train:], labels[:train], labels[train:])


def _file(folder: Path, name: str) -> Path | None:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    return None


def _wanted() -> str:
    return ", ".join(f"{name}[.gz]" for name in MNIST_FILES)


def _download_mnist(folder: Path) -> Path:
    try:
        for name, md5 in MNIST_FILES.items():
            _fetch(f"{name}.gz", md5, folder)
    except OSError as error:
        raise _nowhere("mnist", "four IDX files are", error) from error
    return folder


def _nowhere(task: str, what: str, error: Exception) -> Mistake:
    places = ", ".join(str(place) for place in usual_folders())
    return Mistake(
        f"task {task!r}: its {what} in none of {places}, and the download failed ({error}); "
        "pass --data DIR or set KFAC_DATA, or run the task 'curves', which needs no files"
    )


def _fetch(name: str, md5: str, folder: Path) -> None:
    """Downloads one file from the first mirror whose bytes have the right md5; OSError when there is none."""
    failure: OSError = OSError("no mirror")
    for mirror in MNIST_MIRRORS:
        try:
            with urllib.request.urlopen(mirror + name, timeout=DOWNLOAD_SECONDS) as answer:
                content = answer.read()
        except OSError as error:
            failure = error
            continue
        if hashlib.md5(content, usedforsecurity=False).hexdigest() == md5:
            folder.mkdir(parents=True, exist_ok=True)
            part = folder / f"{name}.part"
            part.write_bytes(content)
            part.replace(folder / name)
            return
        failure = OSError(f"{mirror}{name} has the wrong checksum")
    raise failure


def _olivetti_in(folder: Path) -> Path | None:
    return next(
        (path for path in (folder / "olivetti" / OLIVETTI_FILE, folder / OLIVETTI_FILE) if path.is_file()), None
    )


@lru_cache(maxsize=1)
def _draw_faces(path: Path | None, train: int, test: int) -> Dataset:
    photographs = _downloaded_olivetti() if path is None else _read_olivetti(path)
    pixels = faces_recipe.generate(torch.from_numpy(photographs.astype(np.float32)), train, test)
    provenance = {
        "name": "faces",
        "source": f"Olivetti photographs, drawn with seed {faces_recipe.SEED}; the digest is the photographs'",
        "digest": hashlib.sha256(photographs.tobytes()).hexdigest(),
        "size": f"{train} + {test}",
    }
    none = torch.zeros(0, dtype=torch.int64)
    return Dataset(*pixels, none, none, provenance)


def _read_olivetti(path: Path) -> NDArray[np.uint8]:
    """The photographs (400, 64, 64) of a MATLAB file, whose columns hold them column by column."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise Mistake("data set 'faces' is read with scipy: pip install 'kfac-triton[bench]'") from error
    count, side = faces_recipe.PHOTOGRAPHS, faces_recipe.SIDE
    try:
        columns: NDArray[np.uint8] = loadmat(path)["faces"]
    except Exception as error:
        raise Mistake(f"{path} cannot be read ({error}); fetch it again") from error
    if columns.shape != (side**2, count) or columns.dtype != np.uint8:
        raise Mistake(f"{path} holds {columns.dtype} of shape {columns.shape}, not bytes of shape {(side**2, count)}")
    rows: NDArray[np.uint8] = np.ascontiguousarray(columns.T.reshape(count, side, side).transpose(0, 2, 1))
    return rows


def _downloaded_olivetti() -> NDArray[np.uint8]:
    """The photographs (400, 64, 64) by way of scikit-learn, which keeps them in [0, 1]."""
    try:
        from sklearn.datasets import fetch_olivetti_faces
    except ImportError as error:
        raise Mistake("data set 'faces' comes by scikit-learn: pip install 'kfac-triton[bench]'") from error
    try:
        images = fetch_olivetti_faces(data_home=cache_folder() / "olivetti").images
    except Exception as error:
        raise _nowhere("faces", f"file {OLIVETTI_FILE} is", error) from error
    photographs: NDArray[np.uint8] = np.rint(images * OLIVETTI_BRIGHTEST).astype(np.uint8)
    return photographs


@lru_cache(maxsize=1)
def _read_mnist(folder: Path, name: str, source: str) -> Dataset:
    train, train_labels, test, test_labels = (_read_idx(folder, name) for name in MNIST_FILES)
    if not (train.ndim == test.ndim == 3 and len(train) == len(train_labels) and len(test) == len(test_labels)):
        raise Mistake(f"{name} in {folder}: images {train.shape} and labels {train_labels.shape} do not fit together")
    flat = [pixels.reshape(len(pixels), -1) for pixels in (train, test)]
    return _dataset(name, source, flat[0], flat[1], train_labels, test_labels)


def _read_idx(folder: Path, name: str) -> NDArray[np.uint8]:
    """An IDX array of bytes: magic 0 0 8 ndim, big-endian sizes, data.

    Raises:
        Mistake: the file is damaged or holds something else.
    """
    path = _file(folder, name)
    if path is None:
        raise Mistake(f"MNIST in {folder}: {name}[.gz] is missing")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise Mistake(f"{path} cannot be read ({error}); fetch it again") from error
    ndim = content[3] if len(content) > 4 and content[:3] == b"\0\0\x08" else 0
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(ndim)]
    start = 4 + 4 * ndim
    if ndim == 0 or len(content) - start != int(np.prod(shape)):
        raise Mistake(f"{path} is no IDX file of bytes, or is cut short; fetch it again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _dataset(
    name: str,
    source: str,
    train: NDArray[np.uint8],
    test: NDArray[np.uint8],
    train_labels: NDArray[Any],
    test_labels: NDArray[Any],
) -> Dataset:
    digest = hashlib.sha256(train.tobytes() + test.tobytes()).hexdigest()
    provenance = {"name": name, "source": source, "digest": digest, "size": f"{len(train)} + {len(test)}"}
    pixels = [torch.from_numpy(part.astype(np.float32) / np.float32(255)) for part in (train, test)]
    labels = [torch.from_numpy(part.astype(np.int64)) for part in (train_labels, test_labels)]
    return Dataset(pixels[0], pixels[1], labels[0], labels[1], provenance)
