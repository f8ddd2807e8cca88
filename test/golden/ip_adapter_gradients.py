"""Makes ip_adapter_gradients.jsonl: the gradients of IP-Adapters in diffusers' UNet for one pass of training, the UNet frozen.

    PYTHONPATH=DIFFUSERS/src python test/golden/ip_adapter_gradients.py test/golden/tiny-sdxl/unet > test/golden/ip_adapter_gradients.jsonl

All else is as controlnet_gradients.py has it: `plain` and `plus` are those of ip_adapter.jsonl, whose names of weights gradients go by here,
and what a vision encoder would say is the formula's numbers.
"""
import re
import sys

import torch
from controlnet_gradients import ROWS, question, tell
from diffusers import UNet2DConditionModel
from formulas import numbers, weight

CONTEXT = 80
WIDTHS = [24, 24] + [32] * 10 + [24] * 3 + [32] * 2
SAID = dict(plain=[40], plus=[17, 48])


def projection_shapes(name):
    if name == "plain":
        norm = {f"norm.{each}": [CONTEXT] for each in ("weight", "bias")}
        return {"proj.weight": [4 * CONTEXT, 40], "proj.bias": [4 * CONTEXT], **norm}
    shapes = {"latents": [1, 6, 32], "proj_in.weight": [32, 48], "proj_in.bias": [32]}
    shapes.update({"proj_out.weight": [CONTEXT, 32], "proj_out.bias": [CONTEXT]})
    shapes.update({f"norm_out.{each}": [CONTEXT] for each in ("weight", "bias")})
    for i in range(4):
        shapes.update({f"layers.{i}.{norm}.{each}": [32] for norm in ("0.norm1", "0.norm2", "1.0") for each in ("weight", "bias")})
        sizes = {"0.to_q": [128, 32], "0.to_kv": [256, 32], "0.to_out": [32, 128], "1.1": [128, 32], "1.3": [32, 128]}
        shapes.update({f"layers.{i}.{key}.weight": shape for key, shape in sizes.items()})
    return shapes


# By what a layer of a Resampler calls them, the parameters of diffusers' that one is, or is cut into.
THEIRS = {
    "0.norm1": ["ln0"], "0.norm2": ["ln1"], "0.to_q": ["attn.to_q"], "0.to_kv": ["attn.to_k", "attn.to_v"],
    "0.to_out": ["attn.to_out.0"], "1.0": ["ff.0"], "1.1": ["ff.1.net.0.proj"], "1.3": ["ff.1.net.2"],
}


def theirs(key):
    inner = re.fullmatch(r"(layers\.\d)\.(.+)\.(weight|bias)", key)
    if inner:
        return [f"{inner[1]}.{each}.{inner[3]}" for each in THEIRS[inner[2]]]
    return [re.sub(r"^proj\b", "image_embeds", key)]


class Adapter:
    """What a UNet has been given, under the file's names."""

    def __init__(self, unet, name):
        shapes = projection_shapes(name)
        pairs = {f"{2 * i + 1}.to_{of}_ip.weight": [width, CONTEXT] for i, width in enumerate(WIDTHS) for of in "kv"}
        make = lambda part, key, shape: weight(name, f"{part}.{key}", shape)
        unet._load_ip_adapter_weights(
            dict(
                image_proj={key: make("image_proj", key, shape) for key, shape in shapes.items()},
                ip_adapter={key: make("ip_adapter", key, shape) for key, shape in pairs.items()},
            ),
            low_cpu_mem_usage=False,
        )
        self.unet, self.shapes = unet, shapes

    def parts(self):
        own = dict(self.unet.encoder_hid_proj.image_projection_layers[0].named_parameters())
        for key in self.shapes:
            yield f"image_proj.{key}", [own[each] for each in theirs(key)]
        given = [each for each in self.unet.attn_processors.values() if hasattr(each, "to_k_ip")]
        for i, each in enumerate(given):
            yield f"ip_adapter.{2 * i + 1}.to_k_ip.weight", [each.to_k_ip[0].weight]
            yield f"ip_adapter.{2 * i + 1}.to_v_ip.weight", [each.to_v_ip[0].weight]

    def zero_grad(self):
        for _, parts in self.parts():
            for part in parts:
                part.requires_grad_(True)
                part.grad = None

    def named_parameters(self):
        for key, parts in self.parts():
            joined = torch.cat([part.detach() for part in parts])
            joined.grad = torch.cat([part.grad for part in parts])
            yield key, joined


def main(folder):
    for name in ("plain", "plus"):
        unet = UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32).double()
        adapter = Adapter(unet, name)
        unet.requires_grad_(False)

        def predict(dtype):
            unet.to(dtype)
            adapter.zero_grad()
            asked, given, _ = question(name, dtype)
            said = numbers(f"{name}.image_embeds", ROWS, *SAID[name]).to(dtype)
            given["added_cond_kwargs"]["image_embeds"] = [said[:, None]]
            return unet(*asked, **given)[0]

        tell(adapter, name, predict, adapter=name)


main(sys.argv[1])
