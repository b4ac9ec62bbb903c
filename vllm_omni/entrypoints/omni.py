"""Offline generation: ``Omni(model).generate(prompts)``."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from tqdm import tqdm

from vllm_omni.diffusion.data import TASKS
from vllm_omni.diffusion.engine.configure import configure
from vllm_omni.diffusion.engine.engine import Engine
from vllm_omni.diffusion.engine.warm_up import warm_up
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.errors import EngineClosedError, GenerationError, InvalidConfigError, InvalidRequestError, nearest_name
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, PromptInput
from vllm_omni.outputs import OmniRequestOutput, StepProgress

ProgressCallback = Callable[[StepProgress], None]

# Small models of coloured shapes that ship with the package, by task, so that everything runs without a download.
_ASSETS = Path(__file__).parent.parent / "assets"
SHIPPED_MODELS = {
    "text-to-image": _ASSETS / "shapes-qwen-image",
    "image-edit": _ASSETS / "shapes-qwen-image-edit",
    "text-to-video": _ASSETS / "shapes-wan",
}
SHIPPED_MODEL = SHIPPED_MODELS["text-to-image"]


def choose_model(model: str | os.PathLike[str] | None, task: str | None) -> str:
    """The model that is named, or the one that ships along for ``task``; without either, the one for text to image.

    Raises ``InvalidConfigError`` for a task that does not exist, or that no shipped model does.
    """
    if task is not None and task not in TASKS:
        raise InvalidConfigError(f"task={task!r} is unknown; {nearest_name(str(task), TASKS)}", option="task")
    if model is not None:
        return os.fspath(model) if isinstance(model, os.PathLike) else model
    if task is not None and task not in SHIPPED_MODELS:
        raise InvalidConfigError(
            f"task={task!r}: no model for it ships along, only for {', '.join(SHIPPED_MODELS)}; name a model",
            option="task",
        )
    return str(SHIPPED_MODEL if task is None else SHIPPED_MODELS[task])


class Omni:
    """A diffusion model, loaded and ready.

    ``model`` is a folder in the layout of a diffusers pipeline or a hub id; None is the small model that ships with
    the package for ``task`` ("text-to-image" if that is None too). A ``task`` that a named model cannot do is an error
    before its weights are read; it changes nothing else. ``options`` are the fields of
    :class:`~vllm_omni.diffusion.data.OmniDiffusionConfig`, flat: ``dtype="bfloat16"``, ``vae_use_tiling=True``,
    ... An unknown option, or one whose feature does not exist yet, is an error. ``show_progress`` shows bars for
    loading and steps; None means "if standard error is a terminal".

    Calls of ``generate`` from several threads take turns; ``abort`` may be called from any thread, or from a
    progress callback.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        task: str | None = None,
        show_progress: bool | None = None,
        **options: Any,
    ) -> None:
        self._show_progress = sys.stderr.isatty() if show_progress is None else show_progress
        self._lock = threading.RLock()
        self._engine: Engine | None = None
        self.od_config = configure(choose_model(model, task), options, task)
        with _LoadBar(self._show_progress) as bar:
            self._engine = Engine(self.od_config, bar.update)
        try:
            warm_up(self._engine, is_server=False)
        except BaseException:
            self.close()
            raise

    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: OmniDiffusionSamplingParams | Sequence[OmniDiffusionSamplingParams] | None = None,
        *,
        progress: ProgressCallback | None = None,
        max_batch_size: int | None = None,
    ) -> list[OmniRequestOutput]:
        """Generate for one prompt or several, and return their outputs in order.

        A prompt is a string or a dict (``prompt`` or ``prompt_embeds``, ``negative_prompt`` or
        ``negative_prompt_embeds``, ``multi_modal_data``). ``sampling_params`` is one for all prompts, or one for
        each. ``progress`` is called after each step of each request. ``max_batch_size`` limits how many pictures
        share one forward in this call.

        Raises ``InvalidRequestError`` before any work if one of the requests is not sound. If requests fail while
        they run, the others still finish, and ``GenerationError`` carries all outputs.
        """
        if max_batch_size is not None and (type(max_batch_size) is not int or max_batch_size < 1):
            raise InvalidRequestError(
                f"max_batch_size={max_batch_size!r} must be an integer of at least 1", param="max_batch_size"
            )
        prompt_list = _as_list(prompts)
        params_list = _as_params_list(sampling_params, len(prompt_list))
        with self._lock:
            engine = self._require_engine()
            pairs = zip(prompt_list, params_list, strict=True)
            requests = [_validated(engine, *pair, i, len(prompt_list)) for i, pair in enumerate(pairs)]
            order = [engine.add_request(request) for request in requests]
            outputs = self._run(engine, sum(_num_steps(params) for params in requests), progress, max_batch_size)
        return _in_order(order, outputs)

    @property
    def output_kind(self) -> Literal["image", "video"]:
        """What each entry of an output's ``images`` is: a picture (or a list of its layers), or a video's frames."""
        return self._require_engine().output_kind

    def resolve(
        self, prompt: PromptInput, sampling_params: OmniDiffusionSamplingParams | None = None
    ) -> OmniDiffusionRequest:
        """The request as ``generate`` would run it, with every default filled in. Runs nothing.

        Raises ``InvalidRequestError`` if it is not sound.
        """
        params = OmniDiffusionSamplingParams() if sampling_params is None else sampling_params
        return self._require_engine().validate(prompt, params)

    def abort(self, request_id: str) -> bool:
        """End a request before its next step; its output comes back unfinished. False if it is not in progress."""
        return self._require_engine().abort(request_id)

    def close(self) -> None:
        """Free the model and its memory. May be called twice."""
        with self._lock:
            if self._engine is not None:
                self._engine.close()
                self._engine = None

    def __enter__(self) -> Omni:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _require_engine(self) -> Engine:
        if self._engine is None:
            raise EngineClosedError("this Omni is closed; create a new one")
        return self._engine

    def _run(
        self, engine: Engine, num_steps: int, progress: ProgressCallback | None, max_batch_size: int | None
    ) -> dict[str, OmniRequestOutput]:
        outputs: dict[str, OmniRequestOutput] = {}
        with tqdm(total=num_steps, desc="steps", unit="step", disable=not self._show_progress) as bar:
            try:
                while engine.has_requests:
                    completed = engine.step(max_batch_size)
                    outputs |= {output.request_id: output for output in completed.outputs}
                    for event in completed.progress:
                        bar.update()
                        if progress is not None:
                            progress(event)
            except BaseException:
                # The caller's interrupt or callback ended this call: nothing of it may linger in the next one.
                engine.discard_all()
                raise
        return outputs


