"""Seconds per step and peak memory of the full-size Qwen-Image with random weights, beside diffusers in the same run.

    python -m benchmarks.full_size --json benchmarks/results/qwen_image_h200.json

Needs a GPU with about 80 GB. Each engine is measured in a process of its own, so that neither finds the other's memory
or compiled code. 1024 x 1024 pixels, batch 1, bfloat16, eager; one branch: a step is one forward. diffusers runs
on its native attention, on cuDNN's, and on FlashAttention 3 where that is installed; its best is what counts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import median, write_json

CONFIGS = Path(__file__).parent / "configs" / "qwen-image"
PEER_BACKENDS = ("native", "_native_cudnn", "_flash_3")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("vllm-omni", *PEER_BACKENDS), help="measure one and print JSON")
    parser.add_argument("--configs", type=Path, default=CONFIGS)
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--text-tokens", type=int, default=128)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def prompt_embeds(args: argparse.Namespace) -> torch.Tensor:
    width = json.loads((args.configs / "transformer" / "config.json").read_text())["joint_attention_dim"]
    return torch.randn(1, args.text_tokens, width, generator=torch.Generator().manual_seed(0))


def measure_ours(args: argparse.Namespace) -> dict[str, Any]:
    """The whole path through ``Omni``, text encoder in memory."""
    from vllm_omni import Omni, OmniDiffusionSamplingParams

    params = OmniDiffusionSamplingParams(
        height=args.height, width=args.width, num_inference_steps=args.steps, seed=0, output_type="pil"
    )
    started = time.perf_counter()
    with Omni(str(args.configs), load_format="dummy", show_progress=False) as omni:
        load_s = time.perf_counter() - started
        outputs = [omni.generate({"prompt_embeds": prompt_embeds(args)}, params)[0] for _ in range(args.trials + 1)]
    measured = outputs[1:]
    receipt = measured[0].receipt
    assert receipt is not None
    return {
        "seconds_per_step": median([output.metrics.denoise_s / args.steps for output in measured]),
        "decode_s": median([output.metrics.decode_s for output in measured]),
        "load_s": load_s,
        "peak_memory_gib": max(output.metrics.peak_memory_bytes for output in measured) / 2**30,
        "attention_backends": receipt.attention_backends,
    }


@torch.inference_mode()
def measure_diffusers(args: argparse.Namespace, backend: str) -> dict[str, Any]:
    """The transformer's forward in a loop of as many steps, and the autoencoder's decode."""
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel

    def built(model_class: Any, component: str) -> Any:
        config = json.loads((args.configs / component / "config.json").read_text())
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda"):
            model = model_class.from_config(config).eval()
        torch.set_default_dtype(torch.float32)
        return model

    transformer, vae = built(QwenImageTransformer2DModel, "transformer"), built(AutoencoderKLQwenImage, "vae")
    transformer.set_attention_backend(backend)
    rows, columns = args.height // 16, args.width // 16
    latents = torch.randn(1, rows * columns, 64, device="cuda", dtype=torch.bfloat16)
    embeds = prompt_embeds(args).to("cuda", torch.bfloat16)
    timestep = torch.full((1,), 0.5, device="cuda", dtype=torch.bfloat16)

    def steps() -> None:
        for _ in range(args.steps):
            transformer(
                hidden_states=latents,
                encoder_hidden_states=embeds,
                timestep=timestep,
                img_shapes=[[(1, rows, columns)]],
                return_dict=False,
            )

    def decode() -> None:
        vae.decode(torch.randn(1, 16, 1, 2 * rows, 2 * columns, device="cuda", dtype=torch.bfloat16))

    step_times = [_timed(steps) / args.steps for _ in range(args.trials + 1)][1:]
    decode_times = [_timed(decode) for _ in range(args.trials + 1)][1:]
    return {
        "seconds_per_step": median(step_times),
        "decode_s": median(decode_times),
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def _timed(work: Any) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    args = parse_args()
    if args.engine is not None:
        result = measure_ours(args) if args.engine == "vllm-omni" else measure_diffusers(args, args.engine)
        print(json.dumps(result))
        return
    results: dict[str, Any] = {"size": [args.width, args.height], "steps": args.steps, "text_tokens": args.text_tokens}
    for engine in ("vllm-omni", *PEER_BACKENDS):
        command = [sys.executable, "-m", "benchmarks.full_size", "--engine", engine, *sys.argv[1:]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            results[engine] = {"error": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no output"}
        else:
            results[engine] = json.loads(done.stdout.strip().splitlines()[-1])
        print(engine, results[engine])
    peers = [results[name]["seconds_per_step"] for name in PEER_BACKENDS if "seconds_per_step" in results[name]]
    if peers and "seconds_per_step" in results["vllm-omni"]:
        results["ratio"] = results["vllm-omni"]["seconds_per_step"] / min(peers)
        print(f"seconds per step, vllm-omni over the best of diffusers: {results['ratio']:.3f}")
    write_json(args.json, results)


if __name__ == "__main__":
    main()
