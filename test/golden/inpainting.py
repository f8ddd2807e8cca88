# Makes inpainting.jsonl: python3 inpainting.py, with torch, transformers, Pillow, diffusers and DeepCache (PYTHONPATH counts). Latents of whole
# calls of diffusers' inpainting pipelines over tiny-sdxl with a first convolution of nine channels; every fifth number in float64, and
# `atol` twenty times what float32 is off.
import base64
import json
import math
import os
import tempfile

import diffusers
import numpy as np
import torch
from DeepCache.extension.deepcache import DeepCacheSDHelper
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

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


def disc(width=64, height=64):
    y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return Image.fromarray((((x - 30) ** 2 + (y - 36) ** 2 < 400) * 255).astype(np.uint8))


randn = torch.randn


def drawn_in_float32(*args, dtype=None, **more):
    return randn(*args, dtype=torch.float32, **more).to(dtype or torch.float32)


torch.randn = drawn_in_float32
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


def unet_of(dtype):
    unet = diffusers.UNet2DConditionModel.from_pretrained(f"{here}/tiny-sdxl", subfolder="unet", torch_dtype=torch.float32)
    bias = unet.conv_in.bias
    unet.conv_in = torch.nn.Conv2d(9, 16, 3, padding=1)
    unet.conv_in.weight.copy_(weight("inpainting", "conv_in.weight", [16, 9, 3, 3]))
    unet.conv_in.bias.copy_(bias)
    unet.register_to_config(in_channels=9)
    return unet.to(dtype)


def full_controlnet(dtype):
    unet = diffusers.UNet2DConditionModel.from_pretrained(f"{here}/tiny-sdxl", subfolder="unet", torch_dtype=torch.float32)
    made = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 12, 16))
    for key, value in made.state_dict().items():
        value.copy_(weight("full", key, list(value.shape)))
    return made.to(dtype)


# The vision encoder and the plain adapter of ip_adapter.py.
ENCODER = dict(
    hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=3, image_size=56, patch_size=14,
    projection_dim=40, hidden_act="gelu",
)
CONTEXT = 80
WIDTHS = [24, 24] + [32] * 4 + [32] * 6 + [24] * 3 + [32] * 2


def write_adapter(folder):
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**ENCODER))
    for key, value in encoder.state_dict().items():
        if "position_ids" not in key:
            value.copy_(weight("image_encoder", key, list(value.shape)))
    encoder.save_pretrained(f"{folder}/image_encoder")
    shapes = {"image_proj.proj.weight": [4 * CONTEXT, ENCODER["projection_dim"]], "image_proj.proj.bias": [4 * CONTEXT]}
    shapes.update({f"image_proj.norm.{each}": [CONTEXT] for each in ("weight", "bias")})
    for i, width in enumerate(WIDTHS):
        shapes.update({f"ip_adapter.{2 * i + 1}.{each}.weight": [width, CONTEXT] for each in ("to_k_ip", "to_v_ip")})
    save_file({key: weight("plain", key, shape) for key, shape in shapes.items()}, f"{folder}/plain.safetensors")


scratch = tempfile.TemporaryDirectory()
write_adapter(scratch.name)


def pipeline_of(kind, dtype, perturbed):
    parts = dict(unet=unet_of(dtype), torch_dtype=dtype)
    model = f"{here}/tiny-sdxl"
    if kind == "inpainting controlled":
        made = diffusers.StableDiffusionXLControlNetInpaintPipeline.from_pretrained(model, controlnet=full_controlnet(dtype), **parts)
    elif perturbed:
        made = diffusers.StableDiffusionXLPAGInpaintPipeline.from_pretrained(model, **parts)
    else:
        made = diffusers.StableDiffusionXLInpaintPipeline.from_pretrained(model, **parts)
    if kind == "inpainting adapted":
        made.load_ip_adapter(scratch.name, subfolder="", weight_name="plain.safetensors", image_encoder_folder="image_encoder")
        made.set_ip_adapter_scale(0.7)
    return made.to(dtype)


def given(kind):
    if kind == "cropped":
        return dict(image=picture(4, 80, 72), mask_image=disc(80, 72))
    more = {"inpainting controlled": dict(control_image=picture(1, 64, 64)), "inpainting adapted": dict(ip_adapter_image=picture(1, 117, 149))}
    return dict(image=picture(4, 64, 64), mask_image=disc(), **more.get(kind, {}))


def drawn(kind, seed, dtype, more):
    settings = {**SETTINGS, **more}
    scheduler, noise = settings.pop("scheduler", None), settings.pop("noise", None)
    interval, branch = settings.pop("cache_interval", None), settings.pop("cache_branch_id", None)
    pipeline = pipeline_of(kind, dtype, "pag_scale" in settings)
    pipeline.set_progress_bar_config(disable=True)
    if scheduler:
        pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    if interval:
        helper = DeepCacheSDHelper(pipe=pipeline)
        helper.set_params(cache_interval=interval, cache_branch_id=branch)
        helper.enable()
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


def packed(values):
    return base64.b64encode(np.asarray(values, dtype=np.float32).tobytes()).decode()


lines = []
for kind, seed, more in CALLS:
    rough, exact = (drawn(kind, seed, dtype, more) for dtype in (torch.float32, torch.float64))
    atol = float(f"{20 * max(np.abs(exact - rough).max(), 2.0**-24 * np.abs(exact).max()):.3g}")
    print(kind, seed, more, "atol", atol, "largest", np.abs(exact).max())
    lines.append(json.dumps(dict(kind=kind, settings={**SETTINGS, **more}, seed=seed, atol=atol, values=packed(exact.ravel()[::5]))))
with open(f"{here}/inpainting.jsonl", "w") as file:
    file.write("".join(f"{line}\n" for line in lines))
