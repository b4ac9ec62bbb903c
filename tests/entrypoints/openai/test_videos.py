"""Videos over HTTP, by the official client, and what outlives a server."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time

import av
import openai
import pytest
from PIL import Image

from tests import tiny_wan
from tests.serving import running_server
from vllm_omni import AsyncOmni
from vllm_omni.entrypoints.openai.jobs import _MAX_STARTS
from vllm_omni.entrypoints.openai.storage import Job, Storage
from vllm_omni.errors import InvalidConfigError

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")

SMALL = {"size": "48x32", "extra_body": {"num_frames": 5, "num_inference_steps": 2, "seed": 1, "fps": 8}}
LONG = {"prompt": "a cat", "size": "48x32", "num_frames": 5, "num_inference_steps": 5000}


@pytest.fixture
def client(video_server):
    with video_server.client() as openai_client:
        yield openai_client


def frames_of(content: bytes) -> int:
    with av.open(io.BytesIO(content)) as container:
        return len(list(container.decode(video=0)))


def wait(server, video_id, *states, seconds=60):
    status = None
    end = time.monotonic() + seconds
    while status not in states:
        assert time.monotonic() < end, f"{video_id} is {status}"
        time.sleep(0.01)
        video = server.call("GET", f"/v1/videos/{video_id}")[2]
        status = video["status"]
        assert status != "failed" or "failed" in states, video["error"]
    return video


def test_a_video_is_made_listed_downloaded_and_deleted(client, video_server):
    created = client.videos.create(prompt="a cat", **SMALL)
    assert (created.object, created.status, created.size, created.seconds) == ("video", "queued", "48x32", "0.625")
    done = client.videos.poll(created.id, poll_interval_ms=20)
    assert (done.status, done.progress, done.error) == ("completed", 100, None)
    assert done.receipt["num_frames"] == 5
    assert done.expires_at > done.completed_at >= done.created_at
    assert created.id in [video.id for video in client.videos.list(limit=5)]
    response = client.videos.download_content(created.id)
    assert response.response.headers["content-type"] == "video/mp4"
    assert json.loads(response.response.headers["x-receipt"])["receipt"]["seeds"] == [1]
    assert frames_of(response.content) == 5
    deleted = client.videos.delete(created.id)
    assert (deleted.deleted, deleted.object) == (True, "video.deleted")
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(created.id)
    assert client.videos.list().data == [] or created.id not in [video.id for video in client.videos.list().data]


def test_progress_is_true_and_a_running_job_can_be_deleted(video_server):
    created = video_server.call("POST", "/v1/videos", LONG)[2]
    running = wait(video_server, created["id"], "in_progress")
    live = video_server.omni.live.find(created["id"])
    assert abs(running["progress"] - 100 * live.step / live.num_steps) < 20
    status, _, answer = video_server.call("GET", f"/v1/videos/{created['id']}/content")
    assert (status, answer["error"]["code"]) == (409, "video_not_ready")
    assert video_server.call("DELETE", f"/v1/videos/{created['id']}")[2]["deleted"]
    video_server.wait_until(lambda: video_server.state_of(created["id"]) == "aborted")
    assert video_server.call("GET", f"/v1/videos/{created['id']}")[0] == 404


def test_a_job_that_is_cancelled_as_a_request_says_so(video_server):
    created = video_server.call("POST", "/v1/videos", LONG)[2]
    wait(video_server, created["id"], "in_progress")
    assert video_server.call("DELETE", f"/v1/requests/{created['id']}")[0] == 200
    assert wait(video_server, created["id"], "failed")["error"]["code"] == "cancelled"


def test_a_video_that_is_waited_for_comes_in_the_answer(video_server):
    body = {"prompt": "a cat", "size": "48x32", "seconds": "0.7", "fps": 8, "num_inference_steps": 1}
    status, headers, content = video_server.call("POST", "/v1/videos/sync", body)
    assert (status, headers["Content-Type"]) == (200, "video/mp4")
    assert json.loads(headers["X-Receipt"])["receipt"]["num_frames"] == 5, "0.7 s of 8 per second come nearest to 5"
    assert frames_of(content) == 5


def test_pages_of_jobs_follow_each_other(video_server):
    ids = [video_server.call("POST", "/v1/videos", LONG | {"num_inference_steps": 1})[2]["id"] for _ in range(3)]
    for video_id in ids:
        wait(video_server, video_id, "completed")
    page = video_server.call("GET", "/v1/videos?limit=2&order=asc")[2]
    following = video_server.call("GET", f"/v1/videos?limit=100&order=asc&after={page['last_id']}")[2]
    listed = [video["id"] for video in page["data"] + following["data"]]
    assert page["has_more"]
    assert not following["has_more"]
    assert sorted(ids) == sorted(set(ids) & set(listed))
    assert len(listed) == len(set(listed))
    for video_id in ids:
        video_server.call("DELETE", f"/v1/videos/{video_id}")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"size": "50x32"}, "size"),
        ({"num_frames": 6}, "num_frames"),
        ({"seconds": "4", "num_frames": 5}, "seconds"),
        ({"seconds": "soon"}, "seconds"),
        ({"seconds": -1}, "seconds"),
        ({"seconds": [4]}, "seconds"),
        ({"n": 2}, "n"),
        ({"model": "sora-2"}, "model"),
        ({"prompt": 5}, "prompt"),
        ({"input_reference": {"image_url": "data:image/png;base64,AAAA"}}, "input_reference"),
        ({"input_reference": {"image_url": "file:///etc/passwd"}}, "input_reference"),
        ({"input_reference": {"file_id": "x"}}, "file_id"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/videos", "/v1/videos/sync"])
def test_bad_input_names_the_field_and_makes_no_job(video_server, fields, param, path):
    before = video_server.call("GET", "/v1/videos?limit=100")[2]["data"]
    status, _, answer = video_server.call("POST", path, {"prompt": "a cat"} | fields)
    assert (status, answer["error"]["param"]) == (404 if param == "model" else 400, param)
    assert video_server.call("GET", "/v1/videos?limit=100")[2]["data"] == before


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/v1/videos/video_none", "video_id"),
        ("/v1/videos/video_none/content", "video_id"),
        ("/v1/videos?after=video_none", "after"),
        ("/files/../jobs.sqlite3", None),
        ("/files/jobs.sqlite3", "name"),
    ],
)
def test_what_is_not_there_is_a_404(video_server, path, param):
    status, _, answer = video_server.call("GET", path)
    assert (status, answer["error"]["param"]) == (404, param)


def test_a_model_answers_only_for_what_it_makes(video_server, server):
    status, _, answer = video_server.call("POST", "/v1/images/generations", {"prompt": "a cat"})
    assert (status, answer["error"]["code"]) == (400, "unsupported_model")
    picture = {"input_reference": {"image_url": "https://pictures.test/is/not/fetched.png"}}
    for fields in ({}, picture):
        answer = server.call("POST", "/v1/videos", {"prompt": "a cat"} | fields)[2]
        assert answer["error"]["code"] == "unsupported_model"
    status, _, answer = server.call("POST", "/v1/audio/speech", {"input": "hello"})
    assert (status, answer["error"]["param"]) == (501, "model")


def test_a_picture_starts_a_video(tmp_path):
    folder = tiny_wan.wan_i2v(tmp_path / "model")
    file = io.BytesIO()
    Image.new("RGB", (48, 32), "red").save(file, "PNG")
    with AsyncOmni(str(folder)) as omni, running_server(omni) as server, server.client() as client:
        with pytest.raises(openai.BadRequestError) as caught:
            client.videos.create(prompt="a cat", **SMALL)
        assert caught.value.param == "input_reference"
        created = client.videos.create(prompt="a cat", input_reference=("a.png", file.getvalue(), "image/png"), **SMALL)
        assert client.videos.poll(created.id, poll_interval_ms=20).status == "completed"


def test_jobs_of_one_second_are_listed_in_the_order_in_which_they_came(tmp_path):
    with contextlib.closing(Storage(tmp_path, max_age_s=100, max_bytes=1e9)) as storage:
        jobs = [Job(id=f"video_{key}", created=1, fields={}) for key in "cadb"]
        for job in jobs:
            storage.add_job(job)
        assert storage.unfinished_jobs() == jobs
        assert storage.jobs(after="video_a", limit=2, newest_first=False) == (jobs[2:], False)
        assert storage.jobs(after=None, limit=2, newest_first=True) == ([jobs[3], jobs[2]], True)


def test_unfinished_jobs_run_again_in_the_next_server_and_finished_ones_are_there(video_folder, tmp_path):
    with AsyncOmni(str(video_folder)) as omni:
        with running_server(omni, storage_dir=tmp_path, drain_timeout_s=0) as first:
            done = first.call("POST", "/v1/videos", LONG | {"num_inference_steps": 1})[2]["id"]
            wait(first, done, "completed")
            cut_off = first.call("POST", "/v1/videos", LONG | {"num_inference_steps": 400})[2]["id"]
            wait(first, cut_off, "in_progress")
        assert not omni.live.in_progress
        with contextlib.closing(Storage(tmp_path, max_age_s=100, max_bytes=1e9)) as storage:
            assert storage.job(cut_off).state in ("queued", "in_progress")
        with running_server(omni, storage_dir=tmp_path) as second:
            assert frames_of(second.call("GET", f"/v1/videos/{done}/content")[2]) == 5
            assert wait(second, cut_off, "completed")["receipt"]["num_inference_steps"] == 400


@pytest.mark.parametrize("step_ends_after_s", [0, 2])
def test_a_job_that_is_cancelled_while_its_server_ends_does_not_come_back(
    video_folder, tmp_path, monkeypatch, step_ends_after_s
):
    """Also where the server, which has a second, ends before the step behind which the engine would end the job."""
    with AsyncOmni(str(video_folder)) as omni:
        execute, step_may_end = omni.engine._executor.execute, threading.Event()

        def held(command):
            step_may_end.wait(timeout=60)
            return execute(command)

        monkeypatch.setattr(omni.engine._executor, "execute", held)
        with running_server(omni, storage_dir=tmp_path, drain_timeout_s=2) as server:
            job = server.call("POST", "/v1/videos", LONG)[2]["id"]
            wait(server, job, "in_progress")
            server.http_server.should_exit = True
            server.wait_until(lambda: server.http_server.state.is_draining)
            assert server.call("DELETE", f"/v1/requests/{job}")[0] == 200
            threading.Timer(step_ends_after_s, step_may_end.set).start()
        assert step_may_end.is_set()
    with contextlib.closing(Storage(tmp_path, max_age_s=100, max_bytes=1e9)) as storage:
        assert (storage.job(job).state, storage.job(job).error["code"]) == ("failed", "cancelled")


def test_a_job_that_is_cancelled_stays_so_though_its_workers_fail(video_server, monkeypatch):
    executor, may_fail = video_server.omni.engine._executor, threading.Event()

    def failing(command):
        may_fail.wait(timeout=60)
        monkeypatch.undo()
        raise RuntimeError("a worker is gone")

    monkeypatch.setattr(executor, "execute", failing)
    job = video_server.call("POST", "/v1/videos", LONG)[2]["id"]
    wait(video_server, job, "in_progress")
    video_server.call("DELETE", f"/v1/requests/{job}")
    may_fail.set()
    video_server.wait_until(lambda: video_server.omni.live.find(job).is_finished)
    time.sleep(0.2)
    assert video_server.omni.live.find(job).is_finished, "it does not start again"
    assert wait(video_server, job, "failed")["error"]["code"] == "cancelled"


def test_a_job_that_runs_again_keeps_its_place(video_server, monkeypatch):
    placings, add_request = [], video_server.omni.engine.add_request

    def add(request, **placing):
        placings.append(placing)
        return add_request(request, **placing)

    executor = video_server.omni.engine._executor
    execute, failures = executor.execute, iter(range(1))

    def failing(command):
        if command.step and next(failures, None) is not None:
            raise RuntimeError("a worker is gone")
        return execute(command)

    monkeypatch.setattr(video_server.omni.engine, "add_request", add)
    monkeypatch.setattr(executor, "execute", failing)
    placed = {"num_inference_steps": 2, "priority": 3, "user": "someone", "deadline_s": 1000.0}
    wait(video_server, video_server.call("POST", "/v1/videos", LONG | placed)[2]["id"], "completed")
    first, again = placings
    assert first == {"priority": 3, "client": "someone", "deadline_s": 1000.0}
    assert 900 < again.pop("deadline_s") <= 1000
    assert again == {"priority": 3, "client": "someone"}


@pytest.mark.parametrize("num_failures", [1, 3])
def test_a_job_whose_workers_fail_runs_again_but_not_for_ever(video_server, monkeypatch, num_failures):
    failures = iter(range(num_failures))
    executor = video_server.omni.engine._executor
    execute = executor.execute

    def failing(command):
        if command.step and next(failures, None) is not None:
            raise RuntimeError("a worker is gone")
        return execute(command)

    monkeypatch.setattr(executor, "execute", failing)
    job = video_server.call("POST", "/v1/videos", LONG | {"num_inference_steps": 2})[2]["id"]
    ended = wait(video_server, job, "completed" if num_failures == 1 else "failed")
    assert num_failures == 1 or ended["error"]["code"] == "engine_failure"
    assert next(failures, None) is None


def test_a_job_that_takes_the_server_with_it_is_given_up(video_folder, tmp_path):
    job = Job(fields={"prompt": "a cat", "size": "48x32", "num_frames": 5, "num_inference_steps": 3})
    job.state, job.num_starts = "in_progress", _MAX_STARTS
    with contextlib.closing(Storage(tmp_path, max_age_s=100, max_bytes=1e9)) as storage:
        storage.add_job(job)
    with AsyncOmni(str(video_folder)) as omni, running_server(omni, storage_dir=tmp_path) as server:
        assert wait(server, job.id, "failed")["error"]["code"] == "too_many_restarts"


def test_a_start_is_on_the_disk_before_the_work_that_may_crash(video_folder, tmp_path):
    """A process that is killed while it prepares a job for the third time: the next one does not try again."""
    job = Job(fields={"prompt": "a cat", "size": "48x32", "num_frames": 5, "num_inference_steps": 3}, num_starts=2)
    with contextlib.closing(Storage(tmp_path, max_age_s=100, max_bytes=1e9)) as storage:
        storage.add_job(job)
    ended = subprocess.run([sys.executable, "-c", KILLED_IN_PREPARE, video_folder, tmp_path], timeout=120, check=False)
    assert ended.returncode == -signal.SIGKILL
    with contextlib.closing(Storage(tmp_path, max_age_s=100, max_bytes=1e9)) as storage:
        assert (storage.job(job.id).state, storage.job(job.id).num_starts) == ("in_progress", 3)
    with AsyncOmni(str(video_folder)) as omni, running_server(omni, storage_dir=tmp_path) as server:
        assert wait(server, job.id, "failed")["error"]["code"] == "too_many_restarts"
        assert not omni.live.all(), "it is not begun once more"


KILLED_IN_PREPARE = """
import os, signal, sys, time
from tests.serving import running_server
from vllm_omni import AsyncOmni

