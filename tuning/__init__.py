"""Tasks, data, baselines and searches. Importable as `kfac_triton.tuning` alone: a bare `import tuning` is refused."""

if __name__ != "kfac_triton.tuning":
    raise ImportError("import kfac_triton.tuning; the folder tuning/ is no package of its own")

from kfac_triton.tuning.task import Task

__all__ = ["Task"]
