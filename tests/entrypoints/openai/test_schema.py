"""Whatever our own schema allows, or forbids, is answered: no 5xx, no hang, and every 4xx names its field."""

from __future__ import annotations

import logging
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode

# There is no model of sound, which these say of every request.
_NOT_IMPLEMENTED = ("/v1/audio/speech", "/v1/audio/generate")


def _affordable(body: Any) -> None:
    """Keep what is sound small: ten thousand steps are allowed, and would be taken."""
    for fields in (body, body.get("extra_body")) if isinstance(body, dict) else ():
        if not isinstance(fields, dict):
            continue
        steps, size = fields.get("num_inference_steps"), fields.get("size")
        if isinstance(steps, int) and not isinstance(steps, bool) and steps > 2:
            fields["num_inference_steps"] = 2
        if size in (None, "auto") and "width" not in fields and "height" not in fields:
            fields["size"] = "64x64"
        if isinstance(fields.get("n"), int) and fields["n"] > 2:
            fields["n"] = 2


def _check(response: Any, path: str) -> None:
    status = response.status_code
    if status == 501 and path in _NOT_IMPLEMENTED:
        return
    assert status < 500, response.text
    if 400 <= status < 500:
        error = response.json()["error"]
        assert error["message"], "an error says what is wrong"
        assert error["param"] is not None or status in (404, 405), f"{status}: {error} names no field"


def _run(server, max_examples):
    schema = schemathesis.openapi.from_url(f"{server.address}/openapi.json")
    counts = {}
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @hypothesis.settings(
                max_examples=max_examples,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[hypothesis.Phase.generate],
                suppress_health_check=list(hypothesis.HealthCheck),
            )
            @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
            def call(case):
                _affordable(case.body)
                response = case.call(timeout=60)
                counts[response.status_code] = counts.get(response.status_code, 0) + 1
                _check(response, case.path)

            try:
                call()
            except hypothesis.errors.Unsatisfiable:
                assert mode is GenerationMode.NEGATIVE, "an operation without parameters has no wrong ones"
    return counts


def test_a_few_cases_of_every_operation(server):
    counts = _run(server, 4)
    assert {200, 400, 404} <= counts.keys()


@pytest.mark.slow
def test_two_thousand_cases_of_images_and_videos(server, video_server):
    counts = [_run(server, 60), _run(video_server, 25)]
    total = sum(sum(count.values()) for count in counts)
    logging.getLogger(__name__).info("%d cases: %s", total, counts)  # --log-cli-level=INFO shows it
    assert total >= 2000
