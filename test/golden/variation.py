# Makes variation.jsonl: python3 variation.py STABLE_DIFFUSION_WEBUI, with torch. The noise of variation seeds and of seeds that are resized, by
# ImageRNG of A1111's modules/rng.py: every third number of the first draw and the first 16 of the second, float32 in base64. (Of its other
# modules rng.py asks the source of noise, CPU or its imitation of a GPU's, and the device.)
import base64
import json
import os
import sys
import types

import numpy as np
import torch

sys.path.insert(0, sys.argv[1])
opts = types.SimpleNamespace(randn_source="CPU", eta_noise_seed_delta=0)
cpu = torch.device("cpu")
for name, holds in [("devices", {"cpu": cpu, "device": cpu}), ("shared", {"opts": opts, "device": cpu})]:
    sys.modules[f"modules.{name}"] = types.ModuleType(name)
    sys.modules[f"modules.{name}"].__dict__.update(holds)
from modules.rng import ImageRNG  # noqa: E402


def coded(x):
    return base64.b64encode(np.ascontiguousarray(x.numpy(), np.float32).tobytes()).decode()


here = os.path.dirname(os.path.abspath(__file__))
with open(os.path.join(here, "variation.jsonl"), "w") as file:
    for source in ["CPU", "NV"]:
        opts.randn_source = source
        for seed, subseed, strength, width, height in [
            (7, 11, 0.3, 0, 0),
            (7, 12, 1, 0, 0),
            (7, 11, 0, 0, 0),
            (7, 7, 0.25, 0, 0),  # of one direction: a plain mean
            (7, 11, 0.5, 40, 48),
            (7, 11, 0, 96, 32),
            (7, 11, 0.6, 88, 104),
            (7, 11, 0.4, 64, 48),  # its own size
        ]:
            rng = ImageRNG((4, 6, 8), [seed], [subseed], strength, height, width)
            first, second = (rng.next()[0].reshape(-1) for _ in range(2))
            line = {"rng": source, "seed": seed, "subseed": subseed, "strength": strength, "from": [height, width]}
            file.write(json.dumps({**line, "first": coded(first[::3]), "second": coded(second[:16])}) + "\n")
