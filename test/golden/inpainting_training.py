"""Makes inpainting_training.jsonl: how often places are masked by the peers' drawings, and the gradients of one pass of training of UNets that
see more than latents, by diffusers.

    PYTHONPATH=DIFFUSERS/src python test/golden/inpainting_training.py DIFFUSERS/examples DIFFENGINE/diffengine/datasets/transforms/loading.py

A line for each drawing has its picture's height and width, the mean and the standard deviation of the share that is masked, and the rate at
which each of 4 x 4 evenly spread pixels is, of `count` masks. Functions are taken from the peers' files (OpenCV draws for MMagic's). Then of
each model a line with the loss mean((unet - target)^2) in float64, and a line for some parameters: the gradient's norm, and its sum with the
formula's numbers of that name as factors; of conv_in.weight for each input channel. Weights, inputs and pictures are the formulas of
test/support/controlnet_golden.ts over tiny-sdxl, the first convolution as test/support/inpainting_golden.ts; latents of pictures are the posterior's mode.
"""
import ast
import json
import math
import os
import random
import sys

import cv2
import diffusers
import numpy as np
import torch
from formulas import disc_in, folded, numbers, pixels, weight
from PIL import Image, ImageDraw

here = os.path.dirname(os.path.abspath(__file__))
examples, loading = sys.argv[1:]


def functions_of(path, names, **known):
    nodes = [n for n in ast.parse(open(path).read()).body if isinstance(n, ast.FunctionDef) and n.name in names]
    exec(compile(ast.Module(nodes, []), path, "exec"), known)
    return known


def told(values):
    return [float(f"{x:.8g}") for x in values]


def drawings():
    random.seed(1)
    np.random.seed(1)
    peers = functions_of(f"{examples}/research_projects/dreambooth_inpaint/train_dreambooth_inpaint.py", ["random_mask"],
                         random=random, Image=Image, ImageDraw=ImageDraw)
    is_tuple_of = lambda value, kind: isinstance(value, tuple) and all(isinstance(each, kind) for each in value)
    names = ["random_bbox", "bbox2mask", "random_irregular_mask", "get_irregular_mask"]
    mmagic = functions_of(loading, names, np=np, math=math, cv2=cv2, is_tuple_of=is_tuple_of)
    boxes = lambda: mmagic["bbox2mask"]((512, 512), mmagic["random_bbox"]((512, 512), (256, 256), 40, 20))[..., 0]
    for mode, size, count, draw in (
        ("random_mask", (48, 64), 40000, lambda: np.array(peers["random_mask"]((64, 48))) / 255),
        ("bbox", (512, 512), 10000, boxes),
        ("irregular", (256, 256), 4000, lambda: mmagic["get_irregular_mask"]((256, 256))[..., 0]),
    ):
        shares, rates = [], np.zeros((4, 4))
        for _ in range(count):
            mask = draw()
            shares.append(mask.mean())
            rates += mask[size[0] // 8 :: size[0] // 4, size[1] // 8 :: size[1] // 4] / count
        yield dict(mode=mode, size=size, count=count, mean=np.mean(shares), deviation=np.std(shares), rates=told(rates.ravel()))


def unet_of(name, channels):
    unet = diffusers.UNet2DConditionModel.from_pretrained(f"{here}/tiny-sdxl", subfolder="unet", torch_dtype=torch.float32)
    bias = unet.conv_in.bias
    unet.conv_in = torch.nn.Conv2d(channels, 16, 3, padding=1)
    unet.conv_in.weight = torch.nn.Parameter(weight(name, "conv_in.weight", [16, channels, 3, 3]).float())
    unet.conv_in.bias = bias
    return unet.double()


def beside(name):
    vae = diffusers.AutoencoderKL.from_pretrained(f"{here}/tiny-sdxl", subfolder="vae", torch_dtype=torch.float32).double()
    pictures = torch.from_numpy(np.stack([pixels(seed, 64, 64) for seed in (4, 5)]) / 127.5 - 1).permute(0, 3, 1, 2)
    if name == "instruct_pix2pix":
        return vae.encode(pictures).latent_dist.mode()
    masks = torch.from_numpy(np.stack([disc_in(), ~disc_in()])[:, None].astype(np.float64))
    latents = vae.encode(pictures * (masks < 0.5)).latent_dist.mode() * vae.config.scaling_factor
    return torch.cat([torch.nn.functional.interpolate(masks, size=(8, 8)), latents], 1)


def gradients(name, channels):
    unet = unet_of(name, channels)
    with torch.no_grad():
        sample = torch.cat([numbers(f"{name}.sample", 2, 4, 8, 8), beside(name)], 1)
    said = unet(
        sample,
        torch.tensor([7, 803]),
        encoder_hidden_states=numbers(f"{name}.encoder_hidden_states", 2, 77, 80),
        added_cond_kwargs=dict(
            text_embeds=numbers(f"{name}.text_embeds", 2, 40),
            time_ids=torch.tensor([[64, 64, 0, 0, 64, 64]] * 2, dtype=torch.float64),
        ),
        return_dict=False,
    )[0]
    loss = torch.nn.functional.mse_loss(said, numbers(f"{name}.target", 2, 4, 8, 8))
    loss.backward()
    yield dict(model=name, loss=loss.item())
    for i, (key, p) in enumerate(unet.named_parameters()):
        parts = p.grad.unbind(1) if key == "conv_in.weight" else [p.grad] if i % 16 == 1 else []
        for k, part in enumerate(parts):
            yield [name, key, k, *folded(part, key)]


with open(f"{here}/inpainting_training.jsonl", "w") as file:
    for line in [*drawings(), *gradients("inpainting", 9), *gradients("instruct_pix2pix", 8)]:
        print(line)
        file.write(json.dumps(line, separators=(",", ":")) + "\n")
