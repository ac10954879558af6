"""Which labels choose what under ``labels.validation``, as a sentence and as a record of the run."""

from __future__ import annotations

from typing import Any

from ssl_pipeline.downstream.labels import LEAST_HELD_OUT, SHARE_HELD_OUT, LabeledSplit, LabelsConfig
from ssl_pipeline.downstream.pooled_task import PooledConfig
from ssl_pipeline.downstream.regime import RegimeConfig
from ssl_pipeline.downstream.task import DownstreamConfig


def selection(
    labels: LabelsConfig, downstream: DownstreamConfig, regime: RegimeConfig, labeled: LabeledSplit
) -> dict[str, Any]:
    """How many labels are learned from and held out, how many folds a cross-validation has, and why, for ``results.json``."""
    held_out = 0 if labeled.validation is None else len(labeled.validation)
    parts = 0 if labeled.folds is None else int(labeled.folds.max()) + 1
    counts = {
        "validation": labels.validation,
        "learned_from": len(labeled.train),
        "held_out": held_out,
        "folds": parts,
    }
    return {**counts, "why": _sentence(labels, downstream, regime, counts)}


def _sentence(labels: LabelsConfig, downstream: DownstreamConfig, regime: RegimeConfig, counts: dict[str, Any]) -> str:
    learned, held_out, parts = (counts[key] for key in ("learned_from", "held_out", "folds"))
    taught = f"labels: {learned} to learn from, {held_out or 'none'} held out"
    if labels.validation != "auto":
        return f"{taught} (labels.validation={labels.validation:g})."
    if not learned:
        return "labels: none are learned from."
    if not downstream.selects:
        return f"{taught}: {downstream.name} chooses nothing."
    if held_out:
        return f"{taught} to choose by (labels.validation=auto: {LEAST_HELD_OUT} or more can tell settings apart)."
    share = f"{100 * SHARE_HELD_OUT:.0f} % of them would be fewer than {LEAST_HELD_OUT}, too few to choose by"
    clauses = [f"{taught} (labels.validation=auto: {share})."]
    if regime.probes and isinstance(downstream, PooledConfig) and len(regime.weight_decays) > 1:
        clauses.append(
            f"The probe's weight decay is chosen by {parts}-fold cross-validation."
            if parts
            else f"The probe's weight decay is the first of regime.weight_decays, {regime.weight_decays[0]:g}: no class has two labels."
        )
    if regime.trains_all or not isinstance(downstream, PooledConfig):
        clauses.append("The last step is kept.")
    return " ".join(clauses)
