# Makes rrdbnet.jsonl: python3 rrdbnet.py rrdbnet_arch.py, with torch and BasicSR's file of that name (basicsr/archs): small RRDBNets over
# the picture (5 x + 3 y + 50 c) mod 256, as Real-ESRGAN's program calls them, mirrored to whole squares of pixels where they take such.
# Numbers are float64's, and `atol` twenty times what float32 is off.
import base64
import importlib.util
import json
import os
import sys
import types

import torch
import torch.nn.functional as F

here = os.path.dirname(os.path.abspath(__file__))
torch.set_grad_enabled(False)

# What the file takes from the rest of BasicSR, which wants much more than torch.
util = types.ModuleType("basicsr.archs.arch_util")
util.default_init_weights = lambda *_, **__: None
util.make_layer = lambda block, count, **how: torch.nn.Sequential(*[block(**how) for _ in range(count)])
util.pixel_unshuffle = lambda x, scale: F.pixel_unshuffle(x, scale)
registry = types.ModuleType("basicsr.utils.registry")
registry.ARCH_REGISTRY = types.SimpleNamespace(register=lambda: lambda made: made)
for name in ["basicsr", "basicsr.archs", "basicsr.utils"]:
    sys.modules[name] = types.ModuleType(name)
sys.modules["basicsr.archs.arch_util"] = util
sys.modules["basicsr.utils.registry"] = registry
spec = importlib.util.spec_from_file_location("basicsr.archs.rrdbnet_arch", sys.argv[1])
arch = importlib.util.module_from_spec(spec)
spec.loader.exec_module(arch)


def network(scale, dtype):
    net = arch.RRDBNet(num_in_ch=3, num_out_ch=3, scale=scale, num_feat=8, num_block=2, num_grow_ch=4).to(dtype).eval()
    for k, (name, p) in enumerate(net.state_dict().items()):
        i = torch.arange(p.numel())
        values = (((7 * i * i + 37 * i + 11 * k) % 101) - 50).to(dtype) * 5 / 1024
        p.copy_((values + (0.3 if name == "conv_last.bias" else 0)).reshape(p.shape))
    return net


lines = []
for scale, width, height in [(4, 7, 5), (2, 6, 9), (1, 11, 10)]:
    x, y, c = torch.arange(width), torch.arange(height), torch.arange(3)
    picture = (5 * x[None, None] + 3 * y[None, :, None] + 50 * c[:, None, None]) % 256

    def enlarged(dtype):
        square = {4: 1, 2: 2, 1: 4}[scale]
        pad = (0, -width % square, 0, -height % square)
        padded = F.pad(picture[None].to(dtype) / 255, pad, mode="reflect")
        return network(scale, dtype)(padded)[0, :, : height * scale, : width * scale]

    exact = enlarged(torch.float64)
    off = (enlarged(torch.float32).double() - exact).abs().max().item()
    values = base64.b64encode(exact.permute(1, 2, 0).float().contiguous().numpy().tobytes()).decode()
    lines.append(dict(scale=scale, width=width, height=height, atol=20 * off, values=values))
    print(scale, off, exact.min().item(), exact.max().item(), exact.std().item())

with open(f"{here}/rrdbnet.jsonl", "w") as f:
    f.writelines(json.dumps(line) + "\n" for line in lines)
