# Makes deepcache.jsonl: python3 deepcache.py, with torch, transformers, Pillow, diffusers and DeepCache (PYTHONPATH counts). Latents of whole
# calls under DeepCache's own helper; every fifth number in float64, and `atol` twenty times what float32 is off.
import base64
import json
import math
import os

import diffusers
import numpy as np
import torch
from DeepCache.extension.deepcache import DeepCacheSDHelper
from PIL import Image

here = os.path.dirname(os.path.abspath(__file__))
torch.set_grad_enabled(False)
diffusers.utils.logging.set_verbosity_error()


# As in controlnet_union.py.
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
    k = whole_numbers(f"{name}.{key}", math.prod(shape)).astype(np.float64)
    if len(shape) == 1:
        values = 1 + k / 1024 if key.endswith(".weight") else k / 4096
    else:
        larger = 3 if "cond_embedding" in key else 1
        values = k / 256 * 2.0 ** -math.floor(math.log2(math.prod(shape[1:])) / 2 + 0.5) * larger
    return torch.tensor(values, dtype=torch.float16).reshape(shape)


def picture(seed, width, height):
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    return Image.fromarray((((3 * x + (5 + 2 * c) * y + 40 * seed) ^ ((x >> 3) * (c + 1 + seed) * 9)) & 255).astype(np.uint8))


def disc():
    y, x = np.meshgrid(np.arange(64), np.arange(64), indexing="ij")
    return Image.fromarray((((x - 30) ** 2 + (y - 36) ** 2 < 400) * 255).astype(np.uint8))


def full_controlnet(unet, dtype):
    made = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 12, 16))
    for key, value in made.state_dict().items():
        value.copy_(weight("full", key, list(value.shape)))
    return made.to(dtype)


randn = torch.randn


def drawn_in_float32(*args, dtype=None, **more):
    return randn(*args, dtype=torch.float32, **more).to(dtype or torch.float32)


torch.randn = drawn_in_float32
SETTINGS = dict(prompt="a red fox in the snow", negative_prompt="rain", num_inference_steps=7, guidance_scale=5)
SIZE = dict(height=64, width=64)
CONTROLLED = dict(scheduler="EulerDiscreteScheduler", controlnet_conditioning_scale=0.8)
# cache_interval and cache_branch_id, and the rest of the call.
CALLS = [
    ("text2img", 2, 0, dict()),
    ("text2img", 3, 1, dict(scheduler="DPMSolverMultistepScheduler", num_images_per_prompt=2)),
    ("text2img", 3, 2, dict(scheduler="EulerAncestralDiscreteScheduler", guidance_scale=1)),
    ("text2img", 2, 3, dict(scheduler="DDIMScheduler")),
    ("text2img", 3, 4, dict(denoising_end=0.7)),
    ("text2img", 5, 8, dict(scheduler="UniPCMultistepScheduler")),
    ("img2img", 3, 5, dict(strength=0.6)),
    ("inpaint", 2, 6, dict(strength=0.9)),
    ("refiner", 3, 0, dict(strength=0.8)),
    ("refiner", 2, 10, dict(strength=0.8)),
    ("controlled", 2, 0, dict(**CONTROLLED, control_guidance_end=0.6)),
    ("controlled", 3, 4, dict(**CONTROLLED, guess_mode=True, guidance_scale=1)),
    ("controlled", 3, 8, dict(**CONTROLLED, control_guidance_start=0.2)),
]
FILES = dict(refiner="tiny-sdxl-refiner")
CLASSES = dict(
    text2img=diffusers.StableDiffusionXLPipeline,
    img2img=diffusers.StableDiffusionXLImg2ImgPipeline,
    inpaint=diffusers.StableDiffusionXLInpaintPipeline,
    refiner=diffusers.StableDiffusionXLImg2ImgPipeline,
)


def pipeline_of(kind, dtype):
    if kind != "controlled":
        return CLASSES[kind].from_pretrained(f"{here}/{FILES.get(kind, 'tiny-sdxl')}", torch_dtype=dtype).to(dtype)
    parts = diffusers.StableDiffusionXLPipeline.from_pretrained(f"{here}/tiny-sdxl", torch_dtype=torch.float32).components
    return diffusers.StableDiffusionXLControlNetPipeline(**parts, controlnet=full_controlnet(parts["unet"], dtype)).to(dtype)


def given(kind):
    if kind == "text2img":
        return SIZE
    if kind == "controlled":
        return dict(**SIZE, image=picture(1, 64, 64))
    return dict(image=picture(4, 64, 64), **(dict(**SIZE, mask_image=disc()) if kind == "inpaint" else {}))


def packed(values):
    return base64.b64encode(np.asarray(values, dtype=np.float32).tobytes()).decode()


def drawn(kind, seed, dtype, more, cache=None):
    settings = {**SETTINGS, **more}
    scheduler = settings.pop("scheduler", None)
    pipeline = pipeline_of(kind, dtype)
    pipeline.set_progress_bar_config(disable=True)
    if scheduler:
        pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    if cache:
        helper = DeepCacheSDHelper(pipe=pipeline)
        helper.set_params(cache_interval=cache[0], cache_branch_id=cache[1])
        helper.enable()
    generator = torch.Generator("cpu").manual_seed(seed)
    return pipeline(generator=generator, output_type="latent", **settings, **given(kind)).images.double().numpy()


lines = []
for seed, (kind, interval, branch, more) in enumerate(CALLS):
    rough, exact = (drawn(kind, seed, dtype, more, (interval, branch)) for dtype in (torch.float32, torch.float64))
    atol = float(f"{20 * max(np.abs(exact - rough).max(), 2.0**-24 * np.abs(exact).max()):.3g}")
    print(kind, interval, branch, "atol", atol, "from uncached", np.abs(exact - drawn(kind, seed, torch.float64, more)).max())
    settings = {**SETTINGS, **more, "cache_interval": interval, "cache_branch_id": branch}
    lines.append(json.dumps(dict(kind=kind, settings=settings, seed=seed, atol=atol, values=packed(exact.ravel()[::5]))))
with open(f"{here}/deepcache.jsonl", "w") as file:
    file.write("".join(f"{line}\n" for line in lines))
