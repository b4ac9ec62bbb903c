"""Put trained parts together as a folder that `diffusers.QwenImageEditPlusPipeline.from_pretrained` loads.

    python -m tools.shapes_edit.export --vae vae --checkpoint run/checkpoint.pt --out shapes-qwen-image-edit

The parts are stored as `tools/shapes/export.py` stores them. The processor is that of Qwen2-VL, with larger patches.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageEditPlusPipeline
from torch import nn
from transformers import Qwen2VLImageProcessorPil

from tools.shapes import models as base
from tools.shapes.export import build_scheduler, write
from tools.shapes_edit import models
from tools.shapes_edit.tokenizer import build_tokenizer

# Height and width follow from the picture: 1024 x 1024 for a square one.
SAMPLING_DEFAULTS = {"num_inference_steps": 16, "true_cfg_scale": 1.0}
SHIFT = 3.0


def build_pipeline(
    vae: Path, checkpoint: Path, shift: float = SHIFT, weights: str = "average"
) -> QwenImageEditPlusPipeline:
    """The pipeline from an autoencoder folder and a checkpoint of `train.py`, without its processor."""
    stored = torch.load(checkpoint, map_location="cpu")
    tokenizer = build_tokenizer()
    transformer = base.build_transformer(stored["layers"], stored["heads"], models.LATENT_CHANNELS)
    parts = nn.ModuleDict({"text_encoder": models.build_text_encoder(tokenizer), "transformer": transformer})
    parts.load_state_dict(stored[weights])
    return QwenImageEditPlusPipeline(
        scheduler=build_scheduler(shift, models.NUM_TOKENS),
        vae=AutoencoderKLQwenImage.from_pretrained(vae).to(torch.bfloat16),
        text_encoder=parts["text_encoder"].eval(),
        tokenizer=tokenizer,
        processor=None,
        transformer=parts["transformer"].to(torch.bfloat16).eval(),
    )


def add_processor(pipeline: QwenImageEditPlusPipeline, out: Path) -> None:
    """Write the processor's folder and name it in the index.

    By its parts: the whole of it cannot be made without torchvision, for it also holds a processor of videos.
    """
    Qwen2VLImageProcessorPil(patch_size=models.PATCH, merge_size=models.MERGE).save_pretrained(out / "processor")
    pipeline.tokenizer.save_pretrained(out / "processor")
    index = out / "model_index.json"
    entries = json.loads(index.read_text()) | {"processor": ["transformers", "Qwen2VLProcessor"]}
    index.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shift", type=float, default=SHIFT)
    parser.add_argument("--weights", choices=("average", "model"), default="average")
    args = parser.parse_args()
    pipeline = build_pipeline(args.vae, args.checkpoint, args.shift, args.weights)
    write(pipeline, args.out, SAMPLING_DEFAULTS)
    add_processor(pipeline, args.out)
    size = sum(f.stat().st_size for f in args.out.rglob("*") if f.is_file())
    print(f"{args.out}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
