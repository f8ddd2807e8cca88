# Makes merge_models.jsonl: python3 merge_models.py SD_SCRIPTS SUPERMERGER, with torch, safetensors and tqdm. Models whose weights are formulas
# of their letter are merged: weighted sums by kohya's tools/merge_models.py, sums with a difference by A1111's formula, in float32; of each a
# line with the name of the weight, the ratios by letter, the base's, the type that it is stored in (of several models float32), and every
# `stride`-th number (base64). And `blocks`: which block supermerger's blockfromkey takes keys of SDXL for, and the order of its ratios.
import ast
import base64
import json
import logging
import os
import runpy
import sys
import tempfile
import types

import torch
from formulas import weight
from safetensors.torch import load_file, save_file

here = os.path.dirname(os.path.abspath(__file__))
scripts, supermerger = sys.argv[1:]
# What it takes of its own library is a logger, and would need torchvision.
logger = dict(setup_logging=lambda: None, get_my_logger=logging.getLogger)
sys.modules["library.utils"] = types.SimpleNamespace(**logger)
WEIGHTS = {
    "unet.conv_in.weight": [16, 4, 3, 3],
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight": [32, 80],
    "unet.conv_norm_out.bias": [16],
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.weight": [32, 32],
    "text_encoder_2.text_projection.weight": [40, 48],
}
SUMS = [{"b": 0.3}, {"b": 0.2, "d": 0.5}, {"b": -0.4}]
DIFFERENCES = [{"b": 0.7}, {"b": 1.0, "d": -0.25}]


def model(letter, shapes=WEIGHTS):
    return {key: weight(letter, key, shape).float() for key, shape in shapes.items()}


def kohyas(ratios, saving):
    with tempfile.TemporaryDirectory() as folder:
        files = [f"{folder}/{letter}.safetensors" for letter in ["a", *ratios]]
        for file, letter in zip(files, ["a", *ratios]):
            save_file(model(letter), file)
        out = f"{folder}/out.safetensors"
        shares = [str(share) for share in [1 - sum(ratios.values()), *ratios.values()]]
        sys.argv = ["merge_models.py", "--models", *files, "--output", out, "--saving_precision", saving, "--ratios", *shares]
        runpy.run_path(f"{scripts}/tools/merge_models.py", run_name="__main__")
        return load_file(out)


def with_difference(ratios):
    a, c = model("a"), model("c")
    for letter, ratio in ratios.items():
        b = model(letter)
        a = {key: a[key] + ratio * (b[key] - c[key]) for key in a}
    return a


def lines(ratios, base, merged):
    for key, whole in merged.items():
        stride = 1 + whole.numel() // 60
        values = base64.b64encode(whole.flatten()[::stride].contiguous().numpy().tobytes()).decode()
        dtype = str(whole.dtype).removeprefix("torch.")
        yield dict(key=key, ratios=ratios, base=base, dtype=dtype, stride=stride, values=values)


def supermergers():
    path = f"{supermerger}/scripts/mergers/mergers.py"
    with open(path) as file:
        tree = ast.parse(file.read())
    wanted = [x for x in tree.body if getattr(x, "name", "") == "blockfromkey" or (isinstance(x, ast.Assign) and x.targets[0].id == "BLOCKIDXLL")]
    scope = {}
    exec("import re\n" + "\n".join(ast.unparse(x) for x in wanted), scope)
    names = ["time_embed.0", "time_embed.2", "label_emb.0.0", "input_blocks.0.0", "input_blocks.3.0.op", "input_blocks.4.0.in_layers.0"]
    names += [f"input_blocks.{i}.0.in_layers.2" for i in range(1, 9) if i not in (3, 6)] + ["input_blocks.6.0.op"]
    names += [f"input_blocks.{i}.1.transformer_blocks.1.attn1.to_q" for i in (4, 5, 7, 8)]
    names += ["middle_block.0.in_layers.2", "middle_block.1.transformer_blocks.1.ff.net.2", "middle_block.2.out_layers.3"]
    names += [f"output_blocks.{i}.0.skip_connection" for i in range(9)]
    names += ["output_blocks.2.2.conv", "output_blocks.5.2.conv", "output_blocks.2.1.proj_in", "out.0", "out.2"]
    blocks = {f"{name}.weight": scope["blockfromkey"](f"model.diffusion_model.{name}.weight", True)[1] for name in names}
    texts = {scope["blockfromkey"](f"conditioner.embedders.{i}.weight", True)[1] for i in (0, 1)}
    return dict(blocks=blocks, texts=list(texts), order=[name for name in scope["BLOCKIDXLL"] if name != "VAE"])


with open(f"{here}/merge_models.jsonl", "w") as out:
    found = [supermergers()]
    for ratios in SUMS:
        found += lines(ratios, None, kohyas(ratios, "float" if len(ratios) > 1 else "fp16"))
    for ratios in DIFFERENCES:
        dtype = torch.float32 if len(ratios) > 1 else torch.float16
        found += lines(ratios, "c", {key: x.to(dtype) for key, x in with_difference(ratios).items()})
    for line in found:
        out.write(json.dumps(line) + "\n")
