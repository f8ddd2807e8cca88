# Makes deepcache.jsonl: python3 deepcache.py, with torch, transformers, Pillow, diffusers and DeepCache (PYTHONPATH counts). Latents of whole
# calls under DeepCache's own helper; every fifth number in float64, and `atol` twenty times what float32 is off.
import diffusers
import numpy as np
import torch
from recorded import call, disc, full_controlnet, here, noted, picture, write

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


def drawn(kind, seed, dtype, settings):
    pipeline, settings = call(pipeline_of(kind, dtype), settings)
    generator = torch.Generator("cpu").manual_seed(seed)
    return pipeline(generator=generator, output_type="latent", **settings, **given(kind)).images.double().numpy()


lines = []
for seed, (kind, interval, branch, more) in enumerate(CALLS):
    plain = {**SETTINGS, **more}
    settings = {**plain, "cache_interval": interval, "cache_branch_id": branch}
    rough, exact = (drawn(kind, seed, dtype, settings) for dtype in (torch.float32, torch.float64))
    case = noted(rough, exact, 5)
    print(kind, interval, branch, "atol", case["atol"], "from uncached", np.abs(exact - drawn(kind, seed, torch.float64, plain)).max())
    lines.append(dict(kind=kind, settings=settings, seed=seed, **case))
write("deepcache", lines)
