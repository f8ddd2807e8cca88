"""Makes distillation.jsonl: losses of small UNets that learn from tiny-sdxl's, and their gradients, as diffengine's SSD1B and DistillSDXL have
them, after Segmind's scripts: hooks tell what both UNets make on the way.

    PYTHONPATH=DIFFUSERS/src python test/golden/distillation.py test/golden/tiny-sdxl > test/golden/distillation.jsonl

Students are made of the teacher: `ssd` of its weights under their own names, `small` and `tiny` by taking layers out. Then their weights are
moved, and the pass, its inputs and the lines are those of dpo_esd.py. The features' losses are summed as in Segmind's script: diffengine's
SSD1B adds the sum to itself at each resnet of the way up. `ssd` weighs both losses by 0.5 and, as `tiny`, images by min-SNR, gamma 5.
"""
import copy
import sys

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from dpo_esd import batch, tell
from formulas import numbers

SSD = dict(
    transformer_layers_per_block=[1, 1, [2, 1]], reverse_transformer_layers_per_block=[[1, 2, 1], 1, 1], mid_block_type="UNetMidBlock2D"
)
KINDS, STRIDE = ("ssd", "small", "tiny"), 23
LEVELS = range(3)


def without_layers(unet, kind):
    for down, up in zip(unet.down_blocks, unet.up_blocks):
        for block in down, up:
            for layers in [block.resnets] + ([block.attentions] if hasattr(block, "attentions") else []):
                if block is up:
                    layers[1] = layers[2]
                del layers[-1]
    if kind == "tiny":
        unet.mid_block = None
    return unet


def networks(folder, kind):
    teacher = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32).requires_grad_(False)
    if kind == "ssd":
        student = UNet2DConditionModel.from_config({**teacher.config, **SSD})
        print(student.load_state_dict(teacher.state_dict(), strict=False).missing_keys, file=sys.stderr)
    else:
        student = without_layers(copy.deepcopy(teacher), kind)
    named = dict(student.named_parameters())
    with torch.no_grad():
        for key, p in named.items():
            p.copy_(p.double() * (1 + numbers(key, *p.shape) / 32))
    student.requires_grad_(True)
    return teacher, student, named


def hooked(unet, kind):
    """The outputs of the layers that are compared, by name, once the UNet has run."""
    seen = {}
    first = lambda out: out[0] if isinstance(out, tuple) else out
    see = lambda module, name: module.register_forward_hook(lambda _, __, out: seen.update({name: first(out)}))
    if unet.mid_block is not None:
        see(unet.mid_block, "m")
    for way, blocks in dict(d=unet.down_blocks, u=unet.up_blocks).items():
        for i, block in enumerate(blocks):
            if kind != "ssd":
                see(block, f"{way}{i}")
                continue
            for letter, layers in dict(r=block.resnets, a=getattr(block, "attentions", [])).items():
                for j, layer in enumerate(layers):
                    see(layer, f"{way}{i}{letter}{j}")
    return seen


def compute(folder, kind, dtype):
    teacher, student, named = networks(folder, kind)
    teacher, student = teacher.to(dtype), student.to(dtype)
    theirs, own = hooked(teacher, kind), hooked(student, kind)
    abar, noise, saying = batch(folder, dtype)
    said = saying(student)()
    with torch.no_grad():
        taught = saying(teacher)()
    weights = torch.clamp(abar / (1 - abar), max=5) / (abar / (1 - abar)) if kind != "small" else torch.ones_like(abar)

    def error(a, b):
        return (F.mse_loss(a, b, reduction="none").flatten(1).mean(1) * weights).mean()

    if kind == "tiny":
        own["m"] = own.pop(f"d{LEVELS[-1]}")
    features = sum(error(own[name], theirs[name]) for name in own)
    share = 0.5 if kind == "ssd" else 1
    loss = error(said, noise) + share * error(said, taught) + share * features
    print(kind, dtype, error(said, noise).item(), error(said, taught).item(), features.item(), list(own), file=sys.stderr)
    loss.backward()
    return loss.item(), {k: p.grad.double().clone() for k, p in named.items()}


for kind in KINDS:
    tell(kind, "unet", STRIDE, lambda dtype: compute(sys.argv[1], kind, dtype))
