# Makes low_rank.jsonl: python3 low_rank.py, with torch. Of matrices that are formulas the largest singular values and, by rank, how long the
# rest is that the best product of that rank leaves (Frobenius norm), by torch.linalg.svdvals in float64.
import json
import math
import os

import numpy as np
import torch

here = os.path.dirname(os.path.abspath(__file__))


# As in controlnet_union.py.
def whole_numbers(name, count):
    seed = np.uint32(0x811C9DC5)
    with np.errstate(over="ignore"):
        for byte in name.encode():
            seed = (seed ^ np.uint32(byte)) * np.uint32(0x01000193)
        h = seed + np.arange(count, dtype=np.uint32) * np.uint32(0x9E3779B9)
        h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
        h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return ((h ^ (h >> np.uint32(16))) >> np.uint32(23)).astype(np.int64) - 256


with open(os.path.join(here, "low_rank.jsonl"), "w") as file:
    for name, shape, fall, ranks in [
        ("noise", (160, 320), 0, [1, 8, 32]),
        ("tall noise", (320, 160), 0, [8]),
        ("square", (192, 192), 0.0625, [4, 64]),
        ("steep", (96, 240), 1, [4, 16]),
        ("all", (24, 36), 0.5, [16, 24]),
    ]:
        k = whole_numbers(name, math.prod(shape)).astype(np.float64).reshape(shape) / 128
        matrix = np.float32(k * 2.0 ** -np.floor(fall * np.arange(shape[0]))[:, None])
        values = torch.linalg.svdvals(torch.tensor(matrix, dtype=torch.float64)).numpy()
        rest = {rank: float(np.sqrt((values[rank:] ** 2).sum())) for rank in ranks}
        line = {"name": name, "shape": shape, "fall": fall, "values": values[:3].tolist(), "rest": rest}
        file.write(json.dumps(line) + "\n")
