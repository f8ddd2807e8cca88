# Makes starts.jsonl: python3 starts.py, with torch, transformers, Pillow and diffusers (PYTHONPATH counts). Calls that begin with latents
# or embeddings of a caller's own; numbers are float64's, and `atol` twenty times what float32 is off.
import diffusers
import torch
from recorded import call, disc, here, noted, picture, randn, write

CLASSES = dict(
    text2img=diffusers.StableDiffusionXLPipeline,
    img2img=diffusers.StableDiffusionXLImg2ImgPipeline,
    inpaint=diffusers.StableDiffusionXLInpaintPipeline,
)
SETTINGS = dict(prompt="a red fox in the snow", negative_prompt="rain", num_inference_steps=6, guidance_scale=5)
SIZE = dict(height=64, width=64)


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


lines = []
for number, (kind, inputs, more) in enumerate(CALLS):
    results = []
    for dtype in (torch.float32, torch.float64):
        made = CLASSES[kind].from_pretrained(f"{here}/tiny-sdxl", torch_dtype=dtype)
        pipeline, settings = call(made.to(dtype), more)
        generator = torch.Generator("cpu").manual_seed(number)
        size = {} if kind == "img2img" else SIZE
        asked = {**SETTINGS, **size, **settings, **given(inputs, dtype)}
        results.append(pipeline(generator=generator, output_type="latent", **asked).images.double().numpy())
    lines.append(dict(kind=kind, inputs=inputs, settings=more, seed=number, **noted(*results)))
write("starts", lines)
