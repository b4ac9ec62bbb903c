"""The files of docker/: whether they can be read, fit together, and ask for what the server exports."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.serving import SMALL, running_server
from vllm_omni import AsyncOmni
from vllm_omni.entrypoints.cli.serve import add_arguments

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
PANELS = json.loads((DOCKER / "grafana/dashboards/vllm-omni.json").read_text())["panels"]


def read(name):
    return yaml.safe_load((DOCKER / name).read_text())


def instructions(text):
    """``(instruction, argument)`` of a Dockerfile, continued lines joined."""
    lines = re.sub(r"\\\n\s*", "", re.sub(r"(?m)^#.*\n", "", text)).splitlines()
    return [tuple(line.split(" ", 1)) for line in lines if line.strip()]


@pytest.fixture(scope="module")
def exported():
    """All time series of a server that made a picture: name -> the label sets that it has."""
    with AsyncOmni() as omni, running_server(omni) as server, server.client() as client:
        client.images.generate(prompt="a red circle", **SMALL)
        text = server.call("GET", "/metrics")[2].decode()
    series = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not sample.name.endswith("_created"):  # the library's own, of when each series began
                series.setdefault(sample.name, []).append(sample.labels)
    return series


def test_every_panel_asks_for_series_that_a_server_exports(exported):
    for panel in PANELS:
        for target in panel["targets"]:
            asked = re.findall(r"(vllm_omni_\w+)(?:{([^}]*)})?", target["expr"])
            assert asked, target
            grouped = ",".join(re.findall(r"by \(([^)]*)\)", target["expr"])).replace(" ", "").split(",")
            shown = re.findall(r"{{(\w+)}}", target["legendFormat"])
            for name, selector in asked:
                assert name in exported, f"{panel['title']} asks for what no server exports"
                chosen = exported[name]
                for label, sign, value in re.findall(r'(\w+)(!?=)"(\w+)"', selector):
                    chosen = [one for one in chosen if (one[label] == value) == (sign == "=")]
                assert chosen, f"{panel['title']}: no {name} has {selector}"
                assert all({*grouped, *shown} - {""} <= one.keys() for one in chosen), target["expr"]


def test_every_metric_is_on_the_dashboard(exported):
    asked = set(re.findall(r"vllm_omni_\w+", json.dumps(PANELS)))
    for name in exported:
        family = re.sub(r"_(bucket|sum|count|total)$", "", name)
        assert any(one.startswith(family) for one in asked), f"no panel shows {family}"


def test_a_failure_counts_from_a_series_that_is_there_before_it(exported):
    assert {one["state"] for one in exported["vllm_omni_requests_total"]} == {"completed", "aborted", "failed"}
    assert {"type": "RankFailureError"} in exported["vllm_omni_errors_total"]


def test_the_parts_of_the_compose_file_find_each_other():
    compose = read("compose.yaml")
    services = compose["services"]
    for service in services.values():
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            assert (DOCKER / source).exists() if source.startswith(".") else source in compose["volumes"], mount
    build = services["vllm-omni"]["build"]
    assert (DOCKER / build["context"] / build["dockerfile"]).samefile(DOCKER / "Dockerfile")
    (job,) = read("prometheus.yml")["scrape_configs"]
    assert job["static_configs"][0]["targets"] == ["vllm-omni:8091"]
    assert job["authorization"]["credentials_file"] == f"/run/secrets/{services['prometheus']['secrets'][0]}"
    (source,) = read("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"]["timeInterval"] == read("prometheus.yml")["global"]["scrape_interval"]
    assert {panel["datasource"]["uid"] for panel in PANELS} == {source["uid"]}
    (provider,) = read("grafana/provisioning/dashboards/vllm-omni.yaml")["providers"]
    assert any(mount.split(":")[1] == provider["options"]["path"] for mount in services["grafana"]["volumes"])
    assert read("compose.gpu.yaml")["services"].keys() <= services.keys()


def test_the_commands_that_the_image_and_the_compose_file_run_are_ours():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    dockerfile = dict(instructions((DOCKER / "Dockerfile").read_text()))
    assert json.loads(dockerfile["ENTRYPOINT"]) == ["vllm-omni"]
    composed = read("compose.yaml")["services"]["vllm-omni"]["command"]
    for command in (json.loads(dockerfile["CMD"]), shlex.split(composed.replace("${MODEL:-}", ""))):
        assert command[0] == "serve"
        given = parser.parse_args(command[1:])
        assert (given.host, given.port, str(given.storage_dir)) == ("0.0.0.0", 8091, "/data")


def test_what_the_image_copies_is_there_and_not_ignored():
    parts = instructions((DOCKER / "Dockerfile").read_text())
    known = {
        "FROM",
        "RUN",
        "WORKDIR",
        "ENV",
        "COPY",
        "ARG",
        "USER",
        "VOLUME",
        "EXPOSE",
        "HEALTHCHECK",
        "ENTRYPOINT",
        "CMD",
    }
    assert {name for name, _ in parts} <= known
    kept = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"}
    for name, argument in parts:
        if name == "COPY":
            for source in argument.split()[:-1]:
                assert (ROOT / source).exists()
                assert source in kept
    users = [argument for name, argument in parts if name == "USER"]
    assert users == ["omni"], "the server does not run as root"
