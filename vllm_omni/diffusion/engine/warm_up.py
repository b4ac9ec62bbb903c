"""Requests that the engine gives itself before it serves, so that compiling and capturing are done by then."""

from __future__ import annotations

import math
import time
from typing import Any

from PIL import Image

from vllm_omni.diffusion.distributed.sequence_parallel import PLAN_OPTION
from vllm_omni.diffusion.engine.engine import Engine
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.start_config import WarmupSize
from vllm_omni.errors import InvalidConfigError, InvalidRequestError, OmniError, first_line
from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.logger import init_logger

logger = init_logger(__name__)

# The first step of a shape compiles, the third captures a CUDA graph, the fourth replays it. From five steps on their
# modulations are prepared by the kernel that longer requests use.
_NUM_STEPS = 5
_UNKNOWN_SIDE = 256  # for a model that does not say what divides the sides of its pictures
_PICTURE_SIDE = 1024  # of the picture to edit, where the size follows from it


def warm_up(engine: Engine, *, is_server: bool) -> None:
    """Run each size of ``warmup_sizes`` as one output and as two, which are compiled apart.

    Before that, ranks that split a sequence take a step of the smallest size, to know that they can.

    Raises ``InvalidConfigError`` for a size that the model does not take, and the error of a request that fails. Two
    outputs that do not fit are left out.
    """
    config = engine.od_config
    _try_split(engine)
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
    prompt = _prompt(engine, "a picture", width or _PICTURE_SIDE, height or _PICTURE_SIDE)
    # Each replica takes one.
    for _ in range(engine.od_config.parallel_config.data_parallel_size):
        engine.add_request(engine.validate(prompt, params))
    errors: list[BaseException] = []
    while engine.has_requests:
        errors += [output.error for output in engine.step().outputs if output.error is not None]
    if errors:
        raise errors[0] if isinstance(errors[0], OmniError) else RuntimeError(f"the warm-up failed: {errors[0]}")


def _prompt(engine: Engine, text: str, width: int, height: int) -> dict[str, Any]:
    if not engine.needs_images:
        return {"prompt": text}
    return {"prompt": text, "multi_modal_data": {"image": Image.new("RGB", (width, height), "gray")}}


def _try_split(engine: Engine) -> None:
    """A plan that does not fit its tensors, or a mask that no ring takes, shows in the first forward: here, and soon.

    Raises ``InvalidConfigError`` or ``FeatureNotAvailableError`` with the reason.
    """
    config = engine.od_config.parallel_config
    num_ranks = config.ring_degree * config.ulysses_degree
    if num_ranks == 1:
        return
    try:
        errors = engine.try_step(_smallest_requests(engine, num_ranks))
    except InvalidRequestError as refused:
        errors = [refused]
    if not errors:
        return
    failure = errors[0]
    if isinstance(failure, InvalidRequestError) or (engine.spec is None and not isinstance(failure, OmniError)):
        logger.warning("whether ranks can split the sequence shows in the first request: a trial failed (%s)", failure)
    elif isinstance(failure, OmniError):
        raise failure
    else:
        raise InvalidConfigError(
            f"ulysses_degree={config.ulysses_degree}, ring_degree={config.ring_degree}: ranks that split the sequence"
            f" as the model's _sp_plan says failed in a trial: {type(failure).__name__}: {first_line(failure)}",
            option=PLAN_OPTION,
        ) from failure


def _smallest_requests(engine: Engine, num_ranks: int) -> list[OmniDiffusionRequest]:
    """With a token for each rank at least, and texts of different lengths, which are masked where they share a step."""
    config, spec = engine.od_config.parallel_config, engine.spec
    side = _UNKNOWN_SIDE if spec is None else spec.size_multiple * math.ceil(math.sqrt(num_ranks))
    values: dict[str, int] = {"height": side, "width": side, "num_inference_steps": 1}
    if spec is not None:
        values["num_frames"] = 1 + spec.temporal_factor
        values = {name: value for name, value in values.items() if name in spec.defaults}
    params = OmniDiffusionSamplingParams(**values, seed=0)
    # Ranks of guidance and replicas take one each, until there are more.
    texts = ["a picture" + " of a picture" * i for i in range(2 * config.cfg_parallel_size * config.data_parallel_size)]
    return [engine.validate(_prompt(engine, text, side, side), params) for text in texts]
