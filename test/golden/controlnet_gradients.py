"""Makes controlnet_gradients.jsonl: the gradients of ControlNets of diffusers' for one pass of training beside tiny-sdxl's frozen UNet.

    PYTHONPATH=DIFFUSERS/src python test/golden/controlnet_gradients.py test/golden/tiny-sdxl/unet > test/golden/controlnet_gradients.jsonl

Weights, inputs and pictures are the formulas of test/support/controlnet_golden.ts. The loss is mean((unet - target)^2), in float64. A first line
for each ControlNet has its config as ControlNetModel.from_unet makes it, the loss, and how far float32's gradients are from float64's;
each further line has a parameter's gradient: its norm, and its sum with the formula's numbers of that name as factors.
"""
import json
import sys

import numpy as np
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from formulas import fill, folded, numbers, pixels

ROWS, HEIGHT, WIDTH = 2, 8, 12


def picture(seed, width, height):
    return torch.from_numpy((pixels(seed, width, height) / 255).astype(np.float32).astype(np.float64)).permute(2, 0, 1)


def question(name, dtype):
    """What the UNet is asked in a pass, and the pictures that go with it."""
    given = dict(
        encoder_hidden_states=numbers(f"{name}.encoder_hidden_states", ROWS, 77, 80).to(dtype),
        added_cond_kwargs=dict(
            text_embeds=numbers(f"{name}.text_embeds", ROWS, 40).to(dtype),
            time_ids=torch.tensor([[64, 96, 0, 0, 64, 96], [80, 100, 8, 2, 64, 96]], dtype=dtype),
        ),
        return_dict=False,
    )
    sample = numbers(f"{name}.sample", ROWS, 4, HEIGHT, WIDTH).to(dtype)
    pictures = torch.stack([picture(seed, 8 * WIDTH, 8 * HEIGHT) for seed in (1, 2)]).to(dtype)
    return (sample, torch.tensor([7, 803])), given, pictures


def gradients(net, name, dtype, predict):
    net.zero_grad()
    said = predict(dtype)
    loss = torch.nn.functional.mse_loss(said, numbers(f"{name}.target", *said.shape).to(dtype))
    loss.backward()
    return loss.item(), {key: p.grad.double().clone() for key, p in net.named_parameters()}


def tell(net, name, predict, **first):
    """Prints the lines of a network; `predict` says what the UNet does beside it."""
    rms = lambda t: t.pow(2).mean().sqrt()
    # What softmax takes no notice of, as what is the same for all keys, has no gradient but for rounding.
    is_none = lambda g: g.norm() < 1e-12
    _, rough = gradients(net, name, torch.float32, predict)
    loss, exact = gradients(net, name, torch.float64, predict)
    noise = max((rms(rough[key] - g) / rms(g)).item() for key, g in exact.items() if not is_none(g))
    print(json.dumps(dict(**first, loss=loss, noise=noise), separators=(",", ":")))
    for key, g in exact.items():
        print(json.dumps([name, key, *([0, 0] if is_none(g) else folded(g, key))], separators=(",", ":")))


def main(folder):
    for name, depths in ("full", [1, 1, 2]), ("small", [0, 0, 0]):
        unet = UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32).requires_grad_(False)
        types = [kind if depth else "DownBlock2D" for kind, depth in zip(unet.config.down_block_types, depths)]
        unet.register_to_config(transformer_layers_per_block=depths, down_block_types=types)
        net = ControlNetModel.from_unet(
            unet, conditioning_embedding_out_channels=(4, 8, 12, 16), load_weights_from_unet=False
        )
        config = {key: value for key, value in net.config.items() if not key.startswith("_")}
        fill(net.double(), name)

        def predict(dtype):
            asked, given, pictures = question(name, dtype)
            down, mid = net.to(dtype)(*asked, controlnet_cond=pictures, **given)
            residuals = dict(down_block_additional_residuals=down, mid_block_additional_residual=mid)
            return unet.to(dtype)(*asked, **residuals, **given)[0]

        tell(net, name, predict, controlnet=name, config=config)


if __name__ == "__main__":
    main(sys.argv[1])
