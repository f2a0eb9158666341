"""Train a UNet2DModel of diffusers by Flux Matching, and save it as a pipeline that diffusers loads and samples.

python train_diffusers.py [FOLDER]
"""

import sys
import tempfile

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, UNet2DModel

from fluxmatching import LogNormalNoise, NoiseAnnealedFluxMatching, field_from_diffusers

STEPS, SIZE = 10, 8


def pictures(count: int) -> torch.Tensor:
    """Draw bright disks at random places, `[count, 1, size, size]`, with values from -1 to 1."""
    axis = torch.linspace(-1, 1, SIZE)
    center = torch.rand(count, 2, 1, 1) - 0.5
    distance = (axis[:, None] - center[:, :1]).square() + (axis[None, :] - center[:, 1:]).square()
    return 2 * torch.sigmoid(20 * (0.15 - distance)) - 1


def main() -> None:
    folder = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=SIZE, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )  # fmt: skip
    scheduler = DDIMScheduler(num_train_timesteps=1000)
    loss_module = NoiseAnnealedFluxMatching(field_from_diffusers(unet, scheduler), LogNormalNoise())
    optimizer = torch.optim.Adam(loss_module.parameters(), lr=1e-3)
    for step in range(STEPS):
        loss, _ = loss_module(pictures(8), seed=step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    DDIMPipeline(unet, scheduler).save_pretrained(folder)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, num_inference_steps=5, output_type="np").images
    print(
        f"loss {loss.item():.4g}; pipeline in {folder}; "
        f"images {images.shape} from {images.min():.2f} to {images.max():.2f}"
    )


if __name__ == "__main__":
    main()
