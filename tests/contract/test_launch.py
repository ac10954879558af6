"""What starts the pipeline elsewhere: Accelerate's configurations, as its launcher reads them, and Slurm's scripts, dry."""

from __future__ import annotations

import os
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from omegaconf import OmegaConf

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.engine.distributed import without_launcher
from ssl_pipeline.pretrain import pretrain
from tests.runs import ROOT, tiny_pretrain

CONFIGS = sorted((ROOT / "launch" / "accelerate").glob("*.yaml"))
SLURM = sorted((ROOT / "launch" / "slurm").glob("*"))
NODES = ["--machine_rank", "1", "--main_process_ip", "127.0.0.1"]


def launched(config: Path, *words: str) -> Namespace:
    """The launcher's arguments, once it has read a configuration."""
    arguments = launch_command_parser().parse_args(["--config_file", str(config), *words, "launch/pretrain", "seed=1"])
    arguments.nondefault = {word.removeprefix("--") for word in words if word.startswith("--")}
    return _validate_launch_command(arguments)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_accelerate_knows_every_key_and_heeds_it(path: Path) -> None:
    written = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(written, dict)
    load_config_from_file(str(path))  # refuses keys that it does not know
    found = launched(path, *NODES) if written["num_machines"] > 1 else launched(path)
    flat = {key: value for key, value in written.items() if key not in ("distributed_type", "compute_environment")}
    for key, value in {**flat, **flat.pop("fsdp_config", {})}.items():
        if key != "fsdp_config":
            assert str(getattr(found, key)).lower() == str(value).lower(), f"{path.name}: the launcher drops {key}"
    kind = written["distributed_type"]
    assert (found.multi_gpu, found.use_fsdp) == (kind == "MULTI_GPU", kind == "FSDP")


def test_nodes_meet_at_the_first_one() -> None:
    found = launched(ROOT / "launch/accelerate/gpu_nodes.yaml", *NODES, "--main_process_port", "29511")
    environment = prepare_multi_gpu_env(found)
    assert (found.nnodes, found.nproc_per_node, found.node_rank) == ("2", "8", 1)
    assert (found.rdzv_endpoint, found.rdzv_backend) == ("127.0.0.1:29511", "static")
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert launched(ROOT / "launch/accelerate/gpu_nodes.yaml", *NODES, "--rdzv_backend", "c10d").rdzv_backend == "c10d"


