"""diffusers' own UNet2DConditionModel with SDXL's base config and random weights: the opponent that most people run.

Only diffusers' source folder is needed (and what it imports); nothing is downloaded.
"""
import sys

import torch
from torch import nn

SDXL = dict(
    sample_size=128, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=[1, 2, 10], attention_head_dim=[5, 10, 20], cross_attention_dim=2048,
    addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    use_linear_projection=True)


def build(source, dtype, share_blocks, memory_format):
    sys.path.insert(0, source)
    from diffusers import UNet2DConditionModel

    was = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            net = UNet2DConditionModel(**SDXL)
        if share_blocks:
            for mod in net.modules():
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


def prepare(source, width, height, batch, dtype, share_blocks, channels_last):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    net = build(source, dtype, share_blocks, memory_format)
    x = torch.randn(batch, 4, height // 8, width // 8, dtype=dtype).to(memory_format=memory_format)
    ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=dtype).repeat(batch, 1)
    states, pooled = torch.randn(batch, 77, 2048, dtype=dtype), torch.randn(batch, 1280, dtype=dtype)
    return lambda: net(x, 500, states, added_cond_kwargs=dict(text_embeds=pooled, time_ids=ids))
