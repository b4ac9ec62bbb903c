"""A crowd: many clients at once, some of whom change their minds. Takes minutes."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import logging
import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import openai
import pytest
from PIL import Image

from benchmarks import serving
from tests.serving import running_server
from vllm_omni import AsyncOmni, Omni, OmniDiffusionSamplingParams

pytestmark = pytest.mark.slow

logger = logging.getLogger(__name__)  # --log-cli-level=INFO shows the figures

NUM_REQUESTS = 300
AT_ONCE = 32
ENDS = ("gone", "cancelled", "rank_failure")
KILLED_AT = 200  # requests that have ended when a worker is killed


def resident_mb() -> float:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


async def crowd(server, omni, numbers, outcomes):
    """Each request ends in a picture, a cancellation or an error; ``outcomes`` has one for every number."""
    choose = random.Random(numbers[0])
    seats = asyncio.Semaphore(AT_ONCE)
    async with openai.AsyncOpenAI(base_url=f"{server.address}/v1", api_key="x", max_retries=0, timeout=600) as client:

        async def one(number):
            fields, fate = request_of(number), choose.random()
            async with seats:
                request_id = f"load-{number}"
                sending = asyncio.create_task(
                    client.images.generate(**fields, extra_headers={"X-Request-Id": request_id})
                )
                if fate < 0.2:
                    await asyncio.sleep(choose.random() * 2)
                    if fate < 0.1:
                        sending.cancel()
                    else:
                        omni.abort(request_id)
                try:
                    outcomes[number] = (await sending).data[0].b64_json
                except asyncio.CancelledError:
                    outcomes[number] = "gone"
                except (openai.ConflictError, openai.InternalServerError) as error:
                    outcomes[number] = error.code
                if len(outcomes) == KILLED_AT:
                    os.kill(omni.engine._executor.replicas[0].pids[0], signal.SIGKILL)

        await asyncio.gather(*(one(number) for number in numbers))


def request_of(number):
    choose = random.Random(number)
    side, steps = choose.choice((64, 64, 128, 256)), choose.randint(2, 12)
    return {
        "prompt": f"a {choose.choice(('red', 'blue', 'green'))} circle",
        "size": f"{side}x{side}",
        "extra_body": {"num_inference_steps": steps, "seed": number},
    }


def test_every_request_of_a_crowd_ends_though_a_worker_is_killed_and_pictures_are_those_of_the_seeds_alone():
    outcomes = {}
    with (
        AsyncOmni(max_queue=NUM_REQUESTS, device="cpu", data_parallel_size=2) as omni,
        running_server(omni) as server,
    ):
        first_pids = [replica.pids for replica in omni.engine._executor.replicas]
        asyncio.run(crowd(server, omni, range(NUM_REQUESTS // 3), outcomes))
        before = resident_mb()
        asyncio.run(crowd(server, omni, range(NUM_REQUESTS // 3, NUM_REQUESTS), outcomes))
        server.wait_until(lambda: not omni.engine.has_requests)
        grown = resident_mb() - before
        replicas = omni.engine._executor.replicas
        assert [replica.num_in_flight for replica in replicas] == [0, 0]
        assert not omni.live.in_progress
        assert [replica.pids == pids for replica, pids in zip(replicas, first_pids, strict=True)] == [False, True]
    assert len(outcomes) == NUM_REQUESTS
    pictures = {number: text for number, text in outcomes.items() if text not in ENDS}
    kinds = [outcomes[number] if number not in pictures else "picture" for number in outcomes]
    logger.info("%s, memory grew by %.0f MB", {kind: kinds.count(kind) for kind in set(kinds)}, grown)
    assert len(pictures) > 0.7 * NUM_REQUESTS
    assert 0 < kinds.count("rank_failure") <= omni.od_config.max_num_seqs
    assert grown < 64
    with Omni() as offline:
        for number in random.Random(0).sample(sorted(pictures), 60):
            fields = request_of(number)
            side = int(fields["size"].partition("x")[0])
            params = OmniDiffusionSamplingParams(height=side, width=side, **fields["extra_body"])
            alone = np.asarray(offline.generate(fields["prompt"], params)[0].images[0], np.int16)
            shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(pictures[number]))), np.int16)
            assert np.abs(alone - shown).max() <= 2, f"request {number} depends on who ran beside it"


def test_small_requests_do_not_wait_behind_long_ones(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["serving", "mixed", "--num-requests", "100", "--side", "64"])
    results = serving.measure_mixed(serving.parse_args())
    logger.info("%s", results)
    assert results["p95_gain"] >= 4
    assert results["throughput_ratio"] >= 0.97
