# Makes pag.jsonl: python3 pag.py, with torch, transformers, Pillow and diffusers (PYTHONPATH counts). Latents of whole calls of diffusers'
# pipelines with perturbed-attention guidance; every fifth number in float64, and `atol` twenty times what float32 is off.
import base64
import json
import math
import os
import tempfile

import diffusers
import numpy as np
import torch
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


def pipeline_of(kind, dtype, layers):
    applied = {} if layers is None else dict(pag_applied_layers=layers)
    if kind == "adapted":
        made = CLASSES[kind].from_pretrained(f"{here}/tiny-sdxl", torch_dtype=dtype, **applied)
        made.load_ip_adapter(scratch.name, subfolder="", weight_name="plain.safetensors", image_encoder_folder="image_encoder")
        made.set_ip_adapter_scale(0.7)
        return made.to(dtype)
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


def packed(values):
    return base64.b64encode(np.asarray(values, dtype=np.float32).tobytes()).decode()


lines = []
for seed, (kind, layers, more) in enumerate(CALLS):

    def drawn(dtype, **other):
        settings = {**SETTINGS, **more, **other}
        scheduler = settings.pop("scheduler", None)
        pipeline = pipeline_of(kind, dtype, layers)
        pipeline.set_progress_bar_config(disable=True)
        if scheduler:
            pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
        generator = torch.Generator("cpu").manual_seed(seed)
        return pipeline(generator=generator, output_type="latent", **settings, **given(kind)).images.double().numpy()

    rough, exact = drawn(torch.float32), drawn(torch.float64)
    atol = float(f"{20 * max(np.abs(exact - rough).max(), 2.0**-24 * np.abs(exact).max()):.3g}")
    print(kind, layers, "atol", atol, "from unperturbed", np.abs(exact - drawn(torch.float64, pag_scale=0)).max())
    settings = {**SETTINGS, **more, **({} if layers is None else {"pag_applied_layers": layers})}
    lines.append(json.dumps(dict(kind=kind, settings=settings, seed=seed, atol=atol, values=packed(exact.ravel()[::5]))))
with open(f"{here}/pag.jsonl", "w") as file:
    file.write("".join(f"{line}\n" for line in lines))
