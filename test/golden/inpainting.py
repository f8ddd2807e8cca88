# Makes inpainting.jsonl: python3 inpainting.py, with torch, transformers, Pillow, diffusers and DeepCache (PYTHONPATH counts). Latents of whole
# calls of diffusers' inpainting pipelines over tiny-sdxl with a first convolution of nine channels; every fifth number in float64, and
# `atol` twenty times what float32 is off.
import tempfile

import diffusers
import numpy as np
import torch
from formulas import weight
from recorded import call, disc, full_controlnet, here, noted, picture, randn, with_ip_adapter, write

SETTINGS = dict(prompt="a red fox in the snow", negative_prompt="rain", num_inference_steps=5, guidance_scale=5)
SIZE = dict(height=64, width=64)
# The kind, its seed or a seed for each image, and the rest of the call; `noise` is the seed of latents that are given.
CALLS = [
    ("inpainting", 0, dict(strength=1.0)),
    ("inpainting", 1, dict(scheduler="EulerAncestralDiscreteScheduler", num_images_per_prompt=2)),
    ("inpainting", 2, dict(scheduler="DPMSolverMultistepScheduler", strength=0.6, guidance_scale=1)),
    ("inpainting", [3, 30], dict(scheduler="HeunDiscreteScheduler", strength=0.8, num_images_per_prompt=2)),
    ("inpainting", 4, dict(scheduler="DDIMScheduler", denoising_start=0.4, denoising_end=0.8, num_inference_steps=10)),
    ("inpainting", 5, dict(scheduler="UniPCMultistepScheduler", strength=1.0, guidance_rescale=0.7, num_images_per_prompt=2)),
    ("inpainting", 6, dict(strength=0.6, noise=7)),
    ("inpainting", 7, dict(pag_scale=3, strength=0.9)),
    ("inpainting", 8, dict(pag_scale=2, guidance_scale=1, num_images_per_prompt=2)),
    ("inpainting", 9, dict(cache_interval=2, cache_branch_id=2, strength=0.9)),
    ("inpainting controlled", 10, dict(controlnet_conditioning_scale=0.8, control_guidance_end=0.6, num_images_per_prompt=2)),
    ("inpainting controlled", 11, dict(controlnet_conditioning_scale=0.8, guess_mode=True, strength=1.0)),
    ("inpainting adapted", 12, dict(strength=0.9, num_images_per_prompt=2)),
    ("cropped", 13, dict(strength=0.7, padding_mask_crop=5)),
]


def plain_unet():
    return diffusers.UNet2DConditionModel.from_pretrained(f"{here}/tiny-sdxl", subfolder="unet", torch_dtype=torch.float32)


def unet_of(dtype):
    unet = plain_unet()
    bias = unet.conv_in.bias
    unet.conv_in = torch.nn.Conv2d(9, 16, 3, padding=1)
    unet.conv_in.weight.copy_(weight("inpainting", "conv_in.weight", [16, 9, 3, 3]))
    unet.conv_in.bias.copy_(bias)
    unet.register_to_config(in_channels=9)
    return unet.to(dtype)


scratch = tempfile.TemporaryDirectory()


def pipeline_of(kind, dtype, perturbed):
    parts = dict(unet=unet_of(dtype), torch_dtype=dtype)
    model = f"{here}/tiny-sdxl"
    if kind == "inpainting controlled":
        made = diffusers.StableDiffusionXLControlNetInpaintPipeline.from_pretrained(model, controlnet=full_controlnet(plain_unet(), dtype), **parts)
    elif perturbed:
        made = diffusers.StableDiffusionXLPAGInpaintPipeline.from_pretrained(model, **parts)
    else:
        made = diffusers.StableDiffusionXLInpaintPipeline.from_pretrained(model, **parts)
    if kind == "inpainting adapted":
        with_ip_adapter(made, scratch.name, 0.7)
    return made.to(dtype)


def given(kind):
    if kind == "cropped":
        return dict(image=picture(4, 80, 72), mask_image=disc(80, 72))
    more = {"inpainting controlled": dict(control_image=picture(1, 64, 64)), "inpainting adapted": dict(ip_adapter_image=picture(1, 117, 149))}
    return dict(image=picture(4, 64, 64), mask_image=disc(), **more.get(kind, {}))


def drawn(kind, seed, dtype, more):
    settings = {**SETTINGS, **more}
    noise = settings.pop("noise", None)
    pipeline, settings = call(pipeline_of(kind, dtype, "pag_scale" in settings), settings)
    if noise is not None:
        settings["latents"] = randn(1, 4, 8, 8, generator=torch.Generator("cpu").manual_seed(noise)).to(dtype)
    made = [torch.Generator("cpu").manual_seed(each) for each in ([seed] if isinstance(seed, int) else seed)]
    # With padding_mask_crop a pipeline gives pictures alone.
    seen = []
    pipeline(
        generator=made[0] if len(made) == 1 else made, output_type="pil" if kind == "cropped" else "latent",
        callback_on_step_end=lambda pipe, i, t, state: (seen.append(state["latents"]), state)[1],
        callback_on_step_end_tensor_inputs=["latents"], **SIZE, **settings, **given(kind),
    )
    return seen[-1].double().numpy()


lines = []
for kind, seed, more in CALLS:
    rough, exact = (drawn(kind, seed, dtype, more) for dtype in (torch.float32, torch.float64))
    case = noted(rough, exact, 5)
    print(kind, seed, more, "atol", case["atol"], "largest", np.abs(exact).max())
    lines.append(dict(kind=kind, settings={**SETTINGS, **more}, seed=seed, **case))
write("inpainting", lines)
