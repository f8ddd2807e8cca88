"""Updates of a small SDXL UNet or VAE in torch, timed one by one: the opponent of train.ts. One line on stdin is one update.

Arguments: unet or vae, the network's numbers as JSON, batch, dtype (bfloat16 is autocast over float32 weights), threads,
and the name of time's clock.
"""
import json
import sys
import time

import torch
import torch.nn.functional as F

from torch_unet import UNet
from torch_vae import VAE


def unet_loss(cfg, batch):
    net = UNet(**cfg)
    side = 16
    x = torch.randn(batch, 4, side, side).to(memory_format=torch.channels_last)
    t, target = torch.randint(0, 1000, (batch,)).float(), torch.randn(batch, 4, side, side)
    context = torch.randn(batch, 77, cfg["ctx"])
    pooled = torch.randn(batch, cfg["add_in"] - 6 * cfg["add_dim"])
    ids = torch.full((batch, 6), 64.0)
    return net, lambda: net(x, t, context, pooled, ids), lambda y: F.mse_loss(y.float(), target)


def vae_loss(cfg, batch):
    net = VAE(**cfg)
    x = torch.randn(batch, 3, 64, 64).to(memory_format=torch.channels_last)
    noise = torch.randn(batch, cfg["latent"], 16, 16).to(memory_format=torch.channels_last)

    def loss(outputs):
        y, mean, logvar = (t.float() for t in outputs)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return F.l1_loss(y, x) + F.mse_loss(y, x) + 1e-4 * kl

    return net, lambda: net(x, noise), loss


def main():
    name, cfg, batch, dtype = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(int(sys.argv[5]))
    clock = getattr(time, sys.argv[6])
    net, forward, loss = {"unet": unet_loss, "vae": vae_loss}[name](cfg, batch)
    net = net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)

    def update():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            outputs = forward()
        loss(outputs).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    print(json.dumps({"torch": torch.__version__, "parameters": sum(p.numel() for p in net.parameters())}), flush=True)
    for _ in sys.stdin:
        began = clock()
        update()
        print(1000 * (clock() - began), flush=True)


main()
