"""Ranks on the machines of a Ray cluster: two nodes of one CPU each, both on this machine."""

from __future__ import annotations

import os
import signal
import socket
import sys
import warnings

import pytest
import torch

from tests.parallel.test_faults import gone_within
from tests.parity import LATENT_TOLERANCE
from vllm_omni import Omni, OmniDiffusionSamplingParams
from vllm_omni.diffusion.engine import ray_rank_pool
from vllm_omni.diffusion.worker.channel import Channel
from vllm_omni.errors import FeatureNotAvailableError, GenerationError, RankFailureError

PARAMS = OmniDiffusionSamplingParams(
    height=64, width=64, num_inference_steps=2, seed=1, true_cfg_scale=3.0, output_type="latent"
)
PROMPTS = [{"prompt": "a red circle", "negative_prompt": "dark"}, {"prompt": "a cat", "negative_prompt": "dark"}]


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    # Ray leaves sockets and files of its own open until the interpreter ends.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False)
        yield ray
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def expected(qwen_omni):
    return [output.images[0] for output in qwen_omni.generate(PROMPTS, PARAMS)]


def assert_generates(omni, expected):
    for output, latents in zip(omni.generate(PROMPTS, PARAMS), expected, strict=True):
        assert (output.images[0] - latents).abs().max() <= LATENT_TOLERANCE


@pytest.mark.parallel
@pytest.mark.filterwarnings("ignore")
def test_ranks_on_two_nodes_share_a_model_and_start_again_after_one_was_killed(cluster, qwen_folder, expected):
    with Omni(str(qwen_folder), device="cpu", tensor_parallel_size=2, distributed_executor_backend="ray") as omni:
        assert_generates(omni, expected)
        pids = omni._engine._executor.pids
        groups = [group for group in cluster.util.placement_group_table().values() if group["state"] == "CREATED"]
        assert len(set(groups[0]["bundles_to_node_id"].values())) == 2
        with pytest.raises(GenerationError, match="rank 1 of 2 ended: ActorDiedError") as caught:
            omni.generate(PROMPTS, PARAMS, progress=lambda event: os.kill(pids[1], signal.SIGKILL))
        assert isinstance(caught.value.outputs[0].error, RankFailureError)
        assert_generates(omni, expected)
        pids += omni._engine._executor.pids
    assert gone_within(pids, 5)


@pytest.mark.parallel
@pytest.mark.filterwarnings("ignore")
def test_replicas_run_on_two_nodes(cluster, qwen_folder, expected):
    with Omni(str(qwen_folder), device="cpu", data_parallel_size=2, distributed_executor_backend="ray") as omni:
        assert_generates(omni, expected)
        pids = [pid for replica in omni._engine._executor.replicas for pid in replica.pids]
        assert len(set(pids)) == 2
    assert gone_within(pids, 5)


@pytest.mark.parallel
@pytest.mark.filterwarnings("ignore")
def test_a_cluster_without_room_says_what_is_free(cluster, qwen_folder, monkeypatch):
    monkeypatch.setattr(ray_rank_pool, "_PLACING_S", 1.0)
    with pytest.raises(RankFailureError, match=r"no room for 4 ranks of \{'CPU': 1\} for 1 s; free are \{'CPU': 2"):
        Omni(str(qwen_folder), device="cpu", tensor_parallel_size=4, distributed_executor_backend="ray")


def test_without_ray_the_error_says_what_to_install(qwen_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(FeatureNotAvailableError, match=r"needs the package ray: pip install 'vllm-omni\[ray\]'"):
        Omni(str(qwen_folder), device="cpu", tensor_parallel_size=2, distributed_executor_backend="ray")


def test_large_messages_travel_to_another_machine_by_their_content():
    server = socket.create_server(("127.0.0.1", 0))
    ours = Channel(socket.create_connection(server.getsockname()))
    theirs = Channel(server.accept()[0])
    ours.send({"x": torch.arange(10_000)})
    assert torch.equal(theirs.receive()["x"], torch.arange(10_000))
    ours.send("small")
    assert theirs.receive() == "small"
    for end in (ours, theirs, server):
        end.close()
