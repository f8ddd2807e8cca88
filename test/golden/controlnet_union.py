# Makes controlnet_union.jsonl: python3 controlnet_union.py, with torch, transformers, Pillow and diffusers (PYTHONPATH counts). Weights and
# pictures are formulas, which test/controlnet_golden.ts has too; numbers are float64's, and `atol` twenty times what float32 is off.
import base64
import json
import math
import os

import diffusers
import numpy as np
import torch
from PIL import Image

here = os.path.dirname(os.path.abspath(__file__))
torch.set_grad_enabled(False)
diffusers.utils.logging.set_verbosity_error()
lines = []

CONFIG = dict(
    addition_embed_type="text_time", addition_time_embed_dim=16, attention_head_dim=[1, 2, 4], block_out_channels=[16, 24, 32],
    conditioning_embedding_out_channels=[4, 8, 12, 16], cross_attention_dim=80,
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"], norm_num_groups=8,
    projection_class_embeddings_input_dim=136, transformer_layers_per_block=[1, 1, 2], use_linear_projection=True,
    num_control_type=6, num_trans_channel=16, num_trans_head=2, num_trans_layer=2, num_proj_channel=16,
)


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


def net(name, dtype):
    made = diffusers.ControlNetUnionModel(**CONFIG)
    for key, value in made.state_dict().items():
        value.copy_(weight(name, key, list(value.shape)))
    return made.to(dtype)


def packed(values):
    return base64.b64encode(np.asarray(values, dtype=np.float32).tobytes()).decode()


randn = torch.randn


def drawn_in_float32(*args, dtype=None, **more):
    return randn(*args, dtype=torch.float32, **more).to(dtype or torch.float32)


torch.randn = drawn_in_float32
SETTINGS = dict(prompt="a red fox in the snow", negative_prompt="rain", height=64, width=64, num_inference_steps=4, guidance_scale=5)
# What is asked of each net: pictures with their modes. Guess mode fails there under guidance.
CALLS = [
    ("single", "text2img", [("union", [((1, 72, 60), 3)])], dict(controlnet_conditioning_scale=0.8, num_images_per_prompt=2)),
    ("no_guidance", "text2img", [("union", [((2, 64, 64), 0)])], dict(guidance_scale=1)),
    ("two_controls", "text2img", [("union", [((1, 64, 64), 0), ((3, 64, 64), 4)])], dict(controlnet_conditioning_scale=[0.7, 1.3])),
    (
        "two_windows", "text2img", [("union", [((1, 64, 64), 5), ((2, 64, 64), 1)])],
        dict(num_inference_steps=6, control_guidance_start=[0.0, 0.4], control_guidance_end=[0.6, 1.0]),
    ),
    ("guess", "text2img", [("union", [((1, 64, 64), 2)])], dict(guess_mode=True, guidance_scale=1, num_images_per_prompt=2)),
    ("guess_two", "text2img", [("union", [((1, 64, 64), 2), ((2, 64, 64), 3)])], dict(guess_mode=True, guidance_scale=1, controlnet_conditioning_scale=[0.5, 0.9])),
    ("img2img", "img2img", [("union", [((1, 64, 64), 3)])], dict(strength=0.6, num_inference_steps=6)),
    (
        "two_nets", "text2img", [("union", [((1, 64, 64), 1)]), ("other", [((3, 64, 64), 4)])],
        dict(controlnet_conditioning_scale=[0.6, 1.1], control_guidance_end=[1.0, 0.6]),
    ),
]
CLASSES = dict(
    text2img=(diffusers.StableDiffusionXLPipeline, diffusers.StableDiffusionXLControlNetUnionPipeline),
    img2img=(diffusers.StableDiffusionXLPipeline, diffusers.StableDiffusionXLControlNetUnionImg2ImgPipeline),
)

for number, (id, kind, nets, more) in enumerate(CALLS):
    results = []
    for dtype in (torch.float32, torch.float64):
        plain, controlled = CLASSES[kind]
        parts = plain.from_pretrained(f"{here}/tiny-sdxl", torch_dtype=dtype).components
        own = [net(name, dtype) for name, _ in nets]
        pipeline = controlled(**parts, controlnet=own if len(own) > 1 else own[0]).to(dtype)
        pipeline.set_progress_bar_config(disable=True)
        controls = [control for _, of_one in nets for control in of_one]
        asked = dict(control_image=[picture(*of) for of, _ in controls], control_mode=[mode for _, mode in controls])
        if kind == "img2img":
            asked["image"] = picture(4, 64, 64)
        generator = torch.Generator("cpu").manual_seed(number)
        results.append(pipeline(generator=generator, output_type="latent", **asked, **{**SETTINGS, **more}).images)
    rough, exact = (np.asarray(each, dtype=np.float64).ravel() for each in results)
    atol = float(f"{20 * max(np.abs(exact - rough).max(), 2.0**-24 * np.abs(exact).max()):.3g}")
    print(id, atol, np.abs(exact).max())
    lines.append(json.dumps(dict(call=id, kind=kind, seed=number, nets=nets, settings={**SETTINGS, **more}, atol=atol, values=packed(exact))))
made = net("union", torch.float32)
keys = {key: list(value.shape) for key, value in made.state_dict().items()}
lines.append(json.dumps(dict(config=json.loads(made.to_json_string()), keys=keys)))
with open(f"{here}/controlnet_union.jsonl", "w") as file:
    file.write("".join(f"{line}\n" for line in lines))
