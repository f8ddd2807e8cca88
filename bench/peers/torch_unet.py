"""SDXL's UNet in plain torch, channels last: the opponent that torch_peer.py times.

Parameter names and arithmetic are those of diffusers' UNet2DConditionModel for the SDXL base config.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

SDXL = dict(channels=(320, 640, 1280), layers=2, depth=(0, 2, 10), heads=(5, 10, 20), ctx=2048,
            groups=32, add_dim=256, add_in=2816)
TINY = dict(channels=(16, 24, 32), layers=2, depth=(0, 1, 2), heads=(1, 2, 4), ctx=80,
            groups=8, add_dim=16, add_in=136)


def sinusoid(t, dim):
    """diffusers' Timesteps(flip_sin_to_cos=True, downscale_freq_shift=0): float32, cosines first."""
    freq = torch.exp(torch.arange(dim // 2, device=t.device, dtype=torch.float32) * (-math.log(10000.0) / (dim // 2)))
    a = t.float()[:, None] * freq[None]
    return torch.cat([a.cos(), a.sin()], -1)


class Embed(nn.Module):
    def __init__(self, n_in, n):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(n_in, n), nn.Linear(n, n)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)))


class Res(nn.Module):
    def __init__(self, c_in, c, temb, groups):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, c_in, eps=1e-5), nn.Conv2d(c_in, c, 3, padding=1)
        self.time_emb_proj = nn.Linear(temb, c)
        self.norm2, self.conv2 = nn.GroupNorm(groups, c, eps=1e-5), nn.Conv2d(c, c, 3, padding=1)
        if c_in != c:
            self.conv_shortcut = nn.Conv2d(c_in, c, 1)
        self.same = c_in == c

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return (x if self.same else self.conv_shortcut(x)) + h


class Attention(nn.Module):
    def __init__(self, c, heads, ctx=None):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(c, c, bias=False)
        self.to_k, self.to_v = (nn.Linear(ctx or c, c, bias=False) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(c, c), nn.Identity()])

    def forward(self, x, ctx=None):
        ctx = x if ctx is None else ctx
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for p in (self.to_q(x), self.to_k(ctx), self.to_v(ctx)))
        return self.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    def __init__(self, c, inner):
        super().__init__()
        self.proj = nn.Linear(c, inner * 2)

    def forward(self, x):
        h, gate = self.proj(x).chunk(2, dim=-1)
        return h * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(c, 4 * c), nn.Identity(), nn.Linear(4 * c, c)])

    def forward(self, x):
        return self.net[2](self.net[0](x))


class Block(nn.Module):
    def __init__(self, c, heads, ctx):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(c), nn.LayerNorm(c), nn.LayerNorm(c)
        self.attn1, self.attn2, self.ff = Attention(c, heads), Attention(c, heads, ctx), FeedForward(c)

    def forward(self, x, ctx):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), ctx)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    def __init__(self, c, heads, ctx, depth, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.proj_in, self.proj_out = nn.Linear(c, c), nn.Linear(c, c)
        self.transformer_blocks = nn.ModuleList(Block(c, heads, ctx) for _ in range(depth))

    def forward(self, x, ctx):
        b, c, h, w = x.shape
        y = self.proj_in(self.norm(x).permute(0, 2, 3, 1).reshape(b, h * w, c))
        for blk in self.transformer_blocks:
            y = blk(y, ctx)
        return self.proj_out(y).reshape(b, h, w, c).permute(0, 3, 1, 2) + x   # a view: channels_last stays


class Resample(nn.Module):
    """A downsampler (stride 2) or upsampler (nearest x2, then stride 1)."""

    def __init__(self, c, up):
        super().__init__()
        self.up, self.conv = up, nn.Conv2d(c, c, 3, padding=1, stride=1 if up else 2)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else x)


class Stage(nn.Module):
    """One down, middle or up block. `c_ins` are its resnets' input widths."""

    def __init__(self, c_ins, c, cfg, depth, heads, down=False, up=False, mid=False):
        super().__init__()
        temb = cfg["channels"][0] * 4
        self.resnets = nn.ModuleList(Res(i, c, temb, cfg["groups"]) for i in c_ins)
        if depth:
            n = 1 if mid else len(c_ins)
            self.attentions = nn.ModuleList(Transformer(c, heads, cfg["ctx"], depth, cfg["groups"]) for _ in range(n))
        if down:
            self.downsamplers = nn.ModuleList([Resample(c, False)])
        if up:
            self.upsamplers = nn.ModuleList([Resample(c, True)])
        self.has_attn, self.has_down, self.has_up = bool(depth), down, up


