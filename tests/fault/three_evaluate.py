"""Run on several processes: features of an uneven number of samples, each once, in order, on every process."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ssl_pipeline.data.dataset import ArrayDataset
from ssl_pipeline.data.loader import DistInfo
from ssl_pipeline.evaluation.features import extract
from ssl_pipeline.transforms.preprocessing import Preprocessing


def main() -> None:
    dist.init_process_group("gloo")
    pixels = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(10, 1, 4, 4).contiguous()
    source = ArrayDataset("numbers", pixels, torch.arange(10) % 2, ("a", "b"))
    share = DistInfo(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    preprocessing = Preprocessing(4, (0.0,), (1 / 255,))
    for wanted in (torch.arange(10), torch.tensor([7, 2, 9, 0]), torch.tensor([5])):
        found = extract(
            torch.nn.Identity(), source, preprocessing, share, wanted, forward=lambda images: images.flatten(1)[:, :1]
        )
        assert torch.allclose(found[:, 0], wanted.float(), atol=1e-4), (found[:, 0], wanted)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