with AsyncOmni(sys.argv[1]) as omni:
    runner = omni.engine._executor._worker._runner
    runner.pipeline.prepare = lambda request: os.kill(os.getpid(), signal.SIGKILL)
    with running_server(omni, storage_dir=sys.argv[2]):
        time.sleep(60)
"""


def test_a_job_that_waits_again_is_called_queued(video_folder, tmp_path, monkeypatch):
    """On the disk, after a restart and after its workers failed."""
    job = Job(fields={"prompt": "a cat", "size": "48x32", "num_frames": 5, "num_inference_steps": 2})
    job.state, job.num_starts = "in_progress", 1
    with contextlib.closing(Storage(tmp_path, max_age_s=100, max_bytes=1e9)) as storage:
        storage.add_job(job)
    with AsyncOmni(str(video_folder)) as omni:
        written, put_job = [], Storage.put_job
        execute, failures = omni.engine._executor.execute, iter(range(1))

        def put(storage, changed):
            written.append((changed.state, changed.num_starts))
            put_job(storage, changed)

        def failing(command):
            if command.step and next(failures, None) is not None:
                raise RuntimeError("a worker is gone")
            return execute(command)

        monkeypatch.setattr(Storage, "put_job", put)
        monkeypatch.setattr(omni.engine._executor, "execute", failing)
        with running_server(omni, storage_dir=tmp_path) as server:
            wait(server, job.id, "completed")
    starts = [("queued", 1), ("in_progress", 2), ("queued", 2), ("in_progress", 3)]
    assert written == [*starts, ("completed", 3)]


def test_results_go_by_age_and_by_bytes_the_oldest_first(tmp_path):
    with contextlib.closing(Storage(tmp_path, max_age_s=50, max_bytes=250)) as storage:
        names = [storage.put_file(b"x" * 100, "png") for _ in range(3)]
        old = Job(fields={}, state="completed", completed=int(time.time()) - 60, file=storage.put_file(b"y", "mp4"))
        waiting = Job(fields={}, input_file=names[0])
        storage.add_job(old)
        storage.add_job(waiting)
        storage._database.execute("UPDATE files SET created = created - 10 WHERE name = ?", (names[0],))
        storage._database.execute("UPDATE files SET created = created - 5 WHERE name = ?", (names[1],))
        (tmp_path / "files" / "left.partial").write_bytes(b"")
        os.utime(tmp_path / "files" / "left.partial", (0, 0))
        storage.sweep()
        assert [storage.file(name) is not None for name in names] == [True, True, True]
        storage.delete_job(waiting)
        names.append(storage.put_file(b"x" * 100, "png"))
        storage.sweep()
        assert [storage.file(name) is not None for name in names] == [False, False, True, True]
        assert storage.job(old.id) is None
        assert not (tmp_path / "files" / "left.partial").exists()


def test_a_job_that_was_deleted_does_not_come_back_by_a_late_word_of_it(tmp_path):
    job = Job(fields={"prompt": "a cat"})
    with contextlib.closing(Storage(tmp_path, max_age_s=100, max_bytes=1e9)) as storage:
        storage.add_job(job)
        job.state = "in_progress"
        storage.put_job(job)
        assert [found.state for found in storage.unfinished_jobs()] == ["in_progress"]
        storage.delete_job(job)
        storage.put_job(job)
        assert storage.job(job.id) is None


def test_a_folder_serves_one_server_at_a_time(tmp_path):
    first = Storage(tmp_path, max_age_s=1, max_bytes=1)
    with pytest.raises(InvalidConfigError, match="another server"):
        Storage(tmp_path, max_age_s=1, max_bytes=1)
    first.close()
    Storage(tmp_path, max_age_s=1, max_bytes=1).close()
