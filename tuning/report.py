"""A study as one HTML file that needs nothing else: Optuna's plots, and the curves of the best runs."""

from __future__ import annotations

import html
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
import plotly.graph_objects as go
from optuna import visualization
from optuna.trial import TrialState

from kfac_triton.tuning.store import REPORT_BEGINS, write_text
from kfac_triton.tuning.trials import PRUNED, Result, Trials

LEADERS = 5
PLOTTED = 8  # parameters in one picture, the most important ones
STYLE = "body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}pre{overflow-x:auto}"


def write(path: Path, study: optuna.Study, content: dict[str, Any] | None = None) -> None:
    """Writes the report of `study`, with a tuned file's `content` on top.

    Raises:
        Mistake: it can't be written.
    """
    results = Trials(study, 0).results()
    plan = study.user_attrs.get("plan", {})
    parts = [f"<h1>{html.escape(study.study_name)}</h1>"]
    if content is not None:
        parts.append(f"<p>{html.escape(content['verdict'])}</p>")
        parts.append(f"<pre>{html.escape(json.dumps(content['arguments'], indent=1))}</pre>")
    library: str | bool = True  # plotly's own script, once
    if not results:
        parts.append("<p>No trial came to its end.</p>")
    for title, figure in _figures(study, results, plan.get("target")) if results else ():
        parts.append(f"<h2>{title}</h2>" + figure.to_html(full_html=False, include_plotlyjs=library))
        library = False
    page = "\n".join(parts)
    head = f"{html.escape(study.study_name)}</title><style>{STYLE}</style>"
    write_text(path, f"{REPORT_BEGINS}{head}</head><body>{page}</body></html>\n", f"--html {path}")


def _figures(study: optuna.Study, results: Sequence[Result], target: float | None) -> Iterator[tuple[str, go.Figure]]:
    yield "History", visualization.plot_optimization_history(study, target_name="objective")
    yield "Curves of the best", _curves(results, target)
    yield "What was pruned when", _pruned(results)
    names = _important(study)
    if names:
        yield "Importance (of what varied)", visualization.plot_param_importances(study, params=names)
        shown = names[:PLOTTED]
        yield "Slices", visualization.plot_slice(study, params=shown, target_name="objective")
        if len(shown) > 1:
            yield (
                "Parallel coordinates",
                visualization.plot_parallel_coordinate(study, params=shown, target_name="objective"),
            )
    yield "Timeline", visualization.plot_timeline(study)


def _important(study: optuna.Study) -> list[str]:
    """Parameters that all finished trials have and that varied, the most important first; none with too few trials."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(complete) < 4:
        return []
    shared = set.intersection(*(set(trial.params) for trial in complete))
    varied = [name for name in shared if len({str(trial.params[name]) for trial in complete}) > 1]
    try:
        return list(optuna.importance.get_param_importances(study, params=sorted(varied))) if varied else []
    except (ValueError, RuntimeError) as error:
        logging.getLogger("kfac_triton").info("no importances: %s", error)
        return []


def _curves(results: Sequence[Result], target: float | None) -> go.Figure:
    figure = go.Figure()
    for result in sorted((r for r in results if r.good), key=lambda r: r.value)[:LEADERS]:
        seconds, values = zip(*result.points, strict=True)
        figure.add_scatter(x=seconds, y=values, name=f"trial {result.number}", mode="lines+markers")
    if target is not None:
        figure.add_hline(y=target, line_dash="dash", annotation_text="target")
    positive = all(value > 0 for r in results for _, value in r.points)
    figure.update_layout(
        xaxis_title="training seconds", yaxis_title="metric", yaxis_type="log" if positive else "linear"
    )
    return figure


def _pruned(results: Sequence[Result]) -> go.Figure:
    figure = go.Figure()
    for title, chosen in (
        ("pruned", [r for r in results if r.ended == PRUNED]),
        ("ran on", [r for r in results if r.ended != PRUNED]),
    ):
        texts = [r.reason or r.ended for r in chosen]
        figure.add_bar(x=[r.number for r in chosen], y=[r.seconds for r in chosen], name=title, hovertext=texts)
    figure.update_layout(xaxis_title="trial", yaxis_title="training seconds")
    return figure
