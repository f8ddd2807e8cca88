# Makes stored_types.jsonl: python3 stored_types.py, with torch and gguf. What types that files keep numbers in stand for: of each a line
# with its name, blocks, and the numbers in them, both as bytes in hexadecimal, numbers in float32. ggml's by gguf's quants.py, 8-bit floats
# by torch, all 256 of each. Blocks are random but for their float16 scales, some of which are negative or subnormal. And
# gguf_file.jsonl: a small file by gguf's own writer, what was put in, and the numbers. And gguf_quantised.jsonl: numbers, and the blocks
# that quants.py makes of them, by type.
import json
import os
import tempfile

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
        blocks = random.integers(0, 256, (3 if size == 32 else 1, width), dtype=np.uint8)
        for i, block in enumerate(blocks):
            for place in places:
                scale = random.normal() * (1e-2, 3e-6, 7.0)[i]
                block[place : place + 2] = np.array([scale], "<f2").view(np.uint8)
        out.write(line(name, blocks.tobytes(), gguf.dequantize(blocks, kind)))
    everything = bytes(range(256))
    for name, kind in (("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2)):
        values = torch.frombuffer(bytearray(everything), dtype=kind).to(torch.float32)
        out.write(line(name, everything, values.numpy()))

path = os.path.join(tempfile.mkdtemp(), "small.gguf")
writer = gguf.GGUFWriter(path, "sdxl")
writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
writer.add_custom_alignment(64)
metadata = {"uint8": 250, "int8": -3, "uint16": 65000, "int16": -300, "int32": -70000, "uint64": 2**60, "int64": -5}
for kind, value in metadata.items():
    getattr(writer, f"add_{kind}")(kind, value)
metadata |= {"float32": 0.5, "float64": 0.1, "bool": True, "string": "naïve 文字"}
for kind in ("float32", "float64", "bool", "string"):
    getattr(writer, f"add_{kind}")(kind, metadata[kind])
for name, values in (("texts", ["a", "", "cd"]), ("floats", [0.5, 1.5]), ("flags", [True, False, True])):
    writer.add_array(name, values)
writer.add_array("comfy.gguf.orig_shape.laid out", (2, 4, 2, 4))
tensors = []
for name, shape, kind in (
    ("plain", (2, 3, 5), "F32"), ("half", (3, 7), "F16"), ("brain", (5,), "BF16"), ("q8", (1, 64), "Q8_0"),
    ("q4", (32,), "Q4_1"), ("q5", (2, 1, 32), "Q5_0"), ("laid out", (2, 32), "Q8_0"), ("one", (1, 1), "F32"),
):  # fmt: skip
    kind = gguf.GGMLQuantizationType[kind]
    data = gguf.quantize(random.normal(size=shape).astype(np.float32), kind)
    writer.add_tensor(name, data, raw_dtype=kind)
    values = gguf.dequantize(data, kind).astype("<f4").tobytes().hex()
    tensors.append({"name": name, "shape": (2, 4, 2, 4) if name == "laid out" else shape, "values": values})
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
with open(path, "rb") as made, open(os.path.join(here, "gguf_file.jsonl"), "w") as out:
    metadata = {name: str(value).lower() if value is True else str(value) for name, value in metadata.items()}
    out.write(json.dumps({"file": made.read().hex(), "metadata": metadata, "tensors": tensors}) + "\n")

# Blocks of every size of number, of zeros, of one number, of halves between steps, of one sign, and with the largest twice.
rows = [random.normal(size=32) * scale for scale in (1, 0.02, 3e-6, 40, 1e-9)]
rows += [np.zeros(32), np.full(32, -0.3), (np.arange(32) - 15.5) / 2, np.arange(32) - 8.5, np.abs(rows[0]) + 1, np.tile([3, -3], 16)]
rows += [np.where(np.arange(32) == 17, 127, np.arange(32) - 15.5), -np.abs(rows[1]), *random.normal(size=(8, 32))]
rows = np.array(rows).astype(np.float32)
with open(os.path.join(here, "gguf_quantised.jsonl"), "w") as out:
    for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
        blocks = gguf.quantize(rows, gguf.GGMLQuantizationType[name])
        out.write(line(name, blocks.tobytes(), rows))
