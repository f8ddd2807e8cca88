"""diffusers' own UNet2DConditionModel with SDXL's base config and random weights: the opponent that most people run.

Only diffusers' source folder is needed (and what it imports); nothing is downloaded.
"""
import sys

import torch
import torch_unet

SDXL = dict(
    sample_size=128, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=[1, 2, 10], attention_head_dim=[5, 10, 20], cross_attention_dim=2048,
    addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    use_linear_projection=True)


def prepare(source, width, height, batch, dtype, share_blocks, channels_last):
    sys.path.insert(0, source)
    from diffusers import UNet2DConditionModel

    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    net = torch_unet.build(lambda: UNet2DConditionModel(**SDXL), dtype, share_blocks, memory_format)
    x = torch.randn(batch, 4, height // 8, width // 8, dtype=dtype).to(memory_format=memory_format)
    ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=dtype).repeat(batch, 1)
    states, pooled = torch.randn(batch, 77, 2048, dtype=dtype), torch.randn(batch, 1280, dtype=dtype)
    return lambda: net(x, 500, states, added_cond_kwargs=dict(text_embeds=pooled, time_ids=ids))
