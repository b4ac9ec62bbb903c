"""Requests of every tiny and shipped model, small and of sizes that do not divide by the number of ranks."""

from __future__ import annotations

from typing import Any

from tests.tiny_qwen_edit import picture

Requests = tuple[list[Any], list[dict[str, Any]]]

SHORT, LONG = "a red circle", "a cat holding a sign that says hello"
# Every family, and every way in which one of its models differs where ranks matter.
FAMILIES = ("qwen_image", "flux", "wan_t2v")
MODELS = (
    *FAMILIES,
    "shipped_image",
    "shipped_edit",
    "shipped_video",
    "qwen_image_edit",
    "qwen_image_edit_plus",
    "qwen_image_layered",
    "flux_kontext",
    "wan_ti2v",
    "wan_i2v",
    "wan_i2v_21",
)


def requests_of(model: str) -> Requests:
    """Two requests that advance together: one without guidance, and one with it and two outputs."""
    guided: Any = {"prompt": LONG, "negative_prompt": "dark"}
    plain: Any = SHORT
    if model in (
        "qwen_image_edit",
        "qwen_image_edit_plus",
        "qwen_image_layered",
        "flux_kontext",
        "wan_i2v",
        "wan_i2v_21",
        "shipped_edit",
    ):
        size = (64, 64) if model == "shipped_edit" else (48, 40)
        image = {"multi_modal_data": {"image": picture(*size)}}
        plain, guided = {"prompt": SHORT, **image}, {**guided, **image}
    shared: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent"}
    if model == "qwen_image_layered":
        shared["extra_args"] = {"layers": 2}
    else:
        shared |= {"height": 80, "width": 112}
    if model.startswith("shipped"):
        side = 192 if model == "shipped_edit" else 96
        shared |= {"height": side, "width": side}
    if model.startswith("wan") or model == "shipped_video":
        shared |= {"height": 96, "width": 64, "num_frames": 5, "num_inference_steps": 5}
        scale = "guidance_scale"
    else:
        scale = "true_cfg_scale"
    outputs = 1 if model == "qwen_image_layered" else 2
    return [plain, guided], [
        {**shared, "seed": 1, scale: 1.0},
        {**shared, "seed": 5, scale: 3.0, "num_outputs_per_prompt": outputs},
    ]
