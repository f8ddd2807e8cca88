# Makes freeu.jsonl: python3 freeu.py, with torch, transformers, Pillow, diffusers (PYTHONPATH counts). Latents of whole calls of
# diffusers' pipelines after enable_freeu; every fifth number in float64, and `atol` twenty times what float32 is off. The filter, which
# is float32 there whatever the type, is left in the type of the call.
import diffusers
import numpy as np
import torch
from diffusers.utils import torch_utils
from recorded import call, full_controlnet, here, noted, picture, write

SETTINGS = dict(prompt="a red fox in the snow", negative_prompt="rain", num_inference_steps=4, guidance_scale=5)
FREEU = dict(s1=0.9, s2=0.2, b1=1.3, b2=1.4)
# The kind, the four numbers, and the rest of the call. 72x88 are images of 5x6 and 3x3 in the levels that are meant.
CALLS = [
    ("text2img", FREEU, dict()),
    ("text2img", dict(s1=0.3, s2=1.5, b1=1.1, b2=0.7), dict(height=72, width=88, num_images_per_prompt=2)),
    ("img2img", FREEU, dict(strength=0.6)),
    ("refiner", FREEU, dict(strength=0.8)),
    ("controlled", FREEU, dict(control_guidance_end=0.6)),
    ("text2img", FREEU, dict(pag_scale=3)),
]
CLASSES = dict(
    text2img=diffusers.StableDiffusionXLPipeline,
    img2img=diffusers.StableDiffusionXLImg2ImgPipeline,
    refiner=diffusers.StableDiffusionXLImg2ImgPipeline,
)


class Exact:
    """torch as the filter sees it, whose float32 is the type of the call."""

    def __init__(self, dtype):
        self.float32 = dtype

    def __getattr__(self, name):
        return getattr(torch, name)


def pipeline_of(kind, dtype, perturbed):
    if kind != "controlled":
        made = diffusers.StableDiffusionXLPAGPipeline if perturbed else CLASSES[kind]
        return made.from_pretrained(f"{here}/tiny-sdxl{'-refiner' * (kind == 'refiner')}", torch_dtype=dtype).to(dtype)
    parts = diffusers.StableDiffusionXLPipeline.from_pretrained(f"{here}/tiny-sdxl", torch_dtype=torch.float32).components
    return diffusers.StableDiffusionXLControlNetPipeline(**parts, controlnet=full_controlnet(parts["unet"], dtype)).to(dtype)


def drawn(kind, seed, dtype, freeu, settings):
    torch_utils.torch = Exact(dtype)
    pipeline = pipeline_of(kind, dtype, "pag_scale" in settings)
    if freeu:
        pipeline.enable_freeu(**freeu)
    pipeline, settings = call(pipeline, settings)
    size = {} if kind in ("img2img", "refiner") else dict(height=64, width=64)
    image = {} if kind == "text2img" else dict(image=picture(1 if kind == "controlled" else 4, 64, 64))
    generator = torch.Generator("cpu").manual_seed(seed)
    return pipeline(generator=generator, output_type="latent", **{**size, **image, **settings}).images.double().numpy()


lines = []
for seed, (kind, freeu, more) in enumerate(CALLS):
    settings = {**SETTINGS, **more}
    rough, exact = (drawn(kind, seed, dtype, freeu, settings) for dtype in (torch.float32, torch.float64))
    case = noted(rough, exact, 5)
    print(kind, more, "atol", case["atol"], "from without", np.abs(exact - drawn(kind, seed, torch.float64, None, settings)).max())
    lines.append(dict(kind=kind, settings={**settings, "freeu": freeu}, seed=seed, **case))
write("freeu", lines)
