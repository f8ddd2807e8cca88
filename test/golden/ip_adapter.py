# Makes ip_adapter.jsonl: python3 ip_adapter.py, with torch, transformers, Pillow and diffusers (PYTHONPATH counts). Weights, pictures and
# mask are formulas, which test/controlnet_golden.ts and test/ip_adapter_golden.ts have too; numbers are float64's, and `atol` twenty times
# what float32 is off.
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
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

here = os.path.dirname(os.path.abspath(__file__))
torch.set_grad_enabled(False)
diffusers.utils.logging.set_verbosity_error()
scratch = tempfile.TemporaryDirectory()
folder = scratch.name
lines = []

ENCODER = dict(
    hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=3, image_size=56, patch_size=14,
    projection_dim=40, hidden_act="gelu",
)
CONTEXT = 80
# By the order in which diffusers registers the attentions over the prompt: down, up, middle.
WIDTHS = [24, 24] + [32] * 4 + [32] * 6 + [24] * 3 + [32] * 2


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
        values = k / 256 * 2.0 ** -math.floor(math.log2(math.prod(shape[1:])) / 2 + 0.5)
    return torch.tensor(values, dtype=torch.float16).reshape(shape)


def picture(seed, width, height):
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    return Image.fromarray((((3 * x + (5 + 2 * c) * y + 40 * seed) ^ ((x >> 3) * (c + 1 + seed) * 9)) & 255).astype(np.uint8))


def disc():
    y, x = np.meshgrid(np.arange(64), np.arange(64), indexing="ij")
    return Image.fromarray((((x - 30) ** 2 + (y - 36) ** 2 < 400) * 255).astype(np.uint8))


def adapter_shapes(kind):
    """The published files' keys."""
    shapes = {}
    if kind == "plain":
        shapes["proj.weight"], shapes["proj.bias"] = [4 * CONTEXT, ENCODER["projection_dim"]], [4 * CONTEXT]
        shapes["norm.weight"] = shapes["norm.bias"] = [CONTEXT]
    else:
        width, inner, wide = 32, 128, 128
        shapes["latents"] = [1, 6, width]
        shapes["proj_in.weight"], shapes["proj_in.bias"] = [width, ENCODER["hidden_size"]], [width]
        shapes["proj_out.weight"], shapes["proj_out.bias"] = [CONTEXT, width], [CONTEXT]
        shapes["norm_out.weight"] = shapes["norm_out.bias"] = [CONTEXT]
        for i in range(4):
            for norm in ("0.norm1", "0.norm2", "1.0"):
                shapes[f"layers.{i}.{norm}.weight"] = shapes[f"layers.{i}.{norm}.bias"] = [width]
            shapes[f"layers.{i}.0.to_q.weight"] = [inner, width]
            shapes[f"layers.{i}.0.to_kv.weight"] = [2 * inner, width]
            shapes[f"layers.{i}.0.to_out.weight"] = [width, inner]
            shapes[f"layers.{i}.1.1.weight"], shapes[f"layers.{i}.1.3.weight"] = [wide, width], [width, wide]
    shapes = {f"image_proj.{key}": shape for key, shape in shapes.items()}
    for i, width in enumerate(WIDTHS):
        for projection in ("to_k_ip", "to_v_ip"):
            shapes[f"ip_adapter.{2 * i + 1}.{projection}.weight"] = [width, CONTEXT]
    return shapes


def packed(values):
    return base64.b64encode(np.asarray(values, dtype=np.float32).tobytes()).decode()


def note(exact, rough, **case):
    """float64's numbers, in torch's order."""
    exact, rough = (np.asarray(each, dtype=np.float64).ravel() for each in (exact, rough))
    case["atol"] = float(f"{20 * max(np.abs(exact - rough).max(), 2.0**-24 * np.abs(exact).max()):.3g}")
    lines.append(json.dumps({**case, "values": packed(exact)}))


def write():
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**ENCODER))
    state = encoder.state_dict()
    for key, value in state.items():
        if "position_ids" not in key:
            value.copy_(weight("image_encoder", key, list(value.shape)))
    encoder.save_pretrained(f"{folder}/image_encoder")
    for kind in ("plain", "plus"):
        save_file({key: weight(kind, key, shape) for key, shape in adapter_shapes(kind).items()}, f"{folder}/{kind}.safetensors")
    return encoder


