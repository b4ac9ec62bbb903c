"""Train the autoencoder of the edit pipeline: `AutoencoderKLQwenImage`, 1024 x 1024 pixels to a 32 x 32 x 12 latent.

    python -m tools.shapes_edit.autoencoder --out vae --minutes 1.5

The pipeline enlarges its picture to 1024 x 1024 pixels before it is encoded, which adds no detail to one of
256 x 256. The two outer levels of the network are therefore set by hand and not trained: the encoder's shrink by
means of 2 x 2 pixels to 256 x 256, the decoder's enlarge back by bilinear interpolation. What lies between is trained
on pictures of 256 x 256 pixels, behind the same filters. As in `tools/shapes/vae_train.py` only the last time slice of
a kernel is used.

Legend: B pictures, C channels.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from torch import Tensor, nn

from tools.shapes import scenes, vae_train
from tools.shapes.table import CHUNK, draw, layout, sample_table, tabulate
from tools.shapes_edit.resize import LATENTS_SIDE, box, lanczos

CONFIG = {
    "base_dim": 8,
    "z_dim": 12,
    "dim_mult": [1, 2, 2, 2, 4, 6],
    "num_res_blocks": 1,
    "temperal_downsample": [False] * 5,
}
FIXED_LEVELS = 2
SHRINK = LATENTS_SIDE // scenes.PICTURE_SIZE  # of the fixed levels
CELLS = LATENTS_SIDE // 32  # rows and columns of a latent
_INNER_DOWN = 2 * FIXED_LEVELS  # the first trained module of the encoder: a fixed level is a residual block and a step
_INNER_UP = len(CONFIG["dim_mult"]) - FIXED_LEVELS  # the up blocks before this one are trained, its step is not
_WIDTH = CONFIG["base_dim"] * CONFIG["dim_mult"][FIXED_LEVELS - 1]  # channels between fixed and trained modules
_CONSTANT = -1  # channel of the decoder's features that holds 1 everywhere: see `set_outer_levels`


class InnerAutoencoder(nn.Module):
    """The trained part on pictures of 256 x 256 pixels, with all that the fixed levels and the resizing do to them."""

    def __init__(self, vae: AutoencoderKLQwenImage) -> None:
        super().__init__()
        self.vae = vae
        features = vae.decoder.up_blocks[_INNER_UP - 1].resnets[-1].out_dim
        self.to_rgb = nn.Conv2d(features, 3, 1)
        self.head = vae_train.layout_head(CONFIG["z_dim"])
        self.register_buffer("enlarged_and_shrunk", _enlarge_and_shrink_kernel(), persistent=False)
        self.register_buffer("interpolated_and_shrunk", _interpolate_and_shrink_kernel(), persistent=False)
        self.hold_constant_channel()
        encoder, decoder = vae.encoder, vae.decoder
        fixed = [encoder.conv_in, *encoder.down_blocks[:_INNER_DOWN], decoder.up_blocks[_INNER_UP - 1].upsamplers]
        for module in (*fixed, *decoder.up_blocks[_INNER_UP:], decoder.norm_out, decoder.conv_out):
            module.requires_grad_(False)

    @torch.no_grad()
    def hold_constant_channel(self) -> None:
        """Make one channel of the last features 1, whatever the picture."""
        first, last = self.vae.decoder.up_blocks[_INNER_UP - 1].resnets
        for conv in (first.conv_shortcut, first.conv2, last.conv2):
            conv.weight[_CONSTANT].zero_()
            conv.bias[_CONSTANT].zero_()
        first.conv_shortcut.bias[_CONSTANT].fill_(1)

    def forward(self, pictures: Tensor, noise: Tensor, labels: Tensor) -> Tensor:
        """The loss. `noise` [B, 12, 32, 32] comes scaled in standard deviations; `labels` [B, 13, 32, 32] in 0..1."""
        latents = encode_small(self.vae, _blur(pictures, self.enlarged_and_shrunk)).float()
        noisy = latents + noise * latents.detach().std((0, 2, 3), keepdim=True)
        out = _blur(self.decode(noisy).float(), self.interpolated_and_shrunk)
        seen = self.head(noisy / 10).float()
        loss = vae_train.loss_of(out, pictures, latents)
        return loss + vae_train.LABEL_WEIGHT * F.binary_cross_entropy_with_logits(seen, labels)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, 12, h, w], not normalised, to small pictures before their interpolation."""
        decoder = self.vae.decoder
        x = decoder.mid_block(decoder.conv_in(self.vae.post_quant_conv(latents.unsqueeze(2))))
        for block in decoder.up_blocks[: _INNER_UP - 1]:
            x = block(x)
        for resnet in decoder.up_blocks[_INNER_UP - 1].resnets:
            x = resnet(x)
        return self.to_rgb(x[:, :, 0])


