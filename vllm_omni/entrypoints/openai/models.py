"""``/v1/models``: the model that is served, and what its requests may say."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from fastapi import APIRouter, Request

from vllm_omni.diffusion.data import TASKS, RequestSpec
from vllm_omni.diffusion.registry import resolve_diffusion_model
from vllm_omni.entrypoints.openai.server import Server, server_of
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

router = APIRouter(prefix="/v1/models", tags=["models"])

_USUAL_PARAMETERS = ("height", "width", "num_inference_steps", "guidance_scale")


@router.get("")
async def list_models(request: Request) -> dict[str, Any]:
    """The one model of this server, in a list."""
    return {"object": "list", "data": [_model(server_of(request))]}


@router.get("/{model:path}")
async def retrieve_model(model: str, request: Request) -> dict[str, Any]:
    """The model by its name."""
    server = server_of(request)
    server.check_model(model)
    return _model(server)


def _model(server: Server) -> dict[str, Any]:
    engine = server.omni.engine
    defaults = engine.request_defaults
    model = resolve_diffusion_model(engine.od_config.model_class_name)
    return {
        "id": server.model_name,
        "object": "model",
        "created": server.started,
        "owned_by": "vllm-omni",
        "output": engine.output_kind,
        "pipeline": engine.od_config.model_class_name,
        "takes_images": engine.takes_images,
        "shows_previews": engine.has_quick_previews,
        "defaults": defaults,
        **_what_requests_may_say(model.request_spec(engine.od_config), defaults),
    }


def _what_requests_may_say(spec: RequestSpec | None, defaults: dict[str, Any]) -> dict[str, Any]:
    """For clients that make a form of it. Of a model that does not say what it takes, the usual is assumed."""
    if spec is None:
        spec = RequestSpec(defaults=dict.fromkeys(_USUAL_PARAMETERS))
    hints = typing.get_type_hints(OmniDiffusionSamplingParams)
    fields = {field.name: field for field in dataclasses.fields(OmniDiffusionSamplingParams)}
    return {
        "tasks": list(spec.tasks),
        "needs_images": bool(spec.tasks) and all(TASKS[task] for task in spec.tasks),
        "takes_negative_prompt": "negative_prompt" in spec.prompt_keys,
        "size_multiple": spec.size_multiple,
        "parameters": {
            name: {
                "type": "integer" if int in typing.get_args(hints[name]) else "number",
                "default": defaults.get(name),  # null: it follows from the others
                "description": fields[name].metadata["help"],
            }
            for name in spec.defaults
        },
        "extra_args": {**spec.extra_args, **defaults.get("extra_args", {})},
    }
