"""Makes lllite_gradients.jsonl: the gradients of a ControlNet-LLLite of kohya's for one pass of training beside tiny-sdxl's frozen UNet.

    PYTHONPATH=DIFFUSERS/src:SD-SCRIPTS python test/golden/lllite_gradients.py test/golden/tiny-sdxl/unet > test/golden/lllite_gradients.jsonl

All else is as controlnet_gradients.py has it; the modules are `edges` of lllite.py, each in its projection's place.
"""
import sys

import torch
from controlnet_gradients import question, tell
from diffusers import UNet2DConditionModel
from lllite import modules_of

torch.set_grad_enabled(True)
unet = UNet2DConditionModel.from_pretrained(sys.argv[1], torch_dtype=torch.float32).requires_grad_(False)
modules = modules_of("edges", unet, torch.float64)
net = torch.nn.ModuleDict(modules)
for module in modules.values():
    module.apply_to()


def predict(dtype):
    asked, given, pictures = question("edges", dtype)
    net.to(dtype)
    for module in modules.values():
        module.set_cond_image(2 * pictures - 1)
    return unet.to(dtype)(*asked, **given)[0]


tell(net, "edges", predict, lllite="edges")
