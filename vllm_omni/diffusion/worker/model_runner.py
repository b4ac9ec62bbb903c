"""One rank's model and the states of the requests that it works on."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from vllm_omni.diffusion.attention.layer import Attention
from vllm_omni.diffusion.cache import apply_cache, check_cache
from vllm_omni.diffusion.compile import apply_compile
from vllm_omni.diffusion.cuda_graph import apply_cuda_graphs
from vllm_omni.diffusion.data import DiffusionOutput, OmniDiffusionConfig
from vllm_omni.diffusion.denoise import DenoiseState, denoise_step, is_stepped
from vllm_omni.diffusion.distributed.collectives import all_reduce_sum
from vllm_omni.diffusion.distributed.groups import current_groups
from vllm_omni.diffusion.distributed.rank_status import waiting_for, working_alone
from vllm_omni.diffusion.distributed.sequence_hooks import apply_sequence_plans
from vllm_omni.diffusion.distributed.vae_parallel import share_tiles
from vllm_omni.diffusion.distributed.weight_sharding import shard_weights
from vllm_omni.diffusion.encoders.prompt_cache import PromptEmbedCache
from vllm_omni.diffusion.latent_preview import LatentPreview, decoded_preview
from vllm_omni.diffusion.model_loader.components import fill_with_random_weights
from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader, LoadProgress
from vllm_omni.diffusion.modulations import prepare_modulations
from vllm_omni.diffusion.registry import resolve_diffusion_model
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.step_plan import StepPlan
from vllm_omni.diffusion.worker.messages import MemoryUse, StageTimes, WorkerCommand, WorkerOutput, WorkerResult
from vllm_omni.diffusion.worker.out_of_memory import explained
from vllm_omni.diffusion.worker.pipeline_checks import check_pipeline, checked
from vllm_omni.errors import FeatureNotAvailableError, NonFiniteOutputError
from vllm_omni.logger import init_logger
from vllm_omni.outputs import StepCacheUse
from vllm_omni.platforms import get_platform

logger = init_logger(__name__)

# While the device works on a short step the host may queue the next, so that the device is never idle between. Longer
# ones it waits for: the gap is small beside them, and a request that arrives waits for one step and not for two.
_LONG_STEP_S = 0.5


@dataclass(kw_only=True)
class _Running:
    """A request on this rank. ``state`` is None for a pipeline that runs in one piece."""

    request: OmniDiffusionRequest
    state: DenoiseState | None = None
    output: Any = None  # of a pipeline that runs in one piece
    times: StageTimes = field(default_factory=StageTimes)
    denoise_started: float | None = None

    @property
    def latents(self) -> torch.Tensor | None:
        return None if self.state is None else self.state.latents


class ModelRunner:
    """Carries out commands: prepare, step and decode requests, each failure kept to the request that caused it."""

    def __init__(
        self, od_config: OmniDiffusionConfig, on_load_progress: LoadProgress | None = None, *, decodes: bool = False
    ) -> None:
        self._config = od_config
        self._platform = get_platform(od_config.torch_device)
        pipeline_class = resolve_diffusion_model(od_config.model_class_name).pipeline_class
        caches_prompt_embeds = getattr(pipeline_class, "caches_prompt_embeds", False)
        if od_config.enable_prompt_embed_cache and not caches_prompt_embeds:
            raise FeatureNotAvailableError(
                f"enable_prompt_embed_cache=True: {pipeline_class.__name__} encodes its prompts without a cache; leave"
                " the option out"
            )
        self._is_stepped = is_stepped(pipeline_class)
        check_cache(od_config, is_stepped=self._is_stepped)
        self._groups = current_groups()
        # Ranks that share tiles decode together.
        self._decodes = decodes or self._groups.world.rank < max(1, self._groups.vae.size)
        self.pipeline: Any = DiffusersPipelineLoader(od_config, on_load_progress).load_model(
            pipeline_class, lambda pipeline: check_pipeline(pipeline, od_config, self._groups)
        )
        self._compiled_blocks = apply_compile(self.pipeline, od_config)
        self._graphed_blocks = apply_cuda_graphs(self.pipeline, od_config)
        prepare_modulations(self.pipeline, od_config)
        apply_cache(self.pipeline, od_config)
        for sharded in shard_weights(self.pipeline, od_config, self._groups):
            if od_config.load_format == "dummy":
                fill_with_random_weights(sharded)
        share_tiles(self.pipeline, self._groups.vae)
        self._split_attention_backends: set[str] = set()
        if self._groups.sequence.size > 1:
            self._split_attention_backends = apply_sequence_plans(self.pipeline, self._groups)
        self._prompt_embed_cache = PromptEmbedCache(0)
        if caches_prompt_embeds:
            self._prompt_embed_cache = cast(PromptEmbedCache, self.pipeline.prompt_embed_cache)
        self._preview = LatentPreview.load(od_config.model)
        self._attention_layers = [layer for layer in self.pipeline.modules() if isinstance(layer, Attention)]
        self._running: dict[str, _Running] = {}
        self._plan: StepPlan | None = None  # of the running requests, for as long as none comes or leaves
        self._steps_ahead: deque[Callable[[], None]] = deque()
        self._step_s = 0.0  # of the last step, as long as one follows the other
        self._waited_at = 0.0  # time.perf_counter() when the device was last waited for

    def execute(self, command: WorkerCommand) -> WorkerResult:
        """Carry out one command."""
        result = WorkerResult()
        memory = self._platform.watch_memory() if command.measure else None
        if command.release or command.prepare or command.decode:
            self._plan = None  # it holds conditions of requests that leave; decoding needs the memory
        for request_id in command.release:
            self._running.pop(request_id, None)
        with self._prompt_embed_cache.sharing():
            for request in command.prepare:
                self._guard(result, request.request_id, self._prepare, request)
        for request_id in command.decode:
            self._guard(result, request_id, self._finish, request_id, result)
        group = [self._running[request_id] for request_id in command.step if request_id in self._running]
        shown = {key: self._running[key].latents for key in command.preview if key in self._running}
        self._timed_step(group, command, result)
        self._show(shown, result)
        if memory is not None:
            self._measure(memory, command, result)
        for request_id in (*result.errors, *result.finished):
            self._running.pop(request_id, None)
        if result.finished:
            result.attention_backends = self._used_attention_backends()
            result.accelerations = self._accelerations()
        return result

    def _prepare(self, request: OmniDiffusionRequest) -> None:
        if not self._running:
            self._platform.reset_peak_memory()
        running = _Running(request=request)
        started = time.perf_counter()
        if self._is_stepped:
            running.state = checked(self.pipeline.prepare(request), DenoiseState, self.pipeline, "prepare")
            self._platform.synchronize()
        running.times.prepare_s = time.perf_counter() - started
        self._running[request.request_id] = running

    def _step(self, group: Sequence[_Running], max_batch_size: int, result: WorkerResult) -> None:
        """One denoising step of all requests together; if that fails, of each alone, so that only culprits fail."""
        now = time.perf_counter()
        for running in group:
            if running.denoise_started is None:
                running.denoise_started = now
        if not self._is_stepped:
            for running in group:
                self._guard(result, running.request.request_id, self._run_whole, running)
            return
        states = [running.state for running in group if running.state is not None]
        if not states:
            return
        plan = self._plan
        try:
            self._plan = denoise_step(states, self.pipeline, max_batch_size, plan)
        except Exception as error:
            self._plan = None
            failure = explained(error)
            self._platform.empty_cache()
            if self._groups.world.size > 1:
                # Other ranks may wait in this step: another try of this one alone would not meet them.
                result.errors.update((state.request_id, failure) for state in states)
                return
            if len(states) == 1:
                result.errors[states[0].request_id] = failure
                return
            for state in states:
                self._guard(result, state.request_id, denoise_step, [state], self.pipeline, 1)
        self._limit_steps_ahead(is_known=plan is not None and plan is self._plan)

    def _timed_step(self, group: Sequence[_Running], command: WorkerCommand, result: WorkerResult) -> None:
        """Where the device runs behind the host, a step's time shows only while the same requests go on."""
        started, plan = time.perf_counter(), self._plan
        self._step(group, command.max_batch_size, result)
        if command.measure:
            self._platform.synchronize()
        if group and (command.measure or not self._is_stepped or (plan is not None and plan is self._plan)):
            result.step_s = time.perf_counter() - started

    def _measure(self, peak: Callable[[], int], command: WorkerCommand, result: WorkerResult) -> None:
        running = {key: self._running[key] for key in (*command.step, *command.decode) if key in self._running}
        result.memory = MemoryUse(
            peak_bytes=peak(),
            state_bytes={key: item.state.num_bytes for key, item in running.items() if item.state is not None},
            free_bytes=self._platform.free_memory(),
            peer_bytes=self._groups.peer_bytes,
        )

    def _show(self, previous: dict[str, torch.Tensor | None], result: WorkerResult) -> None:
        """Previews of the requests that took a step from ``previous`` latents. They cost nothing unless asked for."""
        for request_id, latents in previous.items():
            state = self._running[request_id].state
            if state is None or latents is None or request_id in result.errors:
                continue
            preview: torch.Tensor | None = None
            try:
                if self._preview is not None:
                    preview = self._preview(state, latents)
                elif self._decodes:
                    with working_alone():
                        preview = decoded_preview(self.pipeline.decode, state, latents)
            except Exception as error:
                if self._groups.vae.size > 1:
                    raise  # the others may wait for tiles of this rank
                logger.warning("%s goes on without a preview: %s", request_id, explained(error))
                self._platform.empty_cache()
            if preview is not None:
                result.previews[request_id] = preview.numpy()

    def _run_whole(self, running: _Running) -> None:
        output = self.pipeline.forward(running.request)
        running.output = checked(output, DiffusionOutput, self.pipeline, "forward").output

    def _limit_steps_ahead(self, *, is_known: bool) -> None:  # steps of another plan tell nothing of this one's time
        self._steps_ahead.append(self._platform.record())
        with waiting_for("device"):
            while len(self._steps_ahead) >= (2 if is_known and self._step_s < _LONG_STEP_S else 1):
                self._steps_ahead.popleft()()
        now = time.perf_counter()
        self._step_s, self._waited_at = now - self._waited_at, now

    def _finish(self, request_id: str, result: WorkerResult) -> None:
        running = self._running[request_id]
        with waiting_for("device"):
            self._platform.synchronize()
        started = time.perf_counter()
        if running.denoise_started is not None:
            running.times.denoise_s = started - running.denoise_started
        step_cache = self._step_cache_use(running.state)  # ranks exchange here, and decoding may fail on one of them
        output = running.output if running.state is None else self._decode(running)
        with waiting_for("device"):
            self._platform.synchronize()
        running.times.decode_s = time.perf_counter() - started
        result.finished[request_id] = WorkerOutput(
            output=output,
            times=running.times,
            peak_memory_bytes=self._platform.peak_memory() + self._groups.peer_bytes,
            step_cache=step_cache,
        )

    def _step_cache_use(self, state: DenoiseState | None) -> StepCacheUse | None:
        if state is None or self._config.cache.cache_backend is None:
            return None
        counts = torch.tensor([state.cache.num_forwards, state.cache.num_skipped], device=state.latents.device)
        num_forwards, num_skipped = all_reduce_sum(counts, self._groups.cfg).tolist()
        return StepCacheUse(num_forwards=num_forwards, num_skipped=num_skipped)

    def _decode(self, running: _Running) -> torch.Tensor | None:
        state = running.state
        assert state is not None, "only stepped pipelines are decoded"
        assert state.is_done, "the scheduler decodes requests whose steps are done"
        if not bool(torch.isfinite(state.latents).all()):
            raise NonFiniteOutputError(
                f"the latents of {state.request_id} are not finite after {state.num_steps} steps; use dtype='bfloat16'"
                " or 'float32' instead of 'float16', or a smaller guidance scale"
            )
        if running.request.sampling_params.output_type == "latent":
            return state.latents
        if not self._decodes:
            return None  # the engine takes the pixels of the first rank
        with working_alone():  # ranks that do not decode may go on and fail, or be done
            return checked(self.pipeline.decode(state), torch.Tensor, self.pipeline, "decode")

    def _guard(self, result: WorkerResult, request_id: str, work: Callable[..., object], *arguments: Any) -> None:
        """Run ``work`` of one request; what it raises becomes that request's error."""
        try:
            work(*arguments)
        except Exception as error:
            result.errors[request_id] = explained(error)
            self._platform.empty_cache()

    def _accelerations(self) -> tuple[str, ...]:
        compiled = () if self._compiled_blocks is None else (self._compiled_blocks.describe(),)
        graphed = () if self._graphed_blocks is None else self._graphed_blocks.describe()
        quantized = () if self._config.quantization is None else (self._config.quantization,)
        return (*compiled, *graphed, *quantized, *self._groups.describe())

    def _used_attention_backends(self) -> tuple[str, ...]:
        used = (layer.used_backends for layer in self._attention_layers)
        return tuple(sorted(self._split_attention_backends.union(*used)))
