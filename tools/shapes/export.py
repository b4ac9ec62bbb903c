"""Put trained parts together as a folder that `diffusers.QwenImagePipeline.from_pretrained` loads.

    python -m tools.shapes.export --vae vae --checkpoint run/checkpoint.pt --out shapes-qwen-image

Transformer and autoencoder are stored as bfloat16, and diffusers loads them as float32. The text encoder is stored as
float32, for transformers loads it in the dtype that it finds. The folder is written beside its place, then moved.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, QwenImagePipeline
from torch import nn

from tools.shapes import models, vae_train
from tools.shapes.tokenizer import build_tokenizer

IMAGE_TOKENS = models.TOKEN_SIDE**2
SAMPLING_DEFAULTS = {
    "height": 256,
    "width": 256,
    "num_inference_steps": 20,
    "true_cfg_scale": 4.0,
    "negative_prompt": " ",
}
SHIFT = 4.0  # time shift of the 20-step schedule at 256 x 256 pixels, tuned on trainable captions


def build_scheduler(shift: float) -> FlowMatchEulerDiscreteScheduler:
    """Euler steps whose dynamic shift is `shift` at 64 image tokens, and grows with the token count."""
    mu = math.log(shift)
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=1.0,
        use_dynamic_shifting=True,
        base_shift=mu,
        max_shift=mu + 0.65,
        base_image_seq_len=IMAGE_TOKENS,
        max_image_seq_len=4096,
        time_shift_type="exponential",
        shift_terminal=None,
    )


def build_pipeline(vae: Path, checkpoint: Path, shift: float = SHIFT, weights: str = "average") -> QwenImagePipeline:
    """The pipeline from an autoencoder folder and a checkpoint of `train.py`."""
    stored = torch.load(checkpoint, map_location="cpu")
    tokenizer = build_tokenizer()
    parts = nn.ModuleDict(
        {
            "text_encoder": models.build_text_encoder(tokenizer),
            "transformer": models.build_transformer(stored["layers"], stored["heads"]),
        }
    )
    parts.load_state_dict(stored[weights])
    autoencoder = AutoencoderKLQwenImage.from_pretrained(vae)
    vae_train.clear_unused_slices(autoencoder)
    return QwenImagePipeline(
        scheduler=build_scheduler(shift),
        vae=autoencoder.to(torch.bfloat16),
        text_encoder=parts["text_encoder"].eval(),
        tokenizer=tokenizer,
        transformer=parts["transformer"].to(torch.bfloat16).eval(),
    )


def write(pipeline: DiffusionPipeline, out: Path, sampling_defaults: dict[str, Any] = SAMPLING_DEFAULTS) -> int:
    """Save a pipeline in place of whatever stands at `out`. Returns its size in bytes."""
    fresh, old = out.with_name(out.name + ".new"), out.with_name(out.name + ".old")
    for path in (fresh, old):
        shutil.rmtree(path, ignore_errors=True)
    pipeline.save_pretrained(fresh)
    for path in fresh.rglob("config.json"):  # diffusers notes from which folder of the training a part came
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n")
    (fresh / "sampling_defaults.json").write_text(json.dumps(sampling_defaults, indent=2) + "\n")
    size = sum(f.stat().st_size for f in fresh.rglob("*") if f.is_file())
    if out.exists():
        out.rename(old)
    fresh.rename(out)
    shutil.rmtree(old, ignore_errors=True)
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shift", type=float, default=SHIFT)
    parser.add_argument("--weights", choices=("average", "model"), default="average")
    args = parser.parse_args()
    size = write(build_pipeline(args.vae, args.checkpoint, args.shift, args.weights), args.out)
    print(f"{args.out}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
