# Makes t2i_adapter.jsonl: python3 t2i_adapter.py, with torch, transformers, Pillow, diffusers and DeepCache (PYTHONPATH counts). Latents of
# whole calls of StableDiffusionXLAdapterPipeline, and of pipelines without adapters whose UNet is handed what T2IAdapter gives; every fifth
# number in float64, and `atol` twenty times what float32 is off.
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


def fill(module, name):
    for key, value in module.state_dict().items():
        if "position_ids" not in key:
            value.copy_(weight(name, key, list(value.shape)))
    return module


def picture(seed, width, height):
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    return Image.fromarray((((3 * x + (5 + 2 * c) * y + 40 * seed) ^ ((x >> 3) * (c + 1 + seed) * 9)) & 255).astype(np.uint8))


def disc():
    y, x = np.meshgrid(np.arange(64), np.arange(64), indexing="ij")
    return Image.fromarray((((x - 30) ** 2 + (y - 36) ** 2 < 400) * 255).astype(np.uint8))


CONFIG = dict(channels=[16, 24, 32, 32], downscale_factor=16, adapter_type="full_adapter_xl")
ADAPTERS = dict(edges=dict(**CONFIG, in_channels=3, num_res_blocks=2), sketch=dict(**CONFIG, in_channels=1, num_res_blocks=1))
# The vision encoder and the plain adapter of ip_adapter.py.
ENCODER = dict(
    hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=3, image_size=56, patch_size=14,
    projection_dim=40, hidden_act="gelu",
)
CONTEXT = 80
WIDTHS = [24, 24] + [32] * 4 + [32] * 6 + [24] * 3 + [32] * 2


def write_ip_adapter(folder):
    fill(CLIPVisionModelWithProjection(CLIPVisionConfig(**ENCODER)), "image_encoder").save_pretrained(f"{folder}/image_encoder")
    shapes = {"image_proj.proj.weight": [4 * CONTEXT, ENCODER["projection_dim"]], "image_proj.proj.bias": [4 * CONTEXT]}
    shapes.update({f"image_proj.norm.{each}": [CONTEXT] for each in ("weight", "bias")})
    for i, width in enumerate(WIDTHS):
        shapes.update({f"ip_adapter.{2 * i + 1}.{each}.weight": [width, CONTEXT] for each in ("to_k_ip", "to_v_ip")})
    save_file({key: weight("plain", key, shape) for key, shape in shapes.items()}, f"{folder}/plain.safetensors")


scratch = tempfile.TemporaryDirectory()
write_ip_adapter(scratch.name)
randn = torch.randn


def drawn_in_float32(*args, dtype=None, **more):
    return randn(*args, dtype=torch.float32, **more).to(dtype or torch.float32)


torch.randn = drawn_in_float32
SETTINGS = dict(prompt="a red fox in the snow", negative_prompt="rain", num_inference_steps=5, guidance_scale=5, height=64, width=64)
PAIR = dict(prompt=["a red fox", "a castle"], negative_prompt=["rain", "fog"])
# The kind, adapters with their pictures and scales, and the rest of the call.
CALLS = [
    ("text2img", [("edges", (1, 64, 64), 1)], dict(num_images_per_prompt=2)),
    ("text2img", [("sketch", (2, 90, 70), 0.7)], dict(scheduler="DPMSolverMultistepScheduler", adapter_conditioning_factor=0.6, height=96)),
    ("text2img", [("edges", (3, 117, 149), 1.4)], dict(scheduler="EulerAncestralDiscreteScheduler", guidance_scale=1)),
    ("text2img", [("edges", (1, 64, 64), 0.6), ("sketch", (2, 80, 48), 1.2)], dict(scheduler="DDIMScheduler", height=48, width=80)),
    ("text2img", [("sketch", (2, 64, 64), 0.5), ("edges", (3, 72, 60), -0.8)], dict(scheduler="UniPCMultistepScheduler", adapter_conditioning_factor=0.25)),
    ("text2img", [("edges", (4, 64, 64), 1)], PAIR),
    ("text2img", [("edges", (1, 64, 64), 1)], dict(scheduler="HeunDiscreteScheduler", denoising_end=0.8, adapter_conditioning_factor=0.5)),
    ("text2img", [("edges", (1, 64, 64), 1)], dict(guidance_rescale=0.7, scheduler="LMSDiscreteScheduler")),
    ("adapted", [("edges", (2, 64, 64), 0.8)], dict()),
    ("img2img", [("edges", (1, 64, 64), 1)], dict(strength=0.6, num_images_per_prompt=2)),
    ("inpaint", [("sketch", (1, 64, 64), 1)], dict(strength=0.9)),
    ("controlled", [("edges", (2, 64, 64), 1)], dict(controlnet_conditioning_scale=0.8, control_guidance_end=0.6)),
    ("perturbed", [("edges", (2, 64, 64), 1)], dict(pag_scale=3)),
    ("cached", [("edges", (2, 64, 64), 1)], dict(cache_interval=2, cache_branch_id=1)),
    ("cached", [("sketch", (2, 64, 64), 1)], dict(cache_interval=3, cache_branch_id=5)),
]
OTHERS = dict(
    img2img=diffusers.StableDiffusionXLImg2ImgPipeline,
    inpaint=diffusers.StableDiffusionXLInpaintPipeline,
    perturbed=diffusers.StableDiffusionXLPAGPipeline,
    cached=diffusers.StableDiffusionXLPipeline,
)


