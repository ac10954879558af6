"""Two real processes on the CPU, by gloo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.runs import ROOT, TINY, command

TWO = ["accelerate", "launch", "--config_file", "launch/accelerate/cpu_2.yaml"]
CHECK = """
import json, os, sys
import torch, torch.distributed as dist
from ssl_pipeline.losses.info_nce import two_view_info_nce

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
first, second = torch.randn(12, 5, dtype=torch.float64), torch.randn(12, 5, dtype=torch.float64)
layer = torch.nn.Linear(5, 3).double()

def single():
    a, b = layer(first), layer(second)
    rows = torch.nn.functional.normalize(torch.cat([a, b]))
    logits = (rows @ rows.T / 0.2).fill_diagonal_(float("-inf"))
    return torch.nn.functional.cross_entropy(logits, torch.arange(24).roll(12))

expected = single()
gradient = torch.autograd.grad(expected, layer.weight)[0]
model = torch.nn.parallel.DistributedDataParallel(layer)
share = slice(rank * 12 // world, (rank + 1) * 12 // world)
rows = model(torch.cat([first[share], second[share]]))
loss = two_view_info_nce(*rows.chunk(2), 0.2)
loss.backward()
mean = loss.detach().clone()
dist.all_reduce(mean)
if rank == 0:
    json.dump({
        "loss": float((mean / world - expected.detach()).abs()),
        "gradient": float((layer.weight.grad - gradient).abs().max() / gradient.abs().max()),
    }, open(sys.argv[1], "w"))
dist.barrier()
del model
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # torch's threads and the interpreter's end race now and then, after all that is tested here is done
"""


def test_loss_and_gradient_on_two_processes_equal_one_big_batch(tmp_path: Path) -> None:
    script, out = tmp_path / "check.py", tmp_path / "out.json"
    script.write_text(CHECK)
    done = command(
        "torchrun",
        "--nproc_per_node=2",
        "--master_port=0",
        "--rdzv_backend=c10d",
        "--rdzv_endpoint=localhost:0",
        script,
        out,
    )
    assert done.returncode == 0, done.stderr
    errors = json.loads(out.read_text())
    assert errors["loss"] < 1e-12
    assert errors["gradient"] < 1e-12


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two") / "run"
    done = command(*TWO, "launch/pretrain", *TINY, "steps=3", "evaluate_every=3 steps", f"output={folder}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 1  # one process speaks
    return folder


def test_two_processes_make_one_run(two: Path) -> None:
    lines = [json.loads(line) for line in (two / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert "eval/knn" in lines[-1]


def test_finetune_on_two_processes_takes_it_on(two: Path, tmp_path: Path) -> None:
    words = [
        "tracking=off",
        "data.dev=4000",
        "labels.per_class=5",
        "split=dev",
        "regime.length=2 steps",
        "regime.least_steps=0",
        f"encoder={two}",
    ]
    done = command(*TWO, "launch/finetune", *words, f"output={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_processes_that_do_not_come_are_missed(tmp_path: Path) -> None:
    done = command(
        "accelerate", "launch", "--cpu", "--num_processes", "2", "launch/pretrain", *TINY, f"output={tmp_path / 'run'}"
    )
    assert done.returncode != 0
    assert "2 processes were asked for" in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_literal_form_works_from_inside_launch(tmp_path: Path) -> None:
    done = command(
        "accelerate", "launch", "pretrain", *TINY, "steps=1", f"output={tmp_path / 'run'}", cwd=ROOT / "launch"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "encoder.safetensors").is_file()


def test_the_cpu_is_used_where_there_is_no_gpu() -> None:
    from ssl_pipeline.engine.distributed import start_accelerator

    if not torch.cuda.is_available():
        assert start_accelerator().device.type == "cpu"
