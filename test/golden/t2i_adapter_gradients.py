"""Makes t2i_adapter_gradients.jsonl: the gradients of T2I-Adapters of diffusers' for one pass of training beside tiny-sdxl's frozen UNet.

    PYTHONPATH=DIFFUSERS/src python test/golden/t2i_adapter_gradients.py test/golden/tiny-sdxl/unet > test/golden/t2i_adapter_gradients.jsonl

All else is as controlnet_gradients.py has it. `sketch` sees grey levels: the greens of the pictures.
"""
import sys

import torch
from controlnet_gradients import question, tell
from diffusers import T2IAdapter, UNet2DConditionModel
from formulas import fill

CONFIG = dict(channels=[16, 24, 32, 32], downscale_factor=16, adapter_type="full_adapter_xl")


def main(folder):
    for name, channels, depth in ("edges", 3, 2), ("sketch", 1, 1):
        unet = UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32).requires_grad_(False)
        net = fill(T2IAdapter(**CONFIG, in_channels=channels, num_res_blocks=depth).double(), name)

        def predict(dtype):
            asked, given, pictures = question(name, dtype)
            seen = pictures if channels == 3 else pictures[:, 1:2]
            return unet.to(dtype)(*asked, down_intrablock_additional_residuals=net.to(dtype)(seen), **given)[0]

        tell(net, name, predict, adapter=name)


main(sys.argv[1])
