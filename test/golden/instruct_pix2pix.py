# Makes instruct_pix2pix.jsonl: python3 instruct_pix2pix.py, with torch, transformers, Pillow and diffusers (PYTHONPATH counts). Latents of
# whole calls of diffusers' StableDiffusionXLInstructPix2PixPipeline over tiny-sdxl with a first convolution of eight channels; every fifth
# number in float64, and `atol` twenty times what float32 is off.
import numpy as np
import torch
from recorded import call, instruct_pix2pix, noted, picture, randn, write

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


def drawn(seed, dtype, more):
    settings = {**SETTINGS, **more}
    noise = settings.pop("noise", None)
    pipeline, settings = call(instruct_pix2pix(dtype), settings)
    if noise is not None:
        settings["latents"] = randn(1, 4, 8, 8, generator=torch.Generator("cpu").manual_seed(noise)).to(dtype)
    made = [torch.Generator("cpu").manual_seed(each) for each in ([seed] if isinstance(seed, int) else seed)]
    given = dict(image=picture(4, 64, 64), height=64, width=64, output_type="latent", return_dict=True)
    return pipeline(generator=made[0] if len(made) == 1 else made, **given, **settings).images.double().numpy()


lines = []
for seed, more in CALLS:
    rough, exact = (drawn(seed, dtype, more) for dtype in (torch.float32, torch.float64))
    case = noted(rough, exact, 5)
    print(seed, more, "atol", case["atol"], "largest", np.abs(exact).max())
    told = {key: value for key, value in {**SETTINGS, **more}.items() if value is not None}
    lines.append(dict(kind="instruct_pix2pix", settings=told, seed=seed, **case))
write("instruct_pix2pix", lines)
