# Makes instruct_pix2pix.jsonl: python3 instruct_pix2pix.py, with torch, transformers, Pillow and diffusers (PYTHONPATH counts). Latents of
# whole calls of diffusers' StableDiffusionXLInstructPix2PixPipeline over tiny-sdxl with a first convolution of eight channels; every fifth
# number in float64, and `atol` twenty times what float32 is off.
import base64
import json
import math
import os

import diffusers
import numpy as np
import torch
from PIL import Image

here = os.path.dirname(os.path.abspath(__file__))
torch.set_grad_enabled(False)
diffusers.utils.logging.set_verbosity_error()


# As in inpainting.py.
def whole_numbers(name, count):
    seed = np.uint32(0x811C9DC5)
    with np.errstate(over="ignore"):
        for byte in name.encode():
            seed = (seed ^ np.uint32(byte)) * np.uint32(0x01000193)
        h = seed + np.arange(count, dtype=np.uint32) * np.uint32(0x9E3779B9)
        h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
        h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return ((h ^ (h >> np.uint32(16))) >> np.uint32(23)).astype(np.int64) - 256


def weight(name, key, shape):
    values = whole_numbers(f"{name}.{key}", math.prod(shape)) / 256 * 2.0 ** -math.floor(math.log2(math.prod(shape[1:])) / 2 + 0.5)
    return torch.tensor(values, dtype=torch.float16).reshape(shape)


def picture(seed, width, height):
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    return Image.fromarray((((3 * x + (5 + 2 * c) * y + 40 * seed) ^ ((x >> 3) * (c + 1 + seed) * 9)) & 255).astype(np.uint8))


randn = torch.randn


def drawn_in_float32(*args, dtype=None, **more):
    return randn(*args, dtype=torch.float32, **more).to(dtype or torch.float32)


torch.randn = drawn_in_float32
SETTINGS = dict(prompt="a red fox in the snow", negative_prompt="rain", num_inference_steps=5, guidance_scale=5)
# The seed, or a seed for each image, and the rest of the call; `noise` is the seed of latents that are given.
CALLS = [
    (0, dict()),
    (1, dict(scheduler="EulerAncestralDiscreteScheduler", num_images_per_prompt=2, image_guidance_scale=2.5)),
    (2, dict(scheduler="DPMSolverMultistepScheduler", guidance_scale=1)),
    ([3, 30], dict(scheduler="DDIMScheduler", num_images_per_prompt=2, image_guidance_scale=1, guidance_rescale=0.7)),
    (4, dict(image_guidance_scale=0.9)),
    (5, dict(noise=7, scheduler="UniPCMultistepScheduler", denoising_end=0.6, num_inference_steps=10)),
    (6, dict(scheduler="HeunDiscreteScheduler", negative_prompt=None)),
]


def pipeline_of(dtype):
    unet = diffusers.UNet2DConditionModel.from_pretrained(f"{here}/tiny-sdxl", subfolder="unet", torch_dtype=torch.float32)
    bias = unet.conv_in.bias
    unet.conv_in = torch.nn.Conv2d(8, 16, 3, padding=1)
    unet.conv_in.weight.copy_(weight("instruct_pix2pix", "conv_in.weight", [16, 8, 3, 3]))
    unet.conv_in.bias.copy_(bias)
    unet.register_to_config(in_channels=8)
    kind = diffusers.StableDiffusionXLInstructPix2PixPipeline
    return kind.from_pretrained(f"{here}/tiny-sdxl", unet=unet.to(dtype), torch_dtype=dtype).to(dtype)


def drawn(seed, dtype, more):
    settings = {**SETTINGS, **more}
    scheduler, noise = settings.pop("scheduler", None), settings.pop("noise", None)
    pipeline = pipeline_of(dtype)
    pipeline.set_progress_bar_config(disable=True)
    if scheduler:
        pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    if noise is not None:
        settings["latents"] = randn(1, 4, 8, 8, generator=torch.Generator("cpu").manual_seed(noise)).to(dtype)
    made = [torch.Generator("cpu").manual_seed(each) for each in ([seed] if isinstance(seed, int) else seed)]
    given = dict(image=picture(4, 64, 64), height=64, width=64, output_type="latent", return_dict=True)
    return pipeline(generator=made[0] if len(made) == 1 else made, **given, **settings).images.double().numpy()


def packed(values):
    return base64.b64encode(np.asarray(values, dtype=np.float32).tobytes()).decode()


lines = []
for seed, more in CALLS:
    rough, exact = (drawn(seed, dtype, more) for dtype in (torch.float32, torch.float64))
    atol = float(f"{20 * max(np.abs(exact - rough).max(), 2.0**-24 * np.abs(exact).max()):.3g}")
    print(seed, more, "atol", atol, "largest", np.abs(exact).max())
    told = {key: value for key, value in {**SETTINGS, **more}.items() if value is not None}
    lines.append(json.dumps(dict(kind="instruct_pix2pix", settings=told, seed=seed, atol=atol, values=packed(exact.ravel()[::5]))))
with open(f"{here}/instruct_pix2pix.jsonl", "w") as file:
    file.write("".join(f"{line}\n" for line in lines))
