# Makes oft.jsonl: python3 oft.py LYCORIS SD_SCRIPTS, with torch, einops, diffusers and peft, where the two are checkouts of KohakuBlueleaf/LyCORIS and
# kohya-ss/sd-scripts. Weights of tiny-sdxl with OFT files merged into them, in float64 (every `stride`-th number in torch's order, float32
# in base64), by LyCORIS's DiagOFTModule, kohya's OFTModule and peft. The k-th tensor of a file that is no scalar has
# ((37 i + 11 k) mod 101 - 50) / 64.
import ast
import json
import os
import sys

import torch
from adapter_layers import numbers, packed
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

lycoris, scripts = sys.argv[1:]
sys.path.insert(0, lycoris)
from lycoris.modules.diag_oft import DiagOFTModule
from peft import OFTConfig, get_peft_model, get_peft_model_state_dict

here = os.path.dirname(os.path.abspath(__file__))
torch.set_default_dtype(torch.float64)
# Both take (I - Q).float().inverse().
torch.Tensor.float = torch.Tensor.double
lines = []


def from_source(path, name):
    """A class of a module whose other imports are not wanted."""
    with open(os.path.join(scripts, path)) as file:
        tree = ast.parse(file.read())
    found = [node for node in tree.body if getattr(node, "name", "") == name]
    space = dict(torch=torch)
    exec(compile(ast.Module(found, []), path, "exec"), space)
    return space[name]


KohyaOFT = from_source("networks/oft.py", "OFTModule")

MODEL = os.path.join(here, "tiny-sdxl")
WEIGHTS = {
    "unet": load_file(os.path.join(MODEL, "unet/diffusion_pytorch_model.safetensors")),
    "text_encoder": load_file(os.path.join(MODEL, "text_encoder/model.safetensors")),
}
LINEAR = ("unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", "input_blocks.4.1.transformer_blocks.0.attn2.to_k")
CONV = ("unet", "down_blocks.1.resnets.0.conv1", "input_blocks.4.0.in_layers.2")
TEXT = ("text_encoder", "text_model.encoder.layers.1.self_attn.q_proj", "")


def layer_of(place):
    component, path, _ = place
    weight = WEIGHTS[component][f"{path}.weight"].double()
    layer = torch.nn.Conv2d(*weight.shape[1::-1], weight.shape[2], bias=False) if weight.ndim == 4 else torch.nn.Linear(*weight.shape[::-1], bias=False)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer


def expected(place, weight):
    component, path, _ = place
    return [component, f"{path}.weight", 31, packed(weight.flatten()[::31])]


def lycoris_case(name, places, scale=1, **options):
    keys, expect, k = [], [], 0
    for place in places:
        component, path, _ = place
        module = DiagOFTModule("", layer_of(place), **options)
        prefix = f"{'lora_unet' if component == 'unet' else 'lora_te1'}_{path.replace('.', '_')}"
        for own, t in module.state_dict().items():
            if own == "alpha":
                keys.append([f"{prefix}.alpha", t.item()])
                continue
            t.copy_(numbers(t.shape, k))
            keys.append([f"{prefix}.{own}", list(t.shape)])
            k += 1
        expect.append(expected(place, module.get_merged_weight(scale)[0]))
    lines.append(dict(case=name, by="lycoris", keys=keys, scale=scale, expect=expect))


lycoris_case("diag-oft", [LINEAR, CONV, TEXT], lora_dim=4)
lycoris_case("diag-oft, constrained and rescaled", [LINEAR, CONV], lora_dim=8, constraint=0.05, rescaled=True)
lycoris_case("diag-oft, half", [CONV], scale=0.5, lora_dim=3)

# As DiagOFTModule's make_weight had it in LyCORIS 2.0.0 (commit 8b56c13), which saved R.
rotation = numbers([8, 3, 3], 0)
merged = torch.einsum("k n m, k n ... -> k m ...", rotation, layer_of(CONV).weight.view(8, 3, 16, 3, 3)).reshape(24, 16, 3, 3)
lines.append(dict(case="diag-oft of LyCORIS 2.0", by="lycoris", keys=[[f"lora_unet_{CONV[1].replace('.', '_')}.oft_diag", [8, 3, 3]]], scale=1, expect=[expected(CONV, merged)]))


def kohya_case(name, places, blocks, alpha, scale=1):
    keys, expect = [], []
    for k, place in enumerate(places):
        layer = layer_of(place)
        module = KohyaOFT("", layer, scale, blocks, alpha)
        with torch.no_grad():
            module.oft_blocks.copy_(numbers(module.oft_blocks.shape, k))
            weight = torch.einsum("k n m, k n p -> k m p", module.get_weight(), layer.weight.reshape(blocks, module.block_size, -1))
        prefix = f"oft_unet_{place[2].replace('.', '_')}"
        keys += [[f"{prefix}.alpha", alpha], [f"{prefix}.oft_blocks", list(module.oft_blocks.shape)]]
        expect.append(expected(place, weight.reshape(layer.weight.shape)))
    lines.append(dict(case=name, by="kohya", keys=keys, scale=scale, expect=expect))


kohya_case("OFT of kohya", [LINEAR, CONV], 4, 0.03125)
kohya_case("OFT of kohya, half, hardly bound", [CONV], 4, 1, scale=0.5)
kohya_case("OFT of kohya, bound to nothing", [LINEAR], 4, 0)


def peft_case(name, places, **options):
    unet = UNet2DConditionModel.from_pretrained(MODEL, subfolder="unet").double()
    config = OFTConfig(target_modules=[path for _, path, _ in places], **options)
    model = get_peft_model(unet, config).double()
    state = get_peft_model_state_dict(model)
    keys, given = [], {}
    for k, (own, t) in enumerate(sorted(state.items())):
        keys.append([own, list(t.shape)])
        given[own.replace(".weight", ".default.weight")] = numbers(t.shape, k)
    model.load_state_dict(given, strict=False)
    unet = model.merge_and_unload()
    kept = ("peft_type", "r", "oft_block_size", "coft", "eps", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms")
    own = config.to_dict()
    told = {key: own[key] for key in kept}
    told["peft_type"] = "OFT"
    expect = [expected(place, unet.get_parameter(f"{place[1]}.weight")) for place in places]
    lines.append(dict(case=name, by="peft", keys=keys, scale=1, config=told, expect=expect))


peft_case("OFT of peft", [LINEAR, CONV], oft_block_size=4)
peft_case("OFT of peft, exact", [LINEAR, CONV], oft_block_size=8, use_cayley_neumann=False)
peft_case("OFT of peft, a block shared", [LINEAR, CONV], oft_block_size=4, block_share=True, num_cayley_neumann_terms=4)
peft_case("OFT of peft, constrained, by r", [LINEAR, CONV], oft_block_size=0, r=4, coft=True, eps=0.5, num_cayley_neumann_terms=7)
peft_case("OFT of peft, two terms", [LINEAR], oft_block_size=2, num_cayley_neumann_terms=2)

with open(os.path.join(here, "oft.jsonl"), "w") as out:
    out.writelines(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
