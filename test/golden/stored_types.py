# Makes stored_types.jsonl: python3 stored_types.py, with torch and gguf. What types that files keep numbers in stand for: of each a line
# with its name, blocks, and the numbers in them, both as bytes in hexadecimal, numbers in float32. ggml's by gguf's quants.py, 8-bit floats
# by torch, all 256 of each. Blocks are random but for their float16 scales, some of which are negative, tiny or subnormal.
import json
import os

import gguf
import numpy as np
import torch

here = os.path.dirname(os.path.abspath(__file__))
random = np.random.default_rng(7)
# Where the float16 scales of a block begin.
SCALES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
}  # fmt: skip


def line(name, blocks, values):
    return json.dumps({"type": name, "blocks": blocks.hex(), "values": values.astype("<f4").tobytes().hex()}) + "\n"


with open(os.path.join(here, "stored_types.jsonl"), "w") as out:
    for name, places in SCALES.items():
        kind = gguf.GGMLQuantizationType[name]
        size, width = gguf.GGML_QUANT_SIZES[kind]
        blocks = random.integers(0, 256, (4 if size == 32 else 2, width), dtype=np.uint8)
        for i, block in enumerate(blocks):
            for place in places:
                scale = random.normal() * (1e-2, 3e-6, 7.0, 1e-4)[i]
                block[place : place + 2] = np.array([scale], "<f2").view(np.uint8)
        out.write(line(name, blocks.tobytes(), gguf.dequantize(blocks, kind)))
    everything = bytes(range(256))
    for name, kind in (("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2)):
        values = torch.frombuffer(bytearray(everything), dtype=kind).to(torch.float32)
        out.write(line(name, everything, values.numpy()))
