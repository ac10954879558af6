"""Each term of the glossary: its row names a file that is there and a key that the schema knows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ssl_pipeline.config.command import load
from ssl_pipeline.finetune_config import FinetuneConfig
from ssl_pipeline.pretrain_config import PretrainConfig

ROOT = Path(__file__).parents[2]
TERMS = [
    "pretext task", "downstream task", "end to end", "domain adaptation", "domain generalization", "backbone", "neck",
    "GAP", "bottleneck", "head", "warm-up", "temperature",
]  # fmt: skip
ROWS = {
    cells[0].strip(): [cell.strip() for cell in cells[1:]]
    for line in (ROOT / "docs" / "glossary.md").read_text().splitlines()
    if line.startswith("| ") and len(cells := line.strip("| ").split(" | ")) == 4
}


@pytest.mark.parametrize("term", TERMS)
def test_the_term_has_a_row_whose_links_lead_somewhere(term: str) -> None:
    _, config, place = ROWS[term]
    links = re.findall(r"\]\(([^)]+)\)", place)
    assert links
    for link in links:
        assert (ROOT / "docs" / link).exists()
    for override in re.findall(r"`([a-z_.]+=[^`]+)`", config):
        stage_one = override.split("=")[0].split(".")[0] in ("pretext", "backbone", "neck", "optim")
        if stage_one:
            load("pretrain", PretrainConfig, [override])
        else:
            load("finetune", FinetuneConfig, [override])
