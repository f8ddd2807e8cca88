"""SDXL's VAE in plain torch, channels last: what torch_train.py trains beside ours.

Arithmetic is that of diffusers' AutoencoderKL; parameters are as many.
"""
import torch
import torch.nn.functional as F
from torch import nn


class Res(nn.Module):
    def __init__(self, c_in, c, groups):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, c_in, eps=1e-6), nn.Conv2d(c_in, c, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, c, eps=1e-6), nn.Conv2d(c, c, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c, 1) if c_in != c else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class PixelAttention(nn.Module):
    """One head over all pixels."""

    def __init__(self, c, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(c, c) for _ in range(4))

    def forward(self, x):
        b, c, h, w = x.shape
        y = self.norm(x).permute(0, 2, 3, 1).reshape(b, 1, h * w, c)
        y = self.to_out(F.scaled_dot_product_attention(self.to_q(y), self.to_k(y), self.to_v(y)))
        return y.reshape(b, h, w, c).permute(0, 3, 1, 2) + x   # a view: channels_last stays


class Down(nn.Module):
    """Zeros only right and below, as the original model was trained."""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def middle(c, groups):
    return [Res(c, c, groups), PixelAttention(c, groups), Res(c, c, groups)]


def ending(c, outputs, groups):
    return [nn.GroupNorm(groups, c, eps=1e-6), nn.SiLU(), nn.Conv2d(c, outputs, 3, padding=1)]


class VAE(nn.Module):
    def __init__(self, channels, layers, groups, latent):
        super().__init__()
        down, c_prev = [nn.Conv2d(3, channels[0], 3, padding=1)], channels[0]
        for i, c in enumerate(channels):
            down += [Res(c_prev if j == 0 else c, c, groups) for j in range(layers)]
            down += [Down(c)] if i < len(channels) - 1 else []
            c_prev = c
        self.encoder = nn.Sequential(*down, *middle(c_prev, groups), *ending(c_prev, 2 * latent, groups))
        up = [nn.Conv2d(latent, c_prev, 3, padding=1), *middle(c_prev, groups)]
        for i, c in enumerate(reversed(channels)):
            up += [Res(c_prev if j == 0 else c, c, groups) for j in range(layers + 1)]
            up += [Up(c)] if i < len(channels) - 1 else []
            c_prev = c
        self.decoder = nn.Sequential(*up, *ending(c_prev, 3, groups))
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1), nn.Conv2d(latent, latent, 1)

    def forward(self, x, noise):
        """x [B,3,h,w] -> the decoded draw, mean and log-variance."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        z = mean + (0.5 * logvar).exp() * noise
        return self.decoder(self.post_quant_conv(z)), mean, logvar