def test_sharding_reaches_the_processes() -> None:
    environment = prepare_multi_gpu_env(launched(ROOT / "launch/accelerate/fsdp2_8.yaml"))
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    assert environment["FSDP_VERSION"] == "2"
    assert environment["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"


@pytest.mark.parametrize("path", SLURM, ids=lambda path: path.name)
def test_bash_can_read_it(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize("path", [p for p in SLURM if p.suffix == ".sbatch"], ids=lambda path: path.name)
def test_a_job_is_told_before_its_end_and_may_come_back(path: Path) -> None:
    text = path.read_text()
    for line in ("#SBATCH --signal=B:USR1@120", "#SBATCH --requeue", "#SBATCH --open-mode=append"):
        assert line in text


def cluster(folder: Path, run: str) -> dict[str, str]:
    """A project and a scheduler that write down what they are asked; ``run`` is what a launched process does."""
    (folder / "launch").mkdir()
    (folder / "launch" / "slurm").symlink_to(ROOT / "launch" / "slurm")
    calls, tools = folder / "calls", folder / "tools"
    tools.mkdir()
    write(folder / "launch" / "run", f'echo "run $*" >> "{calls}"\n{run}')
    hosts = 'if [ "$2" = hostnames ]; then printf "alpha\\nbeta\\n"; else'
    write(tools / "scontrol", f'{hosts} echo "scontrol $*" >> "{calls}"; fi')
    # Each machine runs the command; the greatest exit code is srun's own. Signals go to all.
    write(
        tools / "srun",
        f'echo "srun $*" >> "{calls}"\n'
        'while [ "${1#--}" != "$1" ]; do shift; done\n'
        'SLURM_NODEID=0 "$@" & first=$!\nSLURM_NODEID=1 "$@" & second=$!\n'
        'trap "kill -USR1 $first $second" USR1\n'
        "code=0; while kill -0 $first 2>/dev/null; do code=0; wait $first || code=$?; done\nwait $second\nexit $code",
    )
    return {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_ID": "77",
        "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "alpha,beta",
        "SLURM_GPUS_ON_NODE": "4", "VIRTUAL_ENV": "set",
    }  # fmt: skip


def write(path: Path, body: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def submit(name: str, environment: dict[str, str], *words: str, signal: str | None = None) -> tuple[int, list[str]]:
    """Runs a job's script; its exit code and the calls that it made."""
    folder = Path(environment["SLURM_SUBMIT_DIR"])
    job = subprocess.Popen(["bash", ROOT / "launch" / "slurm" / name, *words], env=environment, cwd="/")
    if signal is not None:  # sent when all launched processes say that they are up
        count = 2 if name == "nodes.sbatch" else 1
        wait = f'for _ in $(seq 200); do [ "$(ls {folder} | grep -c ^up)" = {count} ] && break; sleep 0.05; done'
        subprocess.run(["bash", "-c", f"{wait}; kill -{signal} {job.pid}"], check=True)
    code = job.wait(timeout=30)
    return code, (folder / "calls").read_text().splitlines()


def test_a_job_on_one_machine(tmp_path: Path) -> None:
    code, calls = submit("one_node.sbatch", cluster(tmp_path, "exit 0"), "pretrain", "recipe=a", "optim.lr=0.1")
    assert code == 0
    assert calls == [
        "run --config_file launch/accelerate/gpu_8.yaml --num_processes 4 pretrain recipe=a optim.lr=0.1 "
        "output=runs/slurm-77 resume=auto"
    ]


def test_a_job_on_two_machines(tmp_path: Path) -> None:
    code, calls = submit("nodes.sbatch", cluster(tmp_path, "exit 0"), "pretrain", "recipe=a")
    assert code == 0
    assert calls[0].startswith("srun --kill-on-bad-exit=0 --wait=120 bash -c")
    assert sorted(call for call in calls if call.startswith("run ")) == [
        f"run --config_file launch/accelerate/gpu_nodes.yaml --num_machines 2 --num_processes 8 --machine_rank {rank} "
        "--main_process_ip alpha --main_process_port 20077 pretrain recipe=a output=runs/slurm-77 resume=auto"
        for rank in (0, 1)
    ]


def test_an_array_over_seeds_and_over_lines(tmp_path: Path) -> None:
    environment = cluster(tmp_path, "exit 0")
    code, calls = submit("array.sbatch", environment, "pretrain", "recipe=a")
    assert code == 0
    assert calls[0].endswith("gpu_1.yaml pretrain recipe=a seed=3 output=runs/slurm-70/3 resume=auto")
    (tmp_path / "grid.txt").write_text("seed=9\nseed=8\noptim.lr=0.3 seed=7\n")
    _, calls = submit("array.sbatch", {**environment, "LINES_FILE": "grid.txt"}, "pretrain", "recipe=a")
    assert calls[1].endswith("recipe=a optim.lr=0.3 seed=7 output=runs/slurm-70/3 resume=auto")
    beyond = {**environment, "LINES_FILE": "grid.txt", "SLURM_ARRAY_TASK_ID": "4"}
    assert submit("array.sbatch", beyond, "pretrain", "recipe=a")[0] == 2


@pytest.mark.parametrize("name", ["one_node.sbatch", "nodes.sbatch", "array.sbatch"])
def test_a_job_that_saved_goes_back_into_the_queue(name: str, tmp_path: Path) -> None:
    # Saving goes on for a while after the signal; the code is the launcher's for `saved, requeue me`.
    run = f'trap "sleep 0.2; exit 75" USR1; touch "{tmp_path}/up$$"; for _ in $(seq 400); do sleep 0.05; done'
    code, calls = submit(name, cluster(tmp_path, run), "pretrain", "recipe=a", signal="USR1")
    assert code == 0
    assert calls[-1] == "scontrol requeue 77"


def test_a_job_that_failed_does_not(tmp_path: Path) -> None:
    code, calls = submit("one_node.sbatch", cluster(tmp_path, "exit 3"), "pretrain", "recipe=a")
    assert code == 3
    assert not any(call.startswith("scontrol") for call in calls)


STEP = {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    ("environment", "refused"),
    [
        (STEP, True),  # srun -n 2 ssl-pipeline pretrain
        (STEP | {"SLURM_PROCID": "1"}, True),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, True),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"PMI_SIZE": "2"}, True),
        (STEP | {"WORLD_SIZE": "2"}, False),  # what torchrun and accelerate have started
        (STEP | {"WORLD_SIZE": "1"}, False),  # separate runs
        ({"SLURM_NTASKS": "2"}, False),  # the shell of salloc -n 2
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, False),  # the script of sbatch --ntasks 2
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967291"}, False),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1"}, False),  # srun -n 1 in a job of two tasks
        ({"OMPI_COMM_WORLD_SIZE": "2", "MASTER_ADDR": "a"}, False),
        ({}, False),
    ],
)
def test_processes_that_know_nothing_of_each_other_are_refused(environment: dict[str, str], refused: bool) -> None:
    problem = without_launcher(environment)
    assert (problem is not None) == refused
    if problem is not None:
        assert "has started 2 processes" in problem
        assert "-n 1 launch/run --num_processes 2 pretrain" in problem


def test_the_refusal_comes_before_a_folder_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match="`srun` has started 2 processes"):
        pretrain(tiny_pretrain(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
