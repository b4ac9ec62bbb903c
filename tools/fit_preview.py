"""Fit the map from latents to colours by which a server shows what requests will become, and put it beside the model.

    python -m tools.fit_preview MODEL --prompts prompts.txt
    python -m tools.fit_preview MODEL --prompts instructions.txt --images first.png second.png

Runs each prompt twice with one seed, for its latents and for its pixels, and fits the pixels of a token, averaged down
to P x P, by least squares. A wider ``--kernel`` is for an autoencoder whose latents say little one by one.
``latent_preview.json`` then serves every model with the same autoencoder and patches.

Shapes: K tokens of all runs, C channels of a token, P preview pixels of a token's side, F frames, H and W in pixels.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from vllm_omni import Omni, OmniDiffusionSamplingParams
from vllm_omni.diffusion.latent_preview import PREVIEW_FILE, neighbourhoods
from vllm_omni.entrypoints.cli.arguments import parse_size


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a diffusers pipeline; the map is written into it")
    parser.add_argument("--prompts", type=Path, required=True, help="text file, one prompt a line; about 30 are enough")
    parser.add_argument(
        "--images",
        type=Path,
        nargs="+",
        help="pictures to edit, one for each prompt in turn",
    )
    parser.add_argument("--size", type=parse_size, help="WIDTHxHEIGHT in pixels (default: the model's)")
    parser.add_argument("--steps", type=int, help="number of denoising steps (default: the model's)")
    parser.add_argument("--patch", type=int, default=4, help="preview pixels of a token's side")
    parser.add_argument(
        "--kernel",
        type=int,
        default=1,
        choices=(1, 3, 5),
        help="side of the square of tokens that a colour follows from",
    )
    parser.add_argument("--output", type=Path, help="where to write (default: into the model's folder)")
    return parser.parse_args()


def tokens_of(latents: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, int]:
    """``[R * S, C]`` or ``[C, F, R, S]`` as the middle frame ``[R, S, C]``, and the side of a token in pixels."""
    if latents.dim() == 4:
        frame = latents[:, latents.shape[1] // 2].permute(1, 2, 0)
        return frame, height // frame.shape[0]
    side = round((height * width / latents.shape[0]) ** 0.5)
    return latents.view(height // side, width // side, -1), side


def patches_of(pixels: torch.Tensor, side: int, patch: int) -> torch.Tensor:
    """``[3, H, W]`` or ``[F, 3, H, W]`` in [0, 1] as ``[R, S, P * P * 3]``: the middle frame, averaged down."""
    frame = pixels[pixels.shape[0] // 2] if pixels.dim() == 4 else pixels
    small = torch.nn.functional.interpolate(frame[None], scale_factor=patch / side, mode="area")[0]
    return small.unfold(1, patch, patch).unfold(2, patch, patch).permute(1, 2, 3, 4, 0).flatten(2)


def main() -> None:
    args = parse_args()
    prompts = [line.strip() for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    width, height = args.size if args.size is not None else (None, None)
    inputs, targets, side = [], [], 1
    with Omni(args.model) as omni:
        for seed, text in enumerate(prompts):
            prompt: dict[str, Any] = {"prompt": text}
            if args.images:
                prompt["multi_modal_data"] = {"image": args.images[seed % len(args.images)].read_bytes()}
            latents, pixels = (
                omni.generate(
                    prompt,
                    OmniDiffusionSamplingParams(
                        seed=seed, width=width, height=height, num_inference_steps=args.steps, output_type=output_type
                    ),
                )[0]
                for output_type in ("latent", "pt")
            )
            tokens, side = tokens_of(latents.images[0].float().cpu(), latents.receipt.height, latents.receipt.width)
            inputs.append(neighbourhoods(tokens[None], args.kernel)[0].flatten(0, 1))
            targets.append(patches_of(pixels.images[0].float().cpu(), side, args.patch).flatten(0, 1))
    features, colours = torch.cat(inputs).double(), torch.cat(targets).double()
    design = torch.cat([features, torch.ones(len(features), 1, dtype=torch.float64)], dim=1)
    # A little ridge keeps channels that the prompts hardly moved from getting large weights.
    gram = design.T @ design + 1e-4 * len(design) * torch.eye(design.shape[1], dtype=torch.float64)
    solution = torch.linalg.solve(gram, design.T @ colours)
    error = (design @ solution - colours).square().mean().sqrt()
    content = {
        "pixels_per_token": side,
        "kernel": args.kernel,
        "weight": [[round(value, 5) for value in row] for row in solution[:-1].tolist()],
        "bias": [round(value, 5) for value in solution[-1].tolist()],
    }
    output = args.output if args.output is not None else Path(omni.od_config.model) / PREVIEW_FILE
    output.write_text(json.dumps(content) + "\n", encoding="utf-8")
    print(f"{output}: {len(features)} tokens, root mean square error {error:.4f} of [0, 1]")


if __name__ == "__main__":
    main()
