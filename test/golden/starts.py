# Makes starts.jsonl: python3 starts.py, with torch, transformers, Pillow and diffusers (PYTHONPATH counts). Calls that begin with latents
# or embeddings of a caller's own; numbers are float64's, and `atol` twenty times what float32 is off.
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
CLASSES = dict(
    text2img=diffusers.StableDiffusionXLPipeline,
    img2img=diffusers.StableDiffusionXLImg2ImgPipeline,
    inpaint=diffusers.StableDiffusionXLInpaintPipeline,
)
SETTINGS = dict(prompt="a red fox in the snow", negative_prompt="rain", num_inference_steps=6, guidance_scale=5)
SIZE = dict(height=64, width=64)
randn = torch.randn


def drawn_in_float32(*args, dtype=None, **more):
    return randn(*args, dtype=torch.float32, **more).to(dtype or torch.float32)


torch.randn = drawn_in_float32


# As in ip_adapter.py.
def picture(seed, width, height):
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    return Image.fromarray((((3 * x + (5 + 2 * c) * y + 40 * seed) ^ ((x >> 3) * (c + 1 + seed) * 9)) & 255).astype(np.uint8))


def disc():
    y, x = np.meshgrid(np.arange(64), np.arange(64), indexing="ij")
    return Image.fromarray((((x - 30) ** 2 + (y - 36) ** 2 < 400) * 255).astype(np.uint8))


def noise(seed, rows, dtype):
    """Latents of a seed, of unit variance."""
    return randn(rows, 4, 8, 8, generator=torch.Generator("cpu").manual_seed(seed)).to(dtype)


# What each call is given: `latents` and `image` are a seed's noise, its rows after it; `image` may be a picture by its own three numbers.
CALLS = [
    ("text2img", dict(latents=(7, 2)), dict(num_images_per_prompt=2, scheduler="EulerAncestralDiscreteScheduler")),
    ("img2img", dict(latents=(7, 1), image=(4, 64, 64)), dict(strength=0.6)),
    ("img2img", dict(image=(7, 2)), dict(strength=0.6, num_images_per_prompt=2)),
    ("img2img", dict(image=(7, 1)), dict(denoising_start=0.5)),
    ("inpaint", dict(latents=(7, 1), image=(4, 64, 64), mask=True), dict(strength=0.6)),
    ("inpaint", dict(image=(7, 1), mask=True), dict(strength=0.6)),
]


def given(inputs, dtype):
    latents = {"latents": noise(*inputs["latents"], dtype)} if "latents" in inputs else {}
    image = inputs.get("image")
    over = {} if image is None else {"image": picture(*image) if len(image) == 3 else noise(*image, dtype)}
    return {**latents, **over, **({"mask_image": disc()} if "mask" in inputs else {})}


def packed(values):
    return base64.b64encode(np.asarray(values, dtype=np.float32).tobytes()).decode()


lines = []
for number, (kind, inputs, more) in enumerate(CALLS):
    settings = dict(more)
    scheduler = settings.pop("scheduler", None)
    results = []
    for dtype in (torch.float32, torch.float64):
        pipeline = CLASSES[kind].from_pretrained(f"{here}/tiny-sdxl", torch_dtype=dtype)
        pipeline.to(dtype)
        pipeline.set_progress_bar_config(disable=True)
        if scheduler:
            pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
        generator = torch.Generator("cpu").manual_seed(number)
        size = {} if kind == "img2img" else SIZE
        call = {**SETTINGS, **size, **settings, **given(inputs, dtype)}
        results.append(pipeline(generator=generator, output_type="latent", **call).images.double().numpy())
    rough, exact = results
    atol = float(f"{20 * max(np.abs(exact - rough).max(), 2.0**-24 * np.abs(exact).max()):.3g}")
    lines.append(json.dumps(dict(kind=kind, inputs=inputs, settings=more, seed=number, atol=atol, values=packed(exact))))
with open(f"{here}/starts.jsonl", "w") as file:
    file.write("".join(f"{line}\n" for line in lines))
