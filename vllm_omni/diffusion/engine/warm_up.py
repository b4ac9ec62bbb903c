"""Requests that the engine gives itself before it serves, so that compiling and capturing are done by then."""

from __future__ import annotations

import time
from typing import Any

from PIL import Image

from vllm_omni.diffusion.engine.engine import Engine
from vllm_omni.diffusion.start_config import WarmupSize
from vllm_omni.errors import InvalidConfigError, InvalidRequestError, OmniError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.logger import init_logger

logger = init_logger(__name__)

# The first step of a shape compiles, the third captures a CUDA graph, the fourth replays it. From five steps on their
# modulations are prepared by the kernel that longer requests use.
_NUM_STEPS = 5
_PICTURE_SIDE = 1024  # of the picture to edit, where the size follows from it


def warm_up(engine: Engine, *, is_server: bool) -> None:
    """Run each size of ``warmup_sizes`` as one output and as two, which are compiled apart.

    Raises ``InvalidConfigError`` for a size that the model does not take, and the error of a request that fails. Two
    outputs that do not fit are left out.
    """
    config = engine.od_config
    is_default = config.start.warmup_sizes is None
    serves_compiled = is_server and not config.enforce_eager and config.load_format != "dummy"
    for size in config.start.sizes(("default",) if serves_compiled else ()):
        for num_outputs in (1, 2):
            started = time.perf_counter()
            try:
                _run(engine, size, num_outputs)
            except InvalidRequestError as error:
                if num_outputs == 1 and is_default:
                    logger.warning("no warm-up: the model does not take a request of its defaults alone (%s)", error)
                    return
                if num_outputs == 1:
                    raise InvalidConfigError(
                        f"warmup_sizes: {'x'.join(map(str, size))}: {error}", option="warmup_sizes"
                    ) from error
                logger.warning("two outputs at once are not warmed up: %s", error)
            except MemoryError as error:
                if num_outputs == 1:
                    raise
                logger.warning("two outputs at once are not warmed up: %s", error)
            logger.info("warmed up %s, %d outputs: %.1f s", size, num_outputs, time.perf_counter() - started)


def _run(engine: Engine, size: WarmupSize, num_outputs: int) -> None:
    width, height, num_frames = size
    params = OmniDiffusionSamplingParams(
        width=width,
        height=height,
        num_frames=num_frames,
        num_inference_steps=_NUM_STEPS,
        num_outputs_per_prompt=num_outputs,
        seed=0,
    )
    prompt: dict[str, Any] = {"prompt": "a picture"}
    if engine.needs_images:
        picture = Image.new("RGB", (width or _PICTURE_SIDE, height or _PICTURE_SIDE), "gray")
        prompt["multi_modal_data"] = {"image": picture}
    # Each replica takes one.
    for _ in range(engine.od_config.parallel_config.data_parallel_size):
        engine.add_request(engine.validate(prompt, params))
    errors: list[BaseException] = []
    while engine.has_requests:
        errors += [output.error for output in engine.step().outputs if output.error is not None]
    if errors:
        raise errors[0] if isinstance(errors[0], OmniError) else RuntimeError(f"the warm-up failed: {errors[0]}")
