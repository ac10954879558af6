"""The groups of the logged figures: ``group/name``, the same in every run, log and mirror."""

from __future__ import annotations

GROUPS = {
    "pretrain": "stage one's own figures: loss, rate, epoch",
    "temperature": "the temperature, and what it does to a batch",
    "eval": "the encoder on `dev` while stage one runs",
    "untrained": "the same before the first step",
    "finetune": "stage two while it trains, by its own axis `finetune/step`",
    "dev": "stage two on `dev`, by seed",
    "test": "stage two on `test`, by seed",
    "study": "a study's means, by the number of labeled images",
    "system": "speed, waiting, bad files",
    "media": "pictures: their files in the run's folder",
}
TRAINING_STEP = "finetune/step"  # optimizer steps of all of a stage-two run's trainings
_SYSTEM = ("images_per_s", "data_wait", "bad_files")
_TEMPERATURE = {"temperature": "tau"} | {
    name: name for name in ("entropy_share", "effective_negatives", "p_positive", "hardest_1pct", "hardest_5pct")
}


def full_name(stage: str, name: str) -> str:
    """A step's figure with its group: that of its kind, or the stage's."""
    if name in _SYSTEM:
        return f"system/{name}"
    return f"temperature/{_TEMPERATURE[name]}" if name in _TEMPERATURE else f"{stage}/{name}"