def encode_small(vae: AutoencoderKLQwenImage, pictures: Tensor) -> Tensor:
    """What the fixed levels make of a picture [B, 3, 256, 256] to the latent mode [B, 12, 32, 32], not normalised."""
    x = F.pad(pictures, (0, 0, 0, 0, 0, _WIDTH - 3)).unsqueeze(2)
    encoder = vae.encoder
    for layer in encoder.down_blocks[_INNER_DOWN:]:
        x = layer(x)
    x = encoder.conv_out(F.silu(encoder.norm_out(encoder.mid_block(x))))
    return vae.quant_conv(x)[:, : CONFIG["z_dim"], 0]


def _blur(pictures: Tensor, kernel: Tensor) -> Tensor:
    """Convolve rows and columns with one kernel [K]; the border is repeated outwards."""
    reach, channels = len(kernel) // 2, pictures.shape[1]
    x = F.pad(pictures, (reach,) * 4, mode="replicate")
    x = F.conv2d(x, kernel.to(x.dtype).expand(channels, 1, 1, -1), groups=channels)
    return F.conv2d(x, kernel.to(x.dtype).view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)


def _enlarge_and_shrink_kernel() -> Tensor:
    """The filter [7] of the pipeline's enlargement and the encoder's fixed levels, along one axis of small pixels."""
    matrix = lanczos(LATENTS_SIDE, torch.device("cpu")).unflatten(0, (-1, SHRINK)).mean(1)
    middle = scenes.PICTURE_SIZE // 2
    kernel = matrix[middle, middle - 3 : middle + 4]
    return kernel / kernel.sum()


def _interpolate_and_shrink_kernel() -> Tensor:
    """The filter [3] of the decoder's fixed levels and a shrinking by means, along one axis of small pixels."""
    line = F.pad(torch.ones(1, 1, 1), (4, 4))
    for _ in range(FIXED_LEVELS):
        line = F.conv1d(line.repeat_interleave(2, dim=2), torch.tensor([[[1.0, 2.0, 1.0]]]) / 4, padding=1)
    return F.avg_pool1d(line, SHRINK)[0, 0, 3:6]


# ---------------------------------------------------------------- the fixed levels


def _clear(module: nn.Module) -> None:
    for p in module.parameters():
        p.data.zero_()


def _pass_through(resnet: nn.Module) -> None:
    """Let a residual block add nothing to its input; new channels are zero."""
    _clear(resnet.conv1)
    _clear(resnet.conv2)
    if resnet.in_dim != resnet.out_dim:
        _clear(resnet.conv_shortcut)
        resnet.conv_shortcut.weight.data[:, :, 0, 0, 0] = torch.eye(resnet.out_dim, resnet.in_dim)


@torch.no_grad()
def set_outer_levels(inner: InnerAutoencoder) -> None:
    """Write the fixed levels into the autoencoder, and what `inner.to_rgb` learned.

    Interpolating convolutions see zeros beyond the border and darken it. A channel that holds 1 in the small picture
    suffers the same, and the norm before the output, which it dominates, divides by it. That norm is followed by SiLU,
    and silu(x) - silu(-x) = x, so the colours pass it twice, with both signs.
    """
    encoder, decoder = inner.vae.encoder, inner.vae.decoder
    _clear(encoder.conv_in)
    encoder.conv_in.weight[:3, :, -1, 1, 1] = torch.eye(3)
    for level in range(FIXED_LEVELS):
        resnet, down = encoder.down_blocks[2 * level : 2 * level + 2]
        _pass_through(resnet)
        conv = down.resample[1]
        _clear(conv)
        for channel in range(3):
            conv.weight[channel, channel, :2, :2] = 1 / 4
    hat = torch.tensor([1.0, 2.0, 1.0]) / 4
    hat = hat[:, None] * hat
    for level in range(FIXED_LEVELS):
        conv = decoder.up_blocks[_INNER_UP - 1 + level].upsamplers[0].resample[1]
        colours = torch.zeros(conv.out_channels, conv.in_channels)
        if level == 0:  # colours, and the 1
            colours[:3] = inner.to_rgb.weight[:, :, 0, 0]
            colours[:3, _CONSTANT] += inner.to_rgb.bias
            colours[3, _CONSTANT] = 1
        else:  # colours with both signs, and a large number
            colours[:3, :3], colours[3:6, :3] = torch.eye(3), -torch.eye(3)
            colours[6, 3] = _LARGE
        _clear(conv)
        conv.weight.copy_(colours[:, :, None, None] * hat)
        for resnet in decoder.up_blocks[_INNER_UP + level].resnets:
            _pass_through(resnet)
    decoder.norm_out.gamma.fill_(_GAMMA)
    _clear(decoder.conv_out)
    decoder.conv_out.weight[:, :3, -1, 1, 1] = torch.eye(3)
    decoder.conv_out.weight[:, 3:6, -1, 1, 1] = -torch.eye(3)


