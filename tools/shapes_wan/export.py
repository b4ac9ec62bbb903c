"""Put trained parts together as a folder that `diffusers.WanPipeline.from_pretrained` loads.

    python -m tools.shapes_wan.export --vae vae --checkpoint run/checkpoint.pt --out shapes-wan

Transformer and autoencoder are stored as bfloat16, and diffusers loads them as float32. The text encoder is stored as
float32, for transformers loads it in the dtype that it finds.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
from torch import nn

from tools.shapes.export import write
from tools.shapes_wan import models
from tools.shapes_wan.clips import NUM_FRAMES, PICTURE_SIZE
from tools.shapes_wan.tokenizer import build_tokenizer

SAMPLING_DEFAULTS = {
    "height": PICTURE_SIZE,
    "width": PICTURE_SIZE,
    "num_frames": NUM_FRAMES,
    "fps": 8,
    "num_inference_steps": 20,
    "guidance_scale": 3.0,
}
FLOW_SHIFT = 3.0


def pipeline_of(vae: AutoencoderKLWan, parts: nn.ModuleDict, flow_shift: float = FLOW_SHIFT) -> WanPipeline:
    """A pipeline of copies of trained parts, on the CPU."""
    vae, text_encoder, transformer = (
        copy.deepcopy(part).cpu().eval() for part in (vae, parts["text_encoder"], parts["transformer"])
    )
    return WanPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=text_encoder,
        vae=vae.to(torch.bfloat16),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift
        ),
        transformer=transformer.to(torch.bfloat16),
    )


def build_pipeline(vae: Path, checkpoint: Path, flow_shift: float = FLOW_SHIFT) -> WanPipeline:
    """The pipeline from what `train.py` wrote."""
    stored = torch.load(checkpoint, map_location="cpu")
    parts = nn.ModuleDict(
        {
            "text_encoder": models.build_text_encoder(build_tokenizer()),
            "transformer": models.build_transformer(stored["layers"], stored["heads"]),
        }
    )
    parts.load_state_dict(stored["average"])
    return pipeline_of(AutoencoderKLWan.from_pretrained(vae), parts, flow_shift)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--flow-shift", type=float, default=FLOW_SHIFT)
    parser.add_argument("--steps", type=int, default=SAMPLING_DEFAULTS["num_inference_steps"])
    parser.add_argument("--guidance-scale", type=float, default=SAMPLING_DEFAULTS["guidance_scale"])
    args = parser.parse_args()
    defaults = SAMPLING_DEFAULTS | {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}
    size = write(build_pipeline(args.vae, args.checkpoint, args.flow_shift), args.out, defaults)
    print(f"{args.out}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
