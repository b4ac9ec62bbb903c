"""Train the text encoder and the transformer of the edit pipeline together, by rectified flow.

    python -m tools.shapes_edit.train --vae vae --out run --minutes 5

Examples are sampled and drawn, and their latents and embedded patches held on the device, before the training starts.
It writes `checkpoint.pt`, which `export.py` turns into a pipeline folder. Learning rates follow the wall clock.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage
from torch import Tensor, nn

from tools.shapes import models as base
from tools.shapes import train, vae_train
from tools.shapes.capture import captured
from tools.shapes.table import draw, layout
from tools.shapes_edit import models
from tools.shapes_edit.autoencoder import CELLS, SHRINK, encode_small
from tools.shapes_edit.resize import VISION_SIDE, resize, resize_and_shrink
from tools.shapes_edit.table import INSTRUCTION_TOKENS, ExampleTable, sample_table
from tools.shapes_edit.tokenizer import BEFORE_PICTURE, PREFIX, PREFIX_TOKENS, build_tokenizer

CHANGED = 0.1  # a token whose latents differ by more than this is part of the change
CHANGED_WEIGHT = 4.0  # of such tokens in the loss
PICTURES_OF_COMPONENTS = 1024


class Batches:
    """Endless random batches of examples, all held on the device."""

    def __init__(self, table: ExampleTable, device: torch.device) -> None:
        """Latents and patches are zero until `encode` fills them in."""
        self.device, self.table = device, table.to(device)
        self.tokenizer = build_tokenizer()
        self.prefix = torch.tensor(self.tokenizer(PREFIX + BEFORE_PICTURE).input_ids, device=device)
        first = draw(self.table.backgrounds[:PICTURES_OF_COMPONENTS], self.table.source[:PICTURES_OF_COMPONENTS])
        seen = models.patches(resize(first, VISION_SIDE)).flatten(0, 1)
        self.components = models.principal_components(seen, models.VISION["hidden_size"])
        options = {"dtype": torch.float16, "device": device}
        latents = (len(table), models.LATENT_CHANNELS, CELLS, CELLS)
        self.source, self.target = torch.zeros(latents, **options), torch.zeros(latents, **options)
        self.embedded = torch.zeros(len(table), models.GRID**2, models.VISION["hidden_size"], **options)

    @torch.no_grad()
    def encode(self, folder: Path, batch_size: int) -> None:
        """Fill in the normalised latents of both pictures, and the embedded patches of the source."""
        vae = AutoencoderKLQwenImage.from_pretrained(folder).to(self.device)
        vae_train.use_one_frame_forms()
        mean, std = (
            torch.tensor(vae.config[k], device=self.device).view(1, -1, 1, 1) for k in ("latents_mean", "latents_std")
        )
        table = self.table
        for i in range(0, len(table), batch_size):
            rows = slice(i, i + batch_size)
            for kept, things in ((self.source, table.source), (self.target, table.target)):
                pictures = draw(table.backgrounds[rows], things[rows])
                small = resize_and_shrink(pictures, SHRINK).contiguous(memory_format=torch.channels_last)
                with torch.autocast(self.device.type, torch.bfloat16):
                    latents = encode_small(vae, small).float()
                kept[rows] = (latents - mean) / std
                if kept is self.source:
                    self.embedded[rows] = models.patches(resize(pictures, VISION_SIDE)) @ self.components.T

    def next(self, size: int) -> tuple[Tensor, ...]:
        """Source and target latents float32, embedded patches, ids [B, L], lengths [B], objects of both pictures."""
        table = self.table
        chosen = torch.randint(len(table), (size,), device=self.device)
        pictures = (self.source[chosen].float(), self.target[chosen].float(), self.embedded[chosen].float())
        things = torch.stack((table.target[chosen], table.source[chosen]))
        return *pictures, table.ids[chosen].long(), table.lengths[chosen].long(), things


class EditTrainer(train.Trainer):
    """The loop of `tools.shapes.train` on pairs of pictures."""

    batches: Batches

    def build(self) -> nn.ModuleDict:
        """The models to train. The patch embedding is set and stays."""
        text_encoder = models.build_text_encoder(self.batches.tokenizer)
        models.set_patch_embedding(text_encoder, self.batches.components)
        text_encoder.model.visual.patch_embed.requires_grad_(False)
        transformer = base.build_transformer(self.args.layers, self.args.heads, models.LATENT_CHANNELS)
        return nn.ModuleDict({"text_encoder": text_encoder, "transformer": transformer})

    def prepare_tables(self) -> None:
        before = len(self.batches.prefix) - PREFIX_TOKENS
        length = before + models.NUM_FEATURES + INSTRUCTION_TOKENS
        self.text_tables = base.text_tables(self.model["text_encoder"], PREFIX_TOKENS + length)
        self.vision_tables = models.vision_tables(self.model["text_encoder"])
        self.image_tables = base.image_tables(self.model["transformer"], length, models.IMAGE_SHAPES)

    def loss(
        self, source: Tensor, target: Tensor, embedded: Tensor, ids: Tensor, lengths: Tensor, things: Tensor
    ) -> Tensor:
        """Weighted mean squared error of the velocity, and how well a layer on the way tells what stands where.

        Noisy tokens are to tell it of the target, the others of the source; `things` [2, B, 3, 5] are in that order.
        """
        given, clean = base.pack(source), base.pack(target)
        noise = torch.randn_like(clean)
        sigma = train.sample_sigma(len(clean), self.device)
        noisy = clean + sigma[:, None, None] * (noise - clean)
        unused = torch.arange(ids.shape[1], device=self.device) >= lengths[:, None]
        num_before = self.image_tables[0].shape[0] - 2 * models.NUM_TOKENS - ids.shape[1]
        mask = torch.zeros(len(ids), 1, 1, self.image_tables[0].shape[0], device=self.device)
        mask[:, 0, 0, num_before : num_before + ids.shape[1]] = unused.float() * -1e9
        with torch.autocast(self.device.type, torch.bfloat16):
            tables = self.text_tables, self.vision_tables
            text = models.encode_prompt(self.model["text_encoder"], self.batches.prefix, embedded, ids, *tables)
            tokens = torch.cat((noisy, given), dim=1)
            out = base.predict(
                self.model["transformer"], tokens, text, mask, sigma, *self.image_tables, block_fn=self._tapped_block
            )
        error = (out[:, : models.NUM_TOKENS].float() - (noise - clean)).square().mean(-1)
        changed = (clean - given).abs().amax(-1) > CHANGED
        weight = 1 + (CHANGED_WEIGHT - 1) * changed.float()
        velocity_loss = (weight * error).sum() / weight.sum()
        self.velocity_loss = velocity_loss.detach()
        labels = layout(things.flatten(0, 1), models.TOKEN_SIDE).flatten(2).mT
        return velocity_loss + self.layout_loss(torch.cat(labels.chunk(2), dim=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--examples", type=int, default=100000)
    parser.add_argument("--cache-batch-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=4)
    train.add_fit_arguments(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    start = time.time()
    batches = Batches(sample_table(args.examples, args.seed), torch.device(args.device))
    print(f"sampled after {time.time() - start:.0f} s", flush=True)
    batches.encode(args.vae, args.cache_batch_size)
    print(f"encoded after {time.time() - start:.0f} s", flush=True)
    torch.set_float32_matmul_precision("high")  # not before: the resized pictures are to be exact
    trainer = EditTrainer(args, batches)
    if trainer.device.type == "cuda" and args.capture:
        trainer.update = captured(trainer.update)
    train.run(trainer, args)


if __name__ == "__main__":
    main()
