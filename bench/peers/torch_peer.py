"""PyTorch's side of the comparison: reads one JSON request a line and answers each with one.

{"prepare": {"op", "direction", "inputs": {name: shape}, "attrs", "dtype"}} or {"prepare": {"unet": {...}}} sets up a case,
{"run": n} times it n times, {"drop": true} frees it. Inputs are channels last, as our ops take them; each op is written
with the calls that diffusers' model makes. Nothing but torch is imported, unless diffusers itself is asked for.
"""
import gc
import json
import os
import sys
import time

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import torch_unet  # noqa: E402

DTYPES = dict(float32=torch.float32, bfloat16=torch.bfloat16, float16=torch.float16)


def activate(y, name):
    if name == "geglu":
        h, gate = y.chunk(2, dim=-1)
        return h * F.gelu(gate)
    return dict(none=lambda v: v, silu=F.silu, gelu=F.gelu)[name](y)


def linear(t, attrs):
    y = activate(F.linear(t["x"], t["weight"], t.get("bias")), attrs["activation"])
    return y + t["residual"] if "residual" in t else y


def conv2d(t, attrs):
    top, left, bottom, right = attrs["padding"]
    x = t["x"]
    if (top, left) != (bottom, right):
        x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
    y = F.conv2d(x, t["weight"], t.get("bias"), stride=attrs["stride"], padding=(top, left))
    if "shift" in t:
        y = y + t["shift"][:, :, None, None]
    return y + t["residual"] if "residual" in t else y


def attention(t, attrs):
    q, k, v = (t[n].unflatten(-1, (attrs["heads"], -1)).transpose(1, 2) for n in "qkv")
    y = F.scaled_dot_product_attention(q, k, v, scale=attrs["scale"], is_causal=attrs["causal"])
    return y.transpose(1, 2).flatten(2)


def group_norm(t, attrs):
    y = F.group_norm(t["x"], attrs["groups"], t["weight"], t["bias"], attrs["eps"])
    return F.silu(y) if attrs["silu"] else y


def layer_norm(t, attrs):
    return F.layer_norm(t["x"], t["x"].shape[-1:], t["weight"], t["bias"], attrs["eps"])


OPS = dict(linear=linear, conv2d=conv2d, attention=attention, group_norm=group_norm, layer_norm=layer_norm)


def tensor(op, name, shape, dtype):
    """Random numbers; a four-dimensional [n, h, w, c] becomes torch's [n, c, h, w] in channels-last memory."""
    t = torch.rand(*shape, dtype=torch.float32).mul_(2).sub_(1).to(dtype)
    images = op == "conv2d" or op == "group_norm"
    return t.permute(0, 3, 1, 2) if images and len(shape) == 4 else t


def prepare_op(op, direction, inputs, attrs, dtype):
    t = {name: tensor(op, name, shape, DTYPES[dtype]) for name, shape in inputs.items()}
    if "skip" in t:  # joined outside the timing: the model joins once for a norm and a convolution
        t["x"] = torch.cat([t["x"], t.pop("skip")], 1)
    if direction == "forward":
        return lambda: OPS[op](t, attrs)
    wanted = [v.requires_grad_() for v in t.values()]
    with torch.enable_grad():
        y = OPS[op](t, attrs)
    dy = torch.rand_like(y)
    return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)


def prepare_unet(opponent, source, preset, width, height, batch, dtype, share_blocks):
    if opponent != "torch":
        import torch_diffusers
        channels_last = opponent == "diffusers-channels-last"
        return torch_diffusers.prepare(source, width, height, batch, DTYPES[dtype], share_blocks, channels_last)
    cfg = {"sdxl-base": torch_unet.SDXL, "tiny": torch_unet.TINY}[preset]
    net = torch_unet.build(lambda: torch_unet.UNet(**cfg), DTYPES[dtype], share_blocks)
    x = torch_unet.inputs(cfg, batch, height // 8, width // 8, DTYPES[dtype])
    return lambda: net(*x)


def main():
    torch.set_num_threads(int(sys.argv[1]))
    torch.set_grad_enabled(False)
    say = lambda answer: print(json.dumps(answer), flush=True)
    say(dict(torch=torch.__version__, threads=torch.get_num_threads()))
    case = None
    for line in sys.stdin:
        request = json.loads(line)
        if "prepare" in request:
            what = request["prepare"]
            case = prepare_unet(**what["unet"]) if "unet" in what else prepare_op(**what)
            say(dict(ready=True))
        elif "run" in request:
            seconds = []
            for _ in range(request["run"]):
                began = time.perf_counter()
                case()
                seconds.append(time.perf_counter() - began)
            say(dict(seconds=seconds))
        else:
            case = None
            gc.collect()
            say(dict(dropped=True))


if __name__ == "__main__":
    main()
