"""The plan's arithmetic, by hand and by simulation."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from ssl_pipeline.bench.plan import (
    IMAGENET,
    LAION,
    Cluster,
    Job,
    all_gather_bytes,
    all_reduce_bytes,
    checkpoint_bytes,
    daly,
    gpu_bytes,
    loss_bytes,
    measure,
    plan,
    shards,
    young,
)

JOB = Job(
    images=1000, image_bytes=100, epochs=3, batch=100, views=2, teacher=True, forward_flops=10, parameters=50,
    optimizer_bytes=8, saved_bytes=7, width=4, decode_seconds=0.01,
)  # fmt: skip
CLUSTER = Cluster(
    gpus=2, per_node=2, flops=1000, gpu_bytes=1e6, bus=100, overlap=0.5, cores=4, storage=1e6, write=100, gpu_mtbf=10,
    restart=60,
)  # fmt: skip


def test_a_small_plan_by_hand() -> None:
    found = plan(JOB, CLUSTER)
    compute = 100 * (2 * 4 * 10) / 2 / 1000  # 4 s: three passes of the student, one of the teacher
    gradient = 2 * 0.5 * 50 * 4 / 100  # 2 s
    loss = (1 * 400 * 4 * 2 / 2 * 1 + 2 * 0.5 * 200 * 4 * 4) / 100  # 16 s gathered, 32 s summed
    assert found["compute_s"] == compute == 4
    assert found["gradient_exchange_s"] == gradient == 2
    assert found["loss_exchange_s"] == loss == 48
    assert found["step_s"] == compute + gradient / 2 + loss
    assert found["images_per_s"] == 100 / 53
    assert found["steps"] == 30
    assert found["mtbf_h"] == 5
    assert found["checkpoint_gb"] == 50 * 16 / 1e9
    assert found["gpu_hours"] == 2 * found["hours"]
    assert found["hours"] == pytest.approx(30 * 53 * (1 + found["lost_share"]) / 3600)
    assert found["load.network"] == (gradient + loss) / compute


def test_the_slowest_decides() -> None:
    slow_disk = plan(JOB, replace(CLUSTER, storage=1.0))
    assert slow_disk["step_s"] == 100 * 100
    assert slow_disk["load.storage"] > 1
    few_cores = plan(replace(JOB, decode_seconds=100), CLUSTER)
    assert few_cores["step_s"] == 100 * 100 / 4
    assert few_cores["load.cores"] > 1


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_a_ring_sends_what_the_formulas_say(processes: int) -> None:
    """A ring walked step by step: of an all-reduce a process sends 2 · (n − 1) parts, of a gather n − 1 times its own rows."""
    payload = 240
    sent = 0
    for _ in range(2 * (processes - 1)):
        sent += payload // processes
    assert all_reduce_bytes(payload, processes) == sent
    assert all_gather_bytes(payload, processes) == sum(payload for _ in range(processes - 1))


def test_memory_and_bytes() -> None:
    assert gpu_bytes(JOB, 2) == 50 * (4 + 4 + 8 + 4) + 50 * 2 * 7
    assert checkpoint_bytes(replace(JOB, teacher=False)) == 50 * 12
    assert loss_bytes(JOB, 1) == 0


def test_shards_give_each_worker_as_many() -> None:
    assert shards(JOB, CLUSTER, size=100, workers=2) == 1000
    assert shards(JOB, CLUSTER, size=1e9, workers=2) == 4  # one a worker at least
    assert shards(*LAION) % (256 * 4) == 0


def test_the_cadence_loses_least() -> None:
    """Failures at random, work lost back to the last checkpoint: Daly's cadence beats half and twice as often."""
    saving, mtbf = 30.0, 7200.0
    best = daly(saving, mtbf)
    assert best == pytest.approx(young(saving, mtbf), rel=0.06)
    assert daly(10.0, 4.0) == 4.0

    def duration(cadence: float) -> float:
        draw, clock, done = random.Random(0), 0.0, 0.0
        failure = draw.expovariate(1 / mtbf)
        while done < 3_000_000:
            if clock + cadence + saving < failure:
                clock, done = clock + cadence + saving, done + cadence
            else:
                clock = failure
                failure += draw.expovariate(1 / mtbf)
        return clock / done

    assert duration(best) < duration(best / 2.5)
    assert duration(best) < duration(best * 2.5)


def test_the_plans_that_docs_quote() -> None:
    figures = measure(1)
    assert figures["plan.imagenet.steps"] == 31_200
    assert figures["plan.laion.mtbf_h"] == pytest.approx(50_000 / 256)
    assert figures["plan.imagenet.load.gpu_memory"] > 1  # the batch needs `batch.micro`
    assert figures["plan.laion.load.gpu_memory"] < 1
    assert {name for name in figures if name.startswith("plan.laion.load") and figures[name] > 1} == set()
    assert IMAGENET[1].gpus == 8