def preprocessing():
    for size, of in [(56, (1, 117, 149)), (56, (2, 200, 91)), (56, (3, 56, 56)), (56, (4, 31, 40)), (224, (5, 401, 300))]:
        pixels = CLIPImageProcessor(size=size, crop_size=size)(picture(*of), return_tensors="np").pixel_values
        stride = 41 if size == 56 else 499
        values = packed(pixels.ravel()[::stride])
        lines.append(json.dumps({"picture": of, "size": size, "stride": stride, "values": values}))


def encoding(encoder):
    pixels = CLIPImageProcessor(size=56, crop_size=56)(picture(1, 117, 149), return_tensors="pt").pixel_values
    outputs = {}
    for dtype in (torch.float32, torch.float64):
        out = encoder.to(dtype)(pixels.to(dtype), output_hidden_states=True)
        outputs[dtype] = {"penultimate": out.hidden_states[-2], "image_embeds": out.image_embeds}
    for name in ("penultimate", "image_embeds"):
        note(outputs[torch.float64][name], outputs[torch.float32][name], encoder=ENCODER, picture=(1, 117, 149), of=name)


randn = torch.randn


def drawn_in_float32(*args, dtype=None, **more):
    return randn(*args, dtype=torch.float32, **more).to(dtype or torch.float32)


torch.randn = drawn_in_float32
SETTINGS = dict(prompt="a red fox in the snow", negative_prompt="rain", height=64, width=64, num_inference_steps=4, guidance_scale=5)
CALLS = [
    ("plain", "text2img", [("plain", (1, 117, 149), 1)], dict(num_images_per_prompt=2)),
    ("plus", "text2img", [("plus", (2, 200, 91), 0.6)], {}),
    ("no_guidance", "text2img", [("plus", (4, 31, 40), 1)], dict(guidance_scale=1)),
    ("two", "text2img", [("plain", (1, 117, 149), 0.7), ("plus", (3, 56, 56), -0.4)], {}),
    ("img2img", "img2img", [("plain", (2, 200, 91), 0.8)], dict(strength=0.6, num_inference_steps=6)),
    ("inpaint", "inpaint", [("plus", (1, 117, 149), 1.5)], dict(strength=0.9, num_inference_steps=6)),
    (
        "several", "text2img",
        [("plain", [(1, 117, 149), (4, 31, 40)], 0.7), ("plus", [(3, 56, 56), (2, 200, 91), (5, 60, 60)], 0.5)],
        dict(num_images_per_prompt=2),
    ),
    ("several_of_one", "text2img", [("plus", [(1, 117, 149), (2, 200, 91)], 0.8)], {}),
]
CLASSES = dict(
    text2img=diffusers.StableDiffusionXLPipeline,
    img2img=diffusers.StableDiffusionXLImg2ImgPipeline,
    inpaint=diffusers.StableDiffusionXLInpaintPipeline,
)


def drawing():
    for number, (id, kind, adapters, more) in enumerate(CALLS):
        results = []
        for dtype in (torch.float32, torch.float64):
            pipeline = CLASSES[kind].from_pretrained(f"{here}/tiny-sdxl", torch_dtype=dtype)
            pipeline.set_progress_bar_config(disable=True)
            names = [f"{name}.safetensors" for name, *_ in adapters]
            pipeline.load_ip_adapter(folder, subfolder="", weight_name=names, image_encoder_folder="image_encoder")
            pipeline.to(dtype)
            pipeline.set_ip_adapter_scale([scale for *_, scale in adapters])
            images = [[picture(*each) for each in of] if isinstance(of, list) else picture(*of) for _, of, _ in adapters]
            over = {} if kind == "text2img" else {"image": picture(4, 64, 64)}
            over.update({"mask_image": disc()} if kind == "inpaint" else {})
            settings = {**SETTINGS, **more}
            if kind == "img2img":
                settings = {name: value for name, value in settings.items() if name not in ("height", "width")}
            if dtype == torch.float64 and id in ("plain", "plus"):
                embeds = pipeline.prepare_ip_adapter_image_embeds(images, None, "cpu", 1, True)
                tokens = pipeline.unet.encoder_hid_proj(embeds)[0]
                note(tokens, tokens.float(), adapter=adapters[0][0], picture=adapters[0][1], of="tokens")
            generator = torch.Generator("cpu").manual_seed(number)
            results.append(
                pipeline(ip_adapter_image=images, generator=generator, output_type="latent", **over, **settings).images
            )
        rough, exact = results
        note(exact, rough, call=id, seed=number, adapters=adapters, settings=more)


encoder = write()
preprocessing()
encoding(encoder)
drawing()
with open(f"{here}/ip_adapter.jsonl", "w") as file:
    file.write("".join(f"{line}\n" for line in lines))
