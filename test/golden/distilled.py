# Makes distilled.jsonl: python3 distilled.py, with torch, transformers, Pillow, peft, diffusers and DeepCache (PYTHONPATH counts). tiny-sdxl with
# UNets of the shape of segmind/SSD-1B, without a middle block, and of several depths in a whole one, whose weights are formulas. First of
# each its config, the loss of one pass and its gradients, in float64: of all that begins alike their norm and the sum of their products
# with the formula's numbers of each one's key; then latents of whole calls, every seventh number, with `atol` twenty times what float32 is off.
import json
import math
import tempfile

import diffusers
import numpy as np
import recorded
import torch
from formulas import fill, folded, numbers
from recorded import call, full_controlnet, here, noted, picture, with_ip_adapter, write
from safetensors.torch import save_file

SETTINGS = dict(prompt="a red fox in the snow", negative_prompt="rain", num_inference_steps=4, guidance_scale=5)
SIZE = dict(height=64, width=64)
DEPTHS, REVERSE = "transformer_layers_per_block", "reverse_transformer_layers_per_block"
UNETS = dict(
    ssd={DEPTHS: [1, [2, 1], [1, 3]], REVERSE: [[2, 1, 3], [1, 2, 1], 1], "mid_block_type": "UNetMidBlock2D"},
    bare={DEPTHS: [0, [1, 1], [2, 2]], REVERSE: [[2, 2, 2], [1, 1, 1], 0], "mid_block_type": None},
    deep={DEPTHS: [1, 1, [2, 1]], REVERSE: [1, [1, 2, 1], 1], "mid_block_type": "UNetMidBlock2DCrossAttn"},
)
LORA = [
    "up_blocks.0.attentions.2.transformer_blocks.2.attn1.to_q",
    "up_blocks.1.attentions.1.transformer_blocks.1.ff.net.0.proj",
    "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k",
    "mid_block.resnets.0.conv1",
]
ADAPTER = dict(channels=[16, 24, 32, 32], downscale_factor=16, adapter_type="full_adapter_xl", in_channels=3, num_res_blocks=2)
CALLS = [
    ("ssd", "text2img", dict()),
    ("ssd", "lora", dict(scheduler="EulerAncestralDiscreteScheduler")),
    ("ssd", "text2img", dict(cache_interval=2, cache_branch_id=8)),
    ("ssd", "perturbed", dict(pag_scale=3, pag_applied_layers=["up_blocks.0.attentions.1"])),
    ("ssd", "controlled", dict(controlnet_conditioning_scale=0.8)),
    ("ssd", "adapted", dict()),
    ("bare", "text2img", dict(scheduler="DPMSolverMultistepScheduler", num_images_per_prompt=2)),
    ("bare", "text2img", dict(cache_interval=3, cache_branch_id=8)),
    ("bare", "text2img", dict(cache_interval=2, cache_branch_id=4)),
    ("bare", "t2i_adapter", dict()),
]


class Through(torch.nn.Module):
    """No middle block, for DeepCache's helper, which wraps one."""

    def forward(self, x, _):
        return x


def unet_of(name):
    with open(f"{here}/tiny-sdxl/unet/config.json") as file:
        config = json.load(file)
    return fill(diffusers.UNet2DConditionModel.from_config({**config, **UNETS[name]}), name)


def gradients(name, dtype):
    unet = unet_of(name).to(dtype)
    made = lambda key, *shape: numbers(f"{name}.{key}", *shape).to(dtype)
    ids = torch.tensor([[64, 96, 0, 0, 64, 96], [80, 100, 8, 2, 64, 96]], dtype=dtype)
    with torch.enable_grad():
        added = dict(text_embeds=made("text_embeds", 2, 40), time_ids=ids)
        said = unet(made("sample", 2, 4, 8, 12), torch.tensor([7, 803]), made("context", 2, 77, 80), added_cond_kwargs=added).sample
        loss = torch.nn.functional.mse_loss(said, made("target", 2, 4, 8, 12))
        loss.backward()
    sums = {}
    for key, p in unet.named_parameters():
        part = ".".join(key.split(".")[:4 if "_blocks" in key else 1])
        norm, dot = folded(p.grad, key)
        before = sums.get(part, (0, 0))
        sums[part] = (before[0] + norm**2, before[1] + dot)
    return loss.item(), {part: [math.sqrt(square), dot] for part, (square, dot) in sums.items()}


