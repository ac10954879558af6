"""Run on several processes: stage one, where process 1's step 2 goes wrong by the environment's FAULT."""

from __future__ import annotations

import os

import torch

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.engine.task import StepOutput
from ssl_pipeline.pretext.simclr import SimCLR
from ssl_pipeline.pretrain import main

objective = SimCLR.objective


def goes_wrong(self: SimCLR, embeddings: dict[str, torch.Tensor], batch: Batch) -> StepOutput:
    output = objective(self, embeddings, batch)
    if batch.clock.step == 2 and os.environ["RANK"] == "1":
        if os.environ["FAULT"] == "raise":
            raise KeyError("a mistake of process 1")
        output.loss = output.loss * torch.nan
    return output


SimCLR.objective = goes_wrong  # type: ignore[method-assign]

if __name__ == "__main__":
    main()
