# Numbers by the hash of a name, and weights, pictures and a mask that are formulas: test/support/controlnet_golden.ts has the same.
import math

import numpy as np
import torch


def whole_numbers(name, count):
    """From -256 to 255."""
    seed = 0x811C9DC5
    for byte in name.encode():
        seed = ((seed ^ byte) * 0x01000193) & 0xFFFFFFFF
    h = np.uint32(seed) + np.arange(count, dtype=np.uint32) * np.uint32(0x9E3779B9)
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return ((h ^ (h >> np.uint32(16))) >> np.uint32(23)).astype(np.float64) - 256


def numbers(name, *shape):
    """From -2 to 2."""
    return torch.from_numpy(whole_numbers(name, math.prod(shape)) / 128).reshape(shape)


def weight(name, key, shape):
    """float16 numbers, of unit gain where there are two sides."""
    k = whole_numbers(f"{name}.{key}", math.prod(shape))
    if len(shape) == 1:
        values = 1 + k / 1024 if key.endswith(".weight") else k / 4096
    else:
        larger = 3 if "cond_embedding" in key else 1
        values = k / 256 * 2.0 ** -math.floor(math.log2(math.prod(shape[1:])) / 2 + 0.5) * larger
    return torch.tensor(values, dtype=torch.float16).reshape(shape)


def fill(module, name):
    with torch.no_grad():
        for key, value in module.state_dict().items():
            if "position_ids" not in key:
                value.copy_(weight(name, key, list(value.shape)))
    return module


def pixels(seed, width, height):
    """Bytes [h, w, 3]."""
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    return (((3 * x + (5 + 2 * c) * y + 40 * seed) ^ ((x >> 3) * (c + 1 + seed) * 9)) & 255).astype(np.uint8)


def disc_in(width=64, height=64):
    """Booleans [h, w]."""
    y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return (x - 30) ** 2 + (y - 36) ** 2 < 400


def folded(g, key):
    """What is told of a gradient: its norm, and its sum with the numbers of its name as factors."""
    flat = g.double().flatten()
    return [float(f"{x.item():.8g}") for x in (flat.norm(), flat @ numbers(key, flat.numel()))]