def adapter_of(name, dtype):
    return fill(diffusers.T2IAdapter(**ADAPTERS[name]), name).to(dtype)


def seen(name, of):
    return picture(*of).convert("L") if ADAPTERS[name]["in_channels"] == 1 else picture(*of)


def opened(kind, adapters, dtype):
    load = lambda made, **more: made.from_pretrained(f"{here}/tiny-sdxl", torch_dtype=torch.float32, **more)
    if kind in ("text2img", "adapted"):
        models = [adapter_of(name, dtype) for name, *_ in adapters]
        adapter = diffusers.MultiAdapter(models) if len(models) > 1 else models[0]
        pipeline = load(diffusers.StableDiffusionXLAdapterPipeline, adapter=adapter)
        if kind == "adapted":
            pipeline.load_ip_adapter(scratch.name, subfolder="", weight_name="plain.safetensors", image_encoder_folder="image_encoder")
            pipeline.set_ip_adapter_scale(0.7)
        return pipeline.to(dtype)
    if kind == "controlled":
        parts = load(diffusers.StableDiffusionXLPipeline).components
        net = diffusers.ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(4, 8, 12, 16))
        return diffusers.StableDiffusionXLControlNetPipeline(**parts, controlnet=fill(net, "full")).to(dtype)
    return load(OTHERS[kind]).to(dtype)


def hand_over(unet, adapters, dtype):
    """Has the UNet add in each call what adapters of one picture give."""
    [(name, of, scale)] = adapters
    pixels = torch.from_numpy(np.atleast_3d(np.asarray(seen(name, of), dtype=np.float32) / 255)).permute(2, 0, 1)[None]
    features = [scale * x for x in adapter_of(name, dtype)(pixels.to(dtype))]
    forward = unet.forward

    def followed(sample, *args, **more):
        within = [x.repeat(sample.shape[0], 1, 1, 1) for x in features]
        return forward(sample, *args, down_intrablock_additional_residuals=within, **more)

    unet.forward = followed


def drawn(kind, adapters, seed, dtype, settings):
    settings = dict(settings)
    scheduler = settings.pop("scheduler", None)
    cache = {key: settings.pop(key) for key in list(settings) if key.startswith("cache_")}
    pipeline = opened(kind, adapters, dtype)
    pipeline.set_progress_bar_config(disable=True)
    if scheduler:
        pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    if cache:
        helper = DeepCacheSDHelper(pipe=pipeline)
        helper.set_params(**cache)
        helper.enable()
    if kind in ("text2img", "adapted"):
        images, scales = [seen(name, of) for name, of, _ in adapters], [scale for *_, scale in adapters]
        prompts = len(settings["prompt"]) if isinstance(settings["prompt"], list) else 1
        settings["image"] = images if len(images) > 1 else images * prompts
        settings["adapter_conditioning_scale"] = scales if len(scales) > 1 else scales[0]
        settings.update(dict(ip_adapter_image=picture(1, 117, 149)) if kind == "adapted" else {})
    else:
        hand_over(pipeline.unet, adapters, dtype)
        settings.update(dict(image=picture(4, 64, 64)) if kind in ("img2img", "inpaint") else {})
        settings.update(dict(mask_image=disc()) if kind == "inpaint" else {})
        settings.update(dict(image=picture(1, 64, 64)) if kind == "controlled" else {})
    if kind == "img2img":
        settings = {name: value for name, value in settings.items() if name not in ("height", "width")}
    generator = torch.Generator("cpu").manual_seed(seed)
    return pipeline(generator=generator, output_type="latent", **settings).images.double().numpy()


def packed(values):
    return base64.b64encode(np.asarray(values, dtype=np.float32).tobytes()).decode()


lines = []
for name, config in ADAPTERS.items():
    made = adapter_of(name, torch.float32)
    keys = {key: list(value.shape) for key, value in made.state_dict().items()}
    lines.append(json.dumps(dict(adapter=name, config=json.loads(made.to_json_string()), keys=keys)))
for seed, (kind, adapters, more) in enumerate(CALLS):
    settings = {**SETTINGS, **more}
    rough, exact = (drawn(kind, adapters, seed, dtype, settings) for dtype in (torch.float32, torch.float64))
    without = drawn(kind, [(name, of, 0) for name, of, _ in adapters], seed, torch.float64, settings)
    atol = float(f"{20 * max(np.abs(exact - rough).max(), 2.0**-24 * np.abs(exact).max()):.3g}")
    print(kind, adapters, more, "atol", atol, "from without", np.abs(exact - without).max())
    case = dict(kind=kind, adapters=adapters, settings=settings, seed=seed, atol=atol, values=packed(exact.ravel()[::5]))
    lines.append(json.dumps(case))
with open(f"{here}/t2i_adapter.jsonl", "w") as file:
    file.write("".join(f"{line}\n" for line in lines))
