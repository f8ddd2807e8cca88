# What scripts share that note latents of whole calls: tiny models with weights of formulas.py, and how latents are told. On import torch is
# told to draw in float32 whatever the type, and to keep no gradients.
import base64
import json
import os

import diffusers
import numpy as np
import torch
from formulas import disc_in, fill, pixels, weight
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

here = os.path.dirname(os.path.abspath(__file__))
randn = torch.randn


def drawn_in_float32(*args, dtype=None, **more):
    return randn(*args, dtype=torch.float32, **more).to(dtype or torch.float32)


torch.randn = drawn_in_float32
torch.set_grad_enabled(False)
diffusers.utils.logging.set_verbosity_error()


def picture(*of):
    return Image.fromarray(pixels(*of))


def disc(*size):
    return Image.fromarray((disc_in(*size) * 255).astype(np.uint8))


def full_controlnet(unet, dtype):
    made = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 12, 16))
    return fill(made, "full").to(dtype)


ENCODER = dict(
    hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=3, image_size=56, patch_size=14,
    projection_dim=40, hidden_act="gelu",
)
CONTEXT = 80
# By the order in which diffusers registers the attentions over the prompt: down, up, middle.
WIDTHS = [24, 24] + [32] * 4 + [32] * 6 + [24] * 3 + [32] * 2


def plain_shapes():
    shapes = {"proj.weight": [4 * CONTEXT, ENCODER["projection_dim"]], "proj.bias": [4 * CONTEXT]}
    return {**shapes, "norm.weight": [CONTEXT], "norm.bias": [CONTEXT]}


def write_ip_adapter(folder, kind="plain", projection=plain_shapes()):
    """Under the published files' keys."""
    shapes = {f"image_proj.{key}": shape for key, shape in projection.items()}
    for i, width in enumerate(WIDTHS):
        shapes.update({f"ip_adapter.{2 * i + 1}.{each}.weight": [width, CONTEXT] for each in ("to_k_ip", "to_v_ip")})
    save_file({key: weight(kind, key, shape) for key, shape in shapes.items()}, f"{folder}/{kind}.safetensors")


def write_image_encoder(folder):
    encoder = fill(CLIPVisionModelWithProjection(CLIPVisionConfig(**ENCODER)), "image_encoder")
    encoder.save_pretrained(f"{folder}/image_encoder")
    return encoder


def with_ip_adapter(pipeline, folder, scale):
    """The plain one, which is written to `folder`, with its encoder."""
    write_image_encoder(folder)
    write_ip_adapter(folder)
    pipeline.load_ip_adapter(folder, subfolder="", weight_name="plain.safetensors", image_encoder_folder="image_encoder")
    pipeline.set_ip_adapter_scale(scale)
    return pipeline


def instruct_pix2pix(dtype):
    """Its pipeline over tiny-sdxl with a first convolution of eight channels."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(f"{here}/tiny-sdxl", subfolder="unet", torch_dtype=torch.float32)
    bias = unet.conv_in.bias
    unet.conv_in = torch.nn.Conv2d(8, 16, 3, padding=1)
    unet.conv_in.weight.copy_(weight("instruct_pix2pix", "conv_in.weight", [16, 8, 3, 3]))
    unet.conv_in.bias.copy_(bias)
    unet.register_to_config(in_channels=8)
    kind = diffusers.StableDiffusionXLInstructPix2PixPipeline
    return kind.from_pretrained(f"{here}/tiny-sdxl", unet=unet.to(dtype), torch_dtype=dtype).to(dtype)


def call(pipeline, settings):
    """The pipeline as settings want it, and what is left of them for its call."""
    settings = dict(settings)
    pipeline.set_progress_bar_config(disable=True)
    scheduler = settings.pop("scheduler", None)
    if scheduler:
        pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    cache = {key: settings.pop(key) for key in list(settings) if key.startswith("cache_")}
    if cache:
        from DeepCache.extension.deepcache import DeepCacheSDHelper

        helper = DeepCacheSDHelper(pipe=pipeline)
        helper.set_params(**cache)
        helper.enable()
    return pipeline, settings


def packed(values):
    return base64.b64encode(np.asarray(values, dtype=np.float32).tobytes()).decode()


def noted(rough, exact, stride=1):
    """Every `stride`-th number of float64, in torch's order, and twenty times what float32 is off."""
    rough, exact = (np.asarray(each, dtype=np.float64).ravel() for each in (rough, exact))
    atol = float(f"{20 * max(np.abs(exact - rough).max(), 2.0**-24 * np.abs(exact).max()):.3g}")
    return dict(atol=atol, values=packed(exact[::stride]))


def write(name, lines):
    with open(f"{here}/{name}.jsonl", "w") as file:
        file.write("".join(f"{json.dumps(line)}\n" for line in lines))
