"""Tasks, data, baselines and searches. Importable as `kfac_triton.tuning` alone: a bare `import tuning` is refused."""

if __name__ != "kfac_triton.tuning":
    raise ImportError("import kfac_triton.tuning; the folder tuning/ is no package of its own")

from typing import TYPE_CHECKING, Any

from kfac_triton.tuning.task import Task

if TYPE_CHECKING:
    from kfac_triton.tuning.tuner import TunedResult, tune

__all__ = ["Task", "TunedResult", "tune"]


def __getattr__(name: str) -> Any:
    """The search, once somebody asks for it: it brings Optuna along."""
    if name not in ("TunedResult", "tune"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kfac_triton.tuning import tuner

    return getattr(tuner, name)
