"""What pip makes of a checkout: the wheel holds every package and the report's template, and its command runs."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import kfac_triton

CHECKOUT = Path(kfac_triton.__file__).parent.parent


def test_every_folder_of_the_package_is_in_the_wheel() -> None:
    """pyproject.toml lists them by hand, since three are links."""
    if not (CHECKOUT / "pyproject.toml").is_file():
        pytest.skip("not a checkout: there is no pyproject.toml beside the package")
    text = (CHECKOUT / "pyproject.toml").read_text()
    listed = set(re.findall(r'^    "(kfac_triton[\w.]*)",$', text.partition("packages = [")[2].partition("]")[0], re.M))
    folders = {folder.name for folder in (CHECKOUT / "kfac_triton").iterdir() if any(folder.glob("*.py"))}
    assert listed == {"kfac_triton", *(f"kfac_triton.{name}" for name in folders)}


@pytest.mark.slow
def test_a_wheel_from_the_sdist_has_everything_and_runs(tmp_path: Path) -> None:
    pytest.importorskip("build")
    if not (CHECKOUT / "pyproject.toml").is_file():
        pytest.skip("not a checkout: there is no pyproject.toml beside the package")
    built = tmp_path / "dist"
    _run(sys.executable, "-m", "build", "--outdir", built, CHECKOUT)  # the wheel is built from the sdist
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    own = {
        f"kfac_triton/{folder}/{file.name}"
        for folder in ("kernels", "tuning", "benchmarks")
        for file in (CHECKOUT / folder).iterdir()
        if file.suffix in (".py", ".j2")
    }
    assert own | {"kfac_triton/py.typed", "kfac_triton/optimizer.py"} <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"kfac_triton"}
    target = tmp_path / "installed"
    _run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel)
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r}); from kfac_triton.benchmarks.cli import main; main(['tasks'])"
    )
    said = _run(sys.executable, "-c", code, cwd=tmp_path)
    assert "digits-autoencoder" in said


def _run(*command: object, cwd: Path | None = None) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
