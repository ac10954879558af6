"""More than one machine, and more weights than one machine holds, as far as a CPU can show it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.command import load
from ssl_pipeline.config.schema import names
from ssl_pipeline.engine.distributed import start_accelerator
from ssl_pipeline.engine.fsdp import check_shardable
from ssl_pipeline.logging.jsonl import read_metrics
from ssl_pipeline.pretrain import pretrain
from ssl_pipeline.pretrain_config import PretrainConfig
from tests.forks import Forked
from tests.ranks import ACCELERATE, free_port
from tests.runs import FEW_IMAGES, ROOT, forked, tiny_pretrain
from tests.tasks import tiny_task

pytest.importorskip("timm")
# Without batch norms, whose statistics are a process's own, several processes equal one.
TRANSFORMER = [
    "transform.size=16", "backbone.name=timm/test_vit", "pretext.layers=1", "pretext.projection_width=16",
]  # fmt: skip
SHORT = [
    *TRANSFORMER, "tracking=off", "tracking.log_images=false", "batch_size=32", "log_every=1", FEW_IMAGES, "evaluate_every=0 steps", "steps=3",
    "optim=sgd", "optim.warmup=0 steps",  # Adam would blow up the last bits of gradients that are zero but for rounding
]  # fmt: skip
SHARDED = [*ACCELERATE, "--config_file", "launch/accelerate/fsdp2_8.yaml", "--num_processes", "2"]


def answers(port: int) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


def start(*words: str | Path) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [str(word) for word in words], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def test_two_machines_equal_one_process(tmp_path: Path) -> None:
    words = ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    launch = [*ACCELERATE, "--config_file", "launch/accelerate/gpu_nodes.yaml", "--mixed_precision", "no", *words]
    logs = [tmp_path / f"{rank}.log" for rank in (0, 1)]
    machines = [
        Forked([*launch, "--machine_rank", str(rank), "launch/pretrain", *SHORT, f"output={tmp_path / 'two'}"], log)
        for rank, log in enumerate(logs)
    ]
    codes, said = [machine.wait(240) for machine in machines], [log.read_text() for log in logs]
    assert codes == [0, 0], said
    assert [text.count("wrote") for text in said] == [1, 0]  # the first machine's first process speaks and writes
    one = pretrain(tiny_pretrain(tmp_path / "one", *SHORT))
    pairs = zip(read_metrics(one), read_metrics(tmp_path / "two"), strict=True)
    for alone, together in pairs:
        assert together.get("pretrain/loss", 0) == pytest.approx(alone.get("pretrain/loss", 0), rel=1e-6)
    found, wanted = (load_file(folder / "encoder.safetensors") for folder in (tmp_path / "two", one))
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.slow
def test_a_machine_that_leaves_is_done_without(tmp_path: Path) -> None:
    """Elastic: two machines, of which one is lost; the other goes on alone from the last checkpoint."""
    port = free_port()
    agent = [
        "torchrun", "--nnodes=1:2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}",
        "--rdzv_id=elastic", "--max_restarts=3", "--rdzv_conf=last_call_timeout=5,join_timeout=120", "launch/pretrain",
    ]  # fmt: skip
    run, steps = tmp_path / "run", ["steps=300", "save_every=20 steps", "resume=auto"]
    first = start(*agent, *SHORT, *steps, f"output={run}")
    while not answers(port) and first.poll() is None:  # the first holds the rendezvous: it has to outlive the others
        time.sleep(0.2)
    second = start(*agent, *SHORT, *steps, f"output={run}")
    until = time.monotonic() + 120
    while not list((run / "checkpoints").glob("step-*")) and time.monotonic() < until:
        time.sleep(0.2)
    agent_and_ranks = [psutil.Process(second.pid), *psutil.Process(second.pid).children(recursive=True)]
    for process in agent_and_ranks:  # the ranks are in sessions of their own
        process.kill()
    second.communicate()
    said = first.communicate(timeout=200)[0]
    assert first.returncode == 0, said
    assert "2 process(es)" in said
    assert "1 process(es)" in said
    lines = [line["step"] for line in read_metrics(run)]
    assert lines == sorted(set(lines))
    assert lines[-1] == 300
    assert (run / "encoder.safetensors").is_file()


def sharded(folder: Path, tasks: list[str]) -> dict[str, Any]:
    """How far the loop on shares is from the loop on whole weights."""
    out = folder / "out.json"
    done = forked(*SHARDED, "--mixed_precision", "no", "tests/distributed/sharded_tasks.py", out, *tasks)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize(
    "tasks", [["moco_v2", "swav"], pytest.param(names("pretext"), marks=pytest.mark.slow)], ids=["two", "all"]
)
def test_shares_of_the_weights_train_as_whole_ones_do(tasks: list[str], tmp_path: Path) -> None:
    found = sharded(tmp_path, tasks)
    for name in tasks:
        assert found[name]["loss"] < 1e-6, name
        assert found[name]["state"] < 1e-6, name
        assert found[name]["moved"] > 1e-5, name
    assert found["continued, sharded first"] < 1e-6
    assert found["continued, sharded last"] < 1e-6


@pytest.mark.slow
def test_a_sharded_run_is_handed_over_and_continues_on_one_process(tmp_path: Path) -> None:
    words = [*SHORT, "save_every=2 steps", f"output={tmp_path / 'run'}"]
    done = forked(*SHARDED, "--mixed_precision", "no", "launch/pretrain", *words)
    assert done.returncode == 0, done.stderr
    before = load_file(tmp_path / "run" / "encoder.safetensors")
    (tmp_path / "run" / "checkpoints" / "step-000000003.pt").unlink()
    again = pretrain(load("pretrain", PretrainConfig, [*words, "resume=auto"]))
    for key, value in load_file(again / "encoder.safetensors").items():
        torch.testing.assert_close(value, before[key], rtol=1e-5, atol=1e-6, msg=key)


def test_what_cannot_be_shared_out_is_told() -> None:
    task, _ = tiny_task("simclr", ["pretext.temperature.learned.min=0.05"])
    with pytest.raises(ConfigError) as caught:
        check_shardable(task, 16)
    micro, scalar, blocks = caught.value.problems
    assert "`micro_batch_size`" in micro
    assert "temperature.log_scale learns one" in scalar
    assert "has none" in blocks
    assert all("gpu_8.yaml" in problem for problem in (micro, scalar, blocks))


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"FSDP_VERSION": "1"}, "fsdp_version: 2"),
        ({"FSDP_VERSION": "2", "ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed_precision: bf16"),
    ],
)
def test_sharding_of_the_first_kind_or_in_fp16_is_refused(
    environment: dict[str, str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ConfigError, match=told):
        start_accelerator()