def lora_file(unet):
    path = tempfile.mkdtemp()
    tensors = {}
    for layer in LORA:
        out, inner, *kernel = unet.get_submodule(layer).weight.shape
        for key, shape in ((f"{layer}.lora_A.weight", [2, inner, *kernel]), (f"{layer}.lora_B.weight", [out, 2, *(1 for _ in kernel)])):
            tensors[f"unet.{key}"] = (numbers(key, *shape) / 8).float()
    save_file(tensors, f"{path}/pytorch_lora_weights.safetensors")
    return path


def drawn(name, kind, seed, dtype, settings):
    unet = unet_of(name)
    load = lambda made, **more: made.from_pretrained(f"{here}/tiny-sdxl", unet=unet, torch_dtype=torch.float32, **more)
    settings = dict(settings)
    if kind == "perturbed":
        pipeline = load(diffusers.StableDiffusionXLPAGPipeline, pag_applied_layers=settings.pop("pag_applied_layers"))
    elif kind == "controlled":
        pipeline = load(diffusers.StableDiffusionXLControlNetPipeline, controlnet=full_controlnet(unet, torch.float32))
        settings["image"] = picture(1, 64, 64)
    elif kind == "t2i_adapter":
        pipeline = load(diffusers.StableDiffusionXLAdapterPipeline, adapter=fill(diffusers.T2IAdapter(**ADAPTER), "edges"))
        settings["image"] = picture(1, 64, 64)
    else:
        pipeline = load(diffusers.StableDiffusionXLPipeline)
    if kind == "lora":
        pipeline.load_lora_weights(lora_file(unet))
    if kind == "adapted":
        owners = (at.removesuffix(".processor") for at in unet.attn_processors)
        recorded.WIDTHS = [unet.get_submodule(at).to_q.out_features for at in owners if at.endswith("attn2")]
        with tempfile.TemporaryDirectory() as folder:
            with_ip_adapter(pipeline, folder, 0.7)
        settings["ip_adapter_image"] = picture(1, 117, 149)
    if "cache_interval" in settings and unet.mid_block is None:
        unet.mid_block = Through()
    pipeline, settings = call(pipeline.to(dtype), settings)
    generator = torch.Generator("cpu").manual_seed(seed)
    return pipeline(generator=generator, output_type="latent", **settings, **SIZE).images.double().numpy()


lines = []
for name, config in UNETS.items():
    rough_loss, rough = gradients(name, torch.float32)
    loss, exact = gradients(name, torch.float64)
    noise = max(abs(a - b) / norm for part, (norm, dot) in exact.items() for a, b in zip((norm, dot), rough[part]))
    print(name, loss, rough_loss - loss, len(exact), noise)
    shorter = {part: [float(f"{x:.7g}") for x in told] for part, told in exact.items()}
    lines.append(dict(unet=name, config=config, loss=loss, noise=float(f"{noise:.2g}"), gradients=shorter))
for seed, (name, kind, more) in enumerate(CALLS):
    settings = {**SETTINGS, **more}
    rough, exact = (drawn(name, kind, seed, dtype, settings) for dtype in (torch.float32, torch.float64))
    case = noted(rough, exact, 7)
    print(name, kind, more, "atol", case["atol"], "spread", exact.std())
    lines.append(dict(unet=name, kind=kind, settings=settings, seed=seed, **case))
write("distilled", lines)