class UNet(nn.Module):
    def __init__(self, channels, layers, depth, heads, ctx, groups, add_dim, add_in):
        super().__init__()
        cfg = dict(channels=channels, ctx=ctx, groups=groups)
        self.ch, self.add_dim = channels, add_dim
        n, temb = len(channels), channels[0] * 4
        self.time_embedding, self.add_embedding = Embed(channels[0], temb), Embed(add_in, temb)
        self.conv_in = nn.Conv2d(4, channels[0], 3, padding=1)
        skips, c_prev, downs = [channels[0]], channels[0], []
        for i, c in enumerate(channels):
            downs.append(Stage([c_prev] + [c] * (layers - 1), c, cfg, depth[i], heads[i], down=i < n - 1))
            skips += [c] * (layers + (i < n - 1))
            c_prev = c
        self.down_blocks = nn.ModuleList(downs)
        self.mid_block = Stage([c_prev] * 2, c_prev, cfg, depth[-1], heads[-1], mid=True)
        ups = []
        for i, c in reversed(list(enumerate(channels))):
            ins = []
            for _ in range(layers + 1):
                ins.append(c_prev + skips.pop())
                c_prev = c
            ups.append(Stage(ins, c, cfg, depth[i], heads[i], up=i > 0))
        self.up_blocks = nn.ModuleList(ups)
        self.conv_norm_out = nn.GroupNorm(groups, channels[0], eps=1e-5)
        self.conv_out = nn.Conv2d(channels[0], 4, 3, padding=1)

    def forward(self, x, t, ctx, pooled, time_ids):
        """x [B,4,h,w]; t [B]; ctx [B,77,ctx]; pooled [B,1280]; time_ids [B,6]. Returns the noise prediction."""
        dt = self.conv_in.weight.dtype
        ids = sinusoid(time_ids.flatten(), self.add_dim).reshape(x.shape[0], -1)
        emb = self.time_embedding(sinusoid(t, self.ch[0]).to(dt))
        emb = emb + self.add_embedding(torch.cat([pooled, ids.to(pooled.dtype)], -1).to(dt))
        x = self.conv_in(x)
        skips = [x]
        for s in self.down_blocks:
            for i, res in enumerate(s.resnets):
                x = res(x, emb)
                if s.has_attn:
                    x = s.attentions[i](x, ctx)
                skips.append(x)
            if s.has_down:
                x = s.downsamplers[0](x)
                skips.append(x)
        s = self.mid_block
        x = s.resnets[0](x, emb)
        x = s.resnets[1](s.attentions[0](x, ctx), emb)
        for s in self.up_blocks:
            for i, res in enumerate(s.resnets):
                x = res(torch.cat([x, skips.pop()], 1), emb)
                if s.has_attn:
                    x = s.attentions[i](x, ctx)
            if s.has_up:
                x = s.upsamplers[0](x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def inputs(cfg, batch, height, width, dtype):
    """Random inputs of forward() for latents of height x width."""
    x = torch.randn(batch, 4, height, width, dtype=dtype).to(memory_format=torch.channels_last)
    ids = torch.tensor([[height * 8.0, width * 8.0, 0, 0, height * 8.0, width * 8.0]]).repeat(batch, 1)
    pooled = torch.randn(batch, cfg["add_in"] - 6 * cfg["add_dim"], dtype=dtype)
    return x, torch.full((batch,), 500.0), torch.randn(batch, 77, cfg["ctx"], dtype=dtype), pooled, ids


def build(make, dtype, share_blocks, memory_format=torch.channels_last):
    """make()'s net with torch's default random weights. `share_blocks`: a transformer's blocks all hold its first one's weights."""
    was = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            net = make()
        for mod in net.modules() if share_blocks else ():
            blocks = getattr(mod, "transformer_blocks", None)
            if blocks is not None:
                mod.transformer_blocks = nn.ModuleList([blocks[0]] * len(blocks))
        net = net.to_empty(device="cpu")
        for mod in net.modules():
            if hasattr(mod, "reset_parameters"):
                mod.reset_parameters()
    finally:
        torch.set_default_dtype(was)
    return net.to(memory_format=memory_format).requires_grad_(False).eval()
