# Makes pag.jsonl: python3 pag.py, with torch, transformers, Pillow and diffusers (PYTHONPATH counts). Latents of whole calls of diffusers'
# pipelines with perturbed-attention guidance; every fifth number in float64, and `atol` twenty times what float32 is off.
import tempfile

import diffusers
import numpy as np
import torch
from recorded import call, disc, full_controlnet, here, noted, picture, with_ip_adapter, write

SETTINGS = dict(prompt="a red fox in the snow", negative_prompt="rain", num_inference_steps=5, guidance_scale=5, pag_scale=3)
SIZE = dict(height=64, width=64)
SIZES = dict(original_size=(80, 72), negative_original_size=(40, 48), negative_target_size=(56, 64))
# The kind, the layers (None: diffusers' default), and the rest of the call.
CALLS = [
    ("text2img", None, dict()),
    ("text2img", ["mid"], dict(guidance_scale=1, pag_scale=2, num_images_per_prompt=2)),
    ("text2img", ["mid"], dict(num_images_per_prompt=2, **SIZES)),
    ("text2img", ["mid"], dict(pag_adaptive_scale=0.004)),
    ("text2img", ["down_blocks.2", "up_blocks.0.attentions.1"], dict(guidance_rescale=0.7, scheduler="DPMSolverMultistepScheduler")),
    ("text2img", ["up"], dict(guidance_scale=1, pag_adaptive_scale=0.001, scheduler="EulerAncestralDiscreteScheduler")),
    ("text2img", ["down"], dict(denoising_end=0.7)),
    ("img2img", ["mid", "down_blocks.1.attentions.0"], dict(strength=0.6, num_images_per_prompt=2)),
    ("inpaint", ["mid"], dict(strength=0.9)),
    ("refiner", ["down_blocks.1"], dict(strength=0.8)),
    ("controlled", ["mid"], dict(controlnet_conditioning_scale=0.8, control_guidance_end=0.6)),
    ("adapted", ["mid"], dict(num_images_per_prompt=2)),
]
FILES = dict(refiner="tiny-sdxl-refiner")
CLASSES = dict(
    text2img=diffusers.StableDiffusionXLPAGPipeline,
    img2img=diffusers.StableDiffusionXLPAGImg2ImgPipeline,
    inpaint=diffusers.StableDiffusionXLPAGInpaintPipeline,
    refiner=diffusers.StableDiffusionXLPAGImg2ImgPipeline,
    adapted=diffusers.StableDiffusionXLPAGPipeline,
)
scratch = tempfile.TemporaryDirectory()


def pipeline_of(kind, dtype, layers):
    applied = {} if layers is None else dict(pag_applied_layers=layers)
    if kind == "adapted":
        made = CLASSES[kind].from_pretrained(f"{here}/tiny-sdxl", torch_dtype=dtype, **applied)
        return with_ip_adapter(made, scratch.name, 0.7).to(dtype)
    if kind != "controlled":
        return CLASSES[kind].from_pretrained(f"{here}/{FILES.get(kind, 'tiny-sdxl')}", torch_dtype=dtype, **applied).to(dtype)
    parts = diffusers.StableDiffusionXLPipeline.from_pretrained(f"{here}/tiny-sdxl", torch_dtype=torch.float32).components
    return diffusers.StableDiffusionXLControlNetPAGPipeline(**parts, controlnet=full_controlnet(parts["unet"], dtype), **applied).to(dtype)


def given(kind):
    if kind == "text2img":
        return SIZE
    if kind == "adapted":
        return dict(**SIZE, ip_adapter_image=picture(1, 117, 149))
    if kind == "controlled":
        return dict(**SIZE, image=picture(1, 64, 64))
    return dict(image=picture(4, 64, 64), **(dict(**SIZE, mask_image=disc()) if kind == "inpaint" else {}))


lines = []
for seed, (kind, layers, more) in enumerate(CALLS):

    def drawn(dtype, **other):
        pipeline, settings = call(pipeline_of(kind, dtype, layers), {**SETTINGS, **more, **other})
        generator = torch.Generator("cpu").manual_seed(seed)
        return pipeline(generator=generator, output_type="latent", **settings, **given(kind)).images.double().numpy()

    rough, exact = drawn(torch.float32), drawn(torch.float64)
    case = noted(rough, exact, 5)
    print(kind, layers, "atol", case["atol"], "from unperturbed", np.abs(exact - drawn(torch.float64, pag_scale=0)).max())
    settings = {**SETTINGS, **more, **({} if layers is None else {"pag_applied_layers": layers})}
    lines.append(dict(kind=kind, settings=settings, seed=seed, **case))
write("pag", lines)