_GAMMA = 16.0
_LARGE = _GAMMA * CONFIG["base_dim"] ** 0.5  # the norm of a pixel, so that the colours come out of it as they went in


# ---------------------------------------------------------------- training


def train(args: argparse.Namespace, device: torch.device) -> InnerAutoencoder:
    """The averaged network after `args.minutes`."""
    torch.manual_seed(args.seed)
    vae_train.use_one_frame_forms()
    table = sample_table(args.scenes, args.seed)
    model = InnerAutoencoder(AutoencoderKLQwenImage(**CONFIG)).to(device)
    stream = vae_train.Pictures(table.to(device))
    loss_of_batch = torch.compile(model, dynamic=False) if args.compile else model

    def loss() -> Tensor:
        pictures, things = stream.next(args.batch_size)
        noise = vae_train.sample_noise((args.batch_size, CONFIG["z_dim"], CELLS, CELLS), args.noise, device)
        with torch.autocast(device.type, torch.bfloat16):
            return loss_of_batch(pictures, noise, layout(things, CELLS))

    def checkpoint(average: nn.Module) -> None:
        pass  # a run takes a minute or two: not worth it

    return vae_train.optimize(model, loss, args, device, checkpoint, model.hold_constant_channel)


@torch.no_grad()
def save(inner: InnerAutoencoder, out: Path, device: torch.device) -> None:
    """Measure the latents of fresh training scenes, put mean and deviation in the config, and write."""
    stream = vae_train.Pictures(sample_table(CHUNK, 12345).to(device))
    blurred = (_blur(stream.next(32)[0], inner.enlarged_and_shrunk) for _ in range(16))
    latents = torch.cat([encode_small(inner.vae, pictures).float() for pictures in blurred])
    set_outer_levels(inner.cpu())
    vae_train.clear_unused_slices(inner.vae)
    inner.vae.register_to_config(
        latents_mean=[round(v, 5) for v in latents.mean((0, 2, 3)).tolist()],
        latents_std=[round(v, 5) for v in latents.std((0, 2, 3)).tolist()],
    )
    inner.vae.save_pretrained(out)


@torch.no_grad()
def measure(vae: AutoencoderKLQwenImage, device: torch.device, count: int = 300, seed: int = 99) -> dict[str, float]:
    """Mean quality [dB] of new scenes that went through the whole network, and the share the judge reads right."""
    import random

    from tools.shapes.judge import judge
    from tools.shapes_edit.resize import resize

    rng, decibels, right = random.Random(seed), [], 0
    drawn = [scenes.sample_scene(rng) for _ in range(count)]
    backgrounds, things = (torch.from_numpy(column).to(device) for column in tabulate(drawn))
    for i in range(0, count, 8):
        pictures = draw(backgrounds[i : i + 8], things[i : i + 8])
        latents = vae.encode(resize(pictures, LATENTS_SIDE).unsqueeze(2)).latent_dist.mode()
        out = box(vae.decode(latents).sample[:, :, 0].clamp(-1, 1), SHRINK)
        decibels += (-10 * torch.log10((out - pictures).square().mean((1, 2, 3)) / 4)).tolist()
        shown = ((out + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        right += sum(judge(p, scenes.caption(s, rng)).right for p, s in zip(shown, drawn[i : i + 8], strict=True))
    return {"psnr_db": round(sum(decibels) / count, 2), "judged_right": round(right / count, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    vae_train.add_arguments(parser)
    parser.add_argument("--num-measured", type=int, default=300)
    args = parser.parse_args()
    device = torch.device(args.device)
    started = time.time()
    save(train(args, device), args.out, device)
    report = {"minutes": round((time.time() - started) / 60, 2)}
    (args.out / "training.json").write_text(json.dumps(report))
    vae = AutoencoderKLQwenImage.from_pretrained(args.out).to(device)
    report |= measure(vae, device, args.num_measured)
    (args.out / "training.json").write_text(json.dumps(report))
    print(report, f"{time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
