# Makes hires.jsonl: python3 hires.py, with torch, transformers and diffusers (PYTHONPATH counts): torch's interpolate, and a second pass as
# A1111 does it, over diffusers' latents of a first one. Numbers of the passes are float64's, and `atol` twenty times what float32 is off.
import base64
import json
import os

import diffusers
import numpy as np
import torch
import torch.nn.functional as F

here = os.path.dirname(os.path.abspath(__file__))
torch.set_grad_enabled(False)
diffusers.utils.logging.set_verbosity_error()
lines = []


def told(values):
    return base64.b64encode(values.float().contiguous().numpy().tobytes()).decode()


def planes(n, c, h, w):
    return torch.sin(torch.arange(n * c * h * w, dtype=torch.float64) * 1.7).reshape(n, c, h, w)


MODES = [("nearest", False), ("nearest-exact", False), ("bilinear", False), ("bilinear", True), ("bicubic", False), ("bicubic", True)]
for (n, c, h, w), size in [((2, 2, 5, 7), (8, 14)), ((1, 1, 6, 4), (9, 5)), ((1, 1, 9, 8), (4, 3)), ((1, 1, 1, 2), (3, 5))]:
    for mode, antialias in MODES:
        y = F.interpolate(planes(n, c, h, w), size=size, mode=mode, antialias=antialias)
        lines.append(dict(kind="interpolate", shape=[n, c, h, w], size=size, mode=mode, antialias=antialias, values=told(y)))

# In float32, as pictures' latents are: here some places lie on borders, from one side of which float64's rounding takes them.
for before, after in [(128, 230), (104, 176), (120, 220)]:
    for mode in ("nearest", "nearest-exact"):
        y = F.interpolate(planes(1, 1, 1, before).float(), size=(1, after), mode=mode)
        lines.append(dict(kind="interpolate", shape=[1, 1, 1, before], size=[1, after], mode=mode, antialias=False, values=told(y)))


def passes(dtype, prompt, seed, size, larger, steps, hires_steps, strength, again={}, **how):
    base = diffusers.StableDiffusionXLPipeline.from_pretrained(f"{here}/tiny-sdxl", torch_dtype=dtype)
    base.set_progress_bar_config(disable=True)
    seeded = lambda: torch.Generator("cpu").manual_seed(seed)
    noise = lambda n: torch.randn((1, 4, n // 8, n // 8), generator=seeded(), dtype=torch.float32).to(dtype)
    say = dict(prompt=prompt, negative_prompt="rain", output_type="latent", guidance_scale=5.0)
    first = base(**say, width=size, height=size, num_inference_steps=steps, latents=noise(size)).images
    ratio = size // first.shape[-1]
    enlarged = F.interpolate(first, size=(larger // ratio, larger // ratio), **how)
    over = diffusers.StableDiffusionXLImg2ImgPipeline(**base.components)
    over.set_progress_bar_config(disable=True)
    # A1111's setup_img2img_steps: as many steps as asked for, of a schedule that is so much longer.
    total = int(hires_steps / min(strength, 0.999))
    over.get_timesteps = lambda n, *_, **__: (over.scheduler.timesteps[total - hires_steps:], hires_steps)
    over.scheduler.set_begin_index = lambda *_: setattr(over.scheduler, "_begin_index", total - hires_steps)
    over.scheduler.set_begin_index()
    over.prepare_latents_ = over.prepare_latents
    drawn = torch.randn(enlarged.shape, generator=seeded(), dtype=torch.float32).to(dtype)

    def prepare(image, timestep, *_, **__):
        return over.scheduler.add_noise(image, drawn, timestep)

    over.prepare_latents = prepare
    over.image_processor.preprocess = lambda image, *_, **__: image
    return over(**{**say, **again}, image=enlarged, strength=strength, num_inference_steps=total).images


CASES = [
    dict(prompt="a red fox", seed=7, size=128, larger=192, steps=4, hires_steps=3, strength=0.7, mode="bilinear", antialias=False),
    dict(prompt="a red fox", seed=8, size=64, larger=128, steps=3, hires_steps=5, strength=0.55, mode="bicubic", antialias=True),
    dict(prompt="a red fox", seed=9, size=64, larger=96, steps=3, hires_steps=2, strength=0.7, mode="nearest", antialias=False,
         again=dict(prompt="a blue hare, in snow", negative_prompt="fog", guidance_scale=3.0)),
]
for case in CASES:
    exact, rough = passes(torch.float64, **case), passes(torch.float32, **case)
    off = (exact - rough.double()).abs().max().item()
    lines.append(dict(kind="passes", **case, atol=20 * off, values=told(exact), shape=list(exact.shape)))
    print(case["prompt"], off, list(exact.shape))
with open(f"{here}/hires.jsonl", "w") as file:
    for line in lines:
        file.write(json.dumps(line) + "\n")
