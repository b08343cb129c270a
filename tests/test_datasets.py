"""The data sets: their published figures, where files are found, and what is said when they are not."""

from __future__ import annotations

import gzip
import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.io import savemat
from torch import Tensor

from kfac_triton.tuning import curves, datasets, faces
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


def photographs() -> torch.Tensor:
    """40 people: the brightness of a photograph tells whose it is."""
    return torch.arange(400.0).view(400, 1, 1).expand(400, 64, 64)


def test_faces_have_the_residual_of_the_recipe() -> None:
    if not os.environ.get("KFAC_DATA"):
        pytest.skip("KFAC_DATA names no folder with olivettifaces.mat")
    images = datasets.load_faces(os.environ["KFAC_DATA"], 10_000, 2_000)
    assert float(images.train.mean(0).abs().max()) < 1e-4 and float(images.train.square().mean()) == pytest.approx(1.0)
    assert residual(images.train, images.test, 30) == pytest.approx(136, abs=3)


def test_a_picture_is_the_window_of_a_turned_and_scaled_photograph() -> None:
    """By hand: nearest pixels of a plane, which bilinear sampling and means over 3 x 3 keep as it is."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    plane = (3 * x + 5 * y)[None]
    turn, scale, centre = torch.tensor([0.3]), torch.tensor([1.6]), torch.tensor([[2.0, -1.0]])
    picture = faces.draw(plane, turn, scale, centre).view(25, 25)
    for row, column in ((12, 12), (12, 20), (5, 9)):
        v, u = 3 * (row - 12), 3 * (column - 12)
        across = (u * math.cos(0.3) - v * math.sin(0.3)) / 1.6 + 31.5 + 2
        down = (u * math.sin(0.3) + v * math.cos(0.3)) / 1.6 + 31.5 - 1
        assert float(picture[row, column]) == pytest.approx(3 * across + 5 * down, rel=1e-4)


def test_faces_of_the_first_people_train_and_those_of_the_last_test() -> None:
    train = faces._of_people(photographs(), range(25), 500, torch.Generator())
    assert sorted(train[:, 0].round().int().unique().tolist()) == list(range(250))
    assert all(int((train[:, 0].round() == k).sum()) == 2 for k in (0, 100, 249))
    train, test = faces.generate(photographs(), 250, 100)
    scale = (torch.arange(250.0) - 124.5).square().mean().sqrt()
    own = (test[:, 0] * scale + 124.5).round()
    assert sorted(own.int().tolist()) == list(range(300, 400))
    again, _ = faces.generate(photographs(), 250, 100)
    other, _ = faces.generate(photographs(), 250, 100, seed=1)
    assert torch.equal(train, again) and not torch.equal(train, other)


@pytest.mark.parametrize("place", ["olivetti", "."])
def test_the_photographs_are_found(bare: Path, place: str) -> None:
    (bare / "given" / place).mkdir(parents=True, exist_ok=True)
    savemat(bare / "given" / place / "olivettifaces.mat", {"faces": np.zeros((4096, 400), np.uint8)})
    assert datasets.load_faces(bare / "given", 250, 100).provenance["size"] == "250 + 100"


def test_a_photograph_is_read_column_by_column_and_alike_by_way_of_scikit_learn(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sklearn = pytest.importorskip("sklearn.datasets")
    columns = np.random.default_rng(0).integers(0, 243, (4096, 400)).astype(np.uint8)
    columns[1, 7] = 200
    savemat(bare / "olivettifaces.mat", {"faces": columns})
    read = datasets._read_olivetti(bare / "olivettifaces.mat")
    assert read[7, 1, 0] == 200 and np.array_equal(read[3].T.ravel(), columns[:, 3])
    from_file = datasets.load_faces(bare, 250, 100)
    scaled = SimpleNamespace(images=read.astype(np.float32) / np.float32(242))
    monkeypatch.setattr(sklearn, "fetch_olivetti_faces", lambda data_home: scaled)
    downloaded = datasets.load_faces(None, 250, 100)
    assert downloaded.provenance == from_file.provenance and torch.equal(downloaded.train, from_file.train)


def test_photographs_that_are_not_there_or_damaged_are_named(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(data_home: Path) -> None:
        raise OSError("no network")

    monkeypatch.setattr(pytest.importorskip("sklearn.datasets"), "fetch_olivetti_faces", refused)
    with pytest.raises(Mistake, match=r"no network.*--data DIR or set KFAC_DATA, or run the task 'curves'"):
        datasets.load_faces()
    with pytest.raises(Mistake, match=r"--data .*empty: no olivettifaces.mat there"):
        datasets.load_faces(bare / "empty")
    (bare / "olivettifaces.mat").write_bytes(b"not a matrix")
    with pytest.raises(Mistake, match=r"olivettifaces.mat cannot be read .*; fetch it again"):
        datasets.load_faces(bare)
    savemat(bare / "olivettifaces.mat", {"faces": np.zeros((4096, 10))})
    with pytest.raises(Mistake, match=r"holds float64 of shape \(4096, 10\), not bytes of shape \(4096, 400\)"):
        datasets.load_faces(bare)


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


def test_an_empty_environment_variable_counts_as_unset(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would name the current folder."""
    usual = datasets.usual_folders()
    monkeypatch.setenv("KFAC_DATA", "")
    write_mnist(bare / "mnist")
    assert datasets.usual_folders() == usual
    with pytest.raises(Mistake, match="no network"):
        datasets.load_mnist()


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


@pytest.mark.parametrize("place", ["fashion-mnist", "FashionMNIST/raw"])
def test_fashion_mnist_is_found_and_is_not_taken_for_mnist(bare: Path, place: str) -> None:
    write_mnist(bare / "data" / place)
    found = datasets.load_fashion()
    assert found.train.shape == (6, 4) and found.provenance["name"] == "fashion-mnist"
    with pytest.raises(Mistake, match="no MNIST there"):
        datasets.load_mnist(bare / "data")
    with pytest.raises(Mistake, match="no Fashion-MNIST there"):
        datasets.load_fashion(write_mnist(bare / "other" / "mnist"))


def test_without_fashion_mnist_strokes_stand_in_and_say_so(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "usual_folders", lambda: [bare])
    datasets._generated_fashion.cache_clear()
    monkeypatch.setattr(datasets, "_generated_fashion", lambda: datasets_generated(200, 50))
    found = datasets.load_fashion()
    assert found.provenance["name"] == "strokes" and "Fashion-MNIST was not found" in found.provenance["source"]
    labels = torch.cat([found.train_labels, found.test_labels])
    assert torch.bincount(labels).tolist() == [25] * 10
    ink = torch.cat([found.train, found.test]).sum(1)
    assert float(ink[labels == 2].max()) <= float(ink[labels == 3].min()), "the classes go by ink"


datasets_generated = datasets._generated_fashion.__wrapped__
