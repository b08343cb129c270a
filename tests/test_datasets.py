"""The data sets: their published figures, where files are found, and what is said when they are not."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kfac_triton.tuning import curves, datasets
from kfac_triton.tuning.errors import Mistake

FILES = list(datasets.MNIST_FILES)


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.tobytes()


def write_mnist(folder: Path, value: int = 255) -> Path:
    """A tiny set: 6 + 3 images of 2 x 2 pixels, two files gzipped and two not."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count, images in zip(FILES, (6, 6, 3, 3), (True, False, True, False), strict=True):
        content = idx(np.full((count, 2, 2) if images else (count,), value if images else 7, np.uint8))
        if name.startswith("train"):
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with no data, no environment variables and no network."""

    def refused(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.delenv("KFAC_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.urllib.request, "urlopen", refused)
    return tmp_path


def residual(train: Tensor, test: Tensor, components: int) -> float:
    """Squared error an image that a PCA of `train` leaves on `test`."""
    mean = train.mean(0)
    _, vectors = torch.linalg.eigh(((train - mean).T @ (train - mean)).double())
    kept, centred = vectors[:, -components:].float(), test - mean
    return float((centred - centred @ kept @ kept.T).square().sum(1).mean())


def test_curves_has_the_published_residual() -> None:
    images = datasets.load_curves()
    assert images.train.shape == (20_000, 784) and images.test.shape == (10_000, 784)
    assert residual(images.train, images.test, 18) == pytest.approx(5.90, abs=0.03)
    assert images.provenance["size"] == "20000 + 10000"


def test_a_stroke_is_the_maximum_of_gaussians_along_it() -> None:
    control = np.array([[[5, 6], [13, 20], [22, 8]]], np.float32)
    t = np.linspace(0, 1, 60)[:, None]
    points = (1 - t) ** 2 * control[0, 0] + 2 * t * (1 - t) * control[0, 1] + t**2 * control[0, 2]
    row, column = 13, 12
    square = ((points - (column, row)) ** 2).sum(1).min()
    assert curves.draw(control)[0, row * 28 + column] == round(255 * np.exp(-square / (2 * 0.7**2)))


def test_curves_are_the_same_bytes_for_the_same_seed() -> None:
    assert np.array_equal(curves.generate(250), curves.generate(250))
    assert not np.array_equal(curves.generate(250), curves.generate(250, seed=1))


def test_digits_are_split_without_overlap() -> None:
    pytest.importorskip("sklearn")
    images = datasets.load_digits()
    assert (len(images.train), len(images.test)) == (1438, 359)
    assert images.train.max() == 1.0 and len(images.train_labels) == 1438


@pytest.mark.parametrize("place", ["mnist", "MNIST/raw", "."])
def test_mnist_is_found_in_an_explicit_folder(bare: Path, place: str) -> None:
    write_mnist(bare / "given" / place)
    images = datasets.load_mnist(bare / "given")
    assert images.train.shape == (6, 4) and images.train.unique().tolist() == [1.0]
    assert images.test_labels.tolist() == [7, 7, 7]
    assert images.provenance["size"] == "6 + 3"


def test_the_environment_variable_goes_before_the_usual_folders(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(bare / "cache" / "kfac_triton" / "mnist", 51)
    assert datasets.find_mnist() == bare / "cache" / "kfac_triton" / "mnist"
    monkeypatch.setenv("KFAC_DATA", str(bare / "named"))
    write_mnist(bare / "named" / "mnist", 102)
    assert float(datasets.load_mnist().train[0, 0]) == pytest.approx(0.4)


def test_an_explicit_folder_without_the_files_is_refused_whatever_else_there_is(bare: Path) -> None:
    write_mnist(bare / "cache" / "kfac_triton" / "mnist")
    with pytest.raises(Mistake, match=r"--data .*empty: no MNIST there; it needs train-images-idx3-ubyte"):
        datasets.load_mnist(bare / "empty")


def test_without_files_and_network_the_way_out_is_named(bare: Path) -> None:
    with pytest.raises(Mistake, match=r"no network.*--data DIR or set KFAC_DATA, or run the task 'curves'"):
        datasets.load_mnist()


def test_a_download_with_a_wrong_checksum_is_not_kept(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Answer:
        def __enter__(self) -> Answer:
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def read(self) -> bytes:
            return b"something else"

    monkeypatch.setattr(datasets.urllib.request, "urlopen", lambda *_, **__: Answer())
    with pytest.raises(Mistake, match="wrong checksum"):
        datasets.load_mnist()
    assert not list(bare.rglob("*.gz"))


@pytest.mark.parametrize("damage", [b"", b"\0\0\x08\x03\0\0\0\x06", b"not idx at all, and longer than a header"])
def test_a_damaged_file_is_named(bare: Path, damage: bytes) -> None:
    folder = write_mnist(bare / "given")
    (folder / FILES[2]).write_bytes(damage)
    with pytest.raises(Mistake, match=FILES[2]):
        datasets.load_mnist(folder)


def test_a_truncated_archive_is_named(bare: Path) -> None:
    folder = write_mnist(bare / "given")
    whole = (folder / f"{FILES[0]}.gz").read_bytes()
    (folder / f"{FILES[0]}.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Mistake, match=FILES[0]):
        datasets.load_mnist(folder)
