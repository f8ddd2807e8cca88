"""Updates of a small SDXL UNet in torch, timed one by one: the opponent of train.ts. One line on stdin is one update.

Arguments: the network's numbers as JSON, batch, dtype (bfloat16 is autocast over float32 weights), threads.
"""
import json
import sys
import time

import torch
import torch.nn.functional as F

from torch_unet import UNet


def main():
    cfg, batch, dtype = json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(int(sys.argv[4]))
    net = UNet(**cfg).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    side = 16
    x = torch.randn(batch, 4, side, side).to(memory_format=torch.channels_last)
    t, target = torch.randint(0, 1000, (batch,)).float(), torch.randn(batch, 4, side, side)
    context = torch.randn(batch, 77, cfg["ctx"])
    pooled = torch.randn(batch, cfg["add_in"] - 6 * cfg["add_dim"])
    ids = torch.full((batch, 6), 64.0)

    def update():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            y = net(x, t, context, pooled, ids)
        F.mse_loss(y.float(), target).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    print(json.dumps({"torch": torch.__version__, "parameters": sum(p.numel() for p in net.parameters())}), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        update()
        print(1000 * (time.perf_counter() - began), flush=True)


main()