def _validated(
    engine: Engine, prompt: PromptInput, params: OmniDiffusionSamplingParams, index: int, count: int
) -> OmniDiffusionRequest:
    """The request; an error says which one of several it is about."""
    try:
        return engine.validate(prompt, params)
    except InvalidRequestError as error:
        if count == 1:
            raise
        raise InvalidRequestError(f"prompt {index} of 0 to {count - 1}: {error}", param=error.param) from error


def _as_list(prompts: PromptInput | Sequence[PromptInput]) -> list[Any]:
    if not isinstance(prompts, (list, tuple)):
        return [prompts]
    if not prompts:
        raise InvalidRequestError("prompts is an empty list; give at least one prompt", param="prompts")
    return list(prompts)


def _as_params_list(sampling_params: Any, num_prompts: int) -> list[OmniDiffusionSamplingParams]:
    if sampling_params is None:
        sampling_params = OmniDiffusionSamplingParams()
    params_list = (
        list(sampling_params) if isinstance(sampling_params, (list, tuple)) else [sampling_params] * num_prompts
    )
    for params in params_list:
        if not isinstance(params, OmniDiffusionSamplingParams):
            raise InvalidRequestError(
                f"sampling_params must be OmniDiffusionSamplingParams or a list of them, not {type(params).__name__}",
                param="sampling_params",
            )
    if len(params_list) != num_prompts:
        raise InvalidRequestError(
            f"{len(params_list)} sampling_params do not match {num_prompts} prompts; give one for all, or one for each",
            param="sampling_params",
        )
    return params_list


def _num_steps(request: Any) -> int:
    steps = request.sampling_params.num_inference_steps
    return 1 if steps is None else int(steps)


def _in_order(order: Sequence[str], outputs: dict[str, OmniRequestOutput]) -> list[OmniRequestOutput]:
    ordered = [outputs[request_id] for request_id in order]
    failed = [output for output in ordered if output.error is not None]
    if failed:
        if len(ordered) == 1 and isinstance(failed[0].error, InvalidRequestError):
            # A text's length is known only to the tokenizer; to the caller it is bad input like any other.
            raise failed[0].error
        others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise GenerationError(
            f"{failed[0].request_id} failed: {failed[0].error}{others}; the exception's outputs hold what finished",
            outputs=ordered,
        ) from failed[0].error
    return ordered


class _LoadBar:
    """A progress bar over the bytes of the weights."""

    def __init__(self, enabled: bool) -> None:
        self._bar = tqdm(desc="loading", unit="B", unit_scale=True, disable=not enabled)

    def update(self, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def __enter__(self) -> _LoadBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
