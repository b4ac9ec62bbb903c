"""``vllm-omni serve``: a model behind OpenAI's HTTP interface."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import resource
import sys
from contextlib import closing

from vllm_omni import envs
from vllm_omni.diffusion.data import TASKS
from vllm_omni.entrypoints.async_omni import AsyncOmni
from vllm_omni.entrypoints.cli.arguments import add_engine_arguments, add_field_arguments, engine_values
from vllm_omni.entrypoints.openai.config import ServerConfig
from vllm_omni.entrypoints.openai.run import HttpServer, bind, open_storage

# A file descriptor for each client; the usual limit of 1024 can be raised to this by every user.
_MOST_DESCRIPTORS = 10_240


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument(
        "model", nargs="?", help="folder of a diffusers pipeline, or a hub id; absent: the model that ships along"
    )
    parser.add_argument("--task", choices=tuple(TASKS), metavar="TASK", help="what to make: %(choices)s")
    parser.add_argument("--omni", action="store_true", help="accepted for vLLM's command line; changes nothing")
    fields = dataclasses.fields(ServerConfig)
    add_field_arguments(parser.add_argument_group("server"), [(ServerConfig, field) for field in fields])
    add_engine_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Load the model and serve it until SIGTERM or Ctrl-C."""
    given = vars(arguments)
    names = {field.name for field in dataclasses.fields(ServerConfig)}
    config = ServerConfig(**{"api_key": envs.api_key()} | {name: given[name] for name in names & given.keys()})
    # The engine's thread works in many short pieces; it must not wait 5 ms for the event loop between each two.
    sys.setswitchinterval(0.0005)
    _raise_descriptor_limit()
    with bind(config) as listener, closing(open_storage(config)) as storage:
        omni = AsyncOmni(arguments.model, task=arguments.task, max_queue=config.max_queue, **engine_values(given))
        with omni:
            HttpServer(omni, config, arguments.model, listener, storage).run()
    # The interpreter would look through all objects of all libraries several times before it ends, for a second.
    gc.freeze()


def _raise_descriptor_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    reachable = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(_MOST_DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < reachable:
        resource.setrlimit(resource.RLIMIT_NOFILE, (reachable, hard))
