# What scripts share that note adapters: small layers of numbers that are a formula, and tensors in base64.
import base64
import math

import torch


def packed(t):
    return base64.b64encode(t.detach().to(torch.float32).contiguous().numpy().tobytes()).decode()


def numbers(shape, k):
    return torch.tensor([((37 * i + 11 * k) % 101 - 50) / 64 for i in range(math.prod(shape))]).reshape(shape)


def layer_of(weight, stride=1, padding=0):
    o, i, *kernel = weight
    layer = torch.nn.Conv2d(i, o, kernel[0], stride, padding) if kernel else torch.nn.Linear(i, o)
    with torch.no_grad():
        layer.weight.copy_(numbers(weight, 0))
        layer.bias.copy_(numbers([o], 1))
    return layer.requires_grad_(False)
