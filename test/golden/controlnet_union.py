# Makes controlnet_union.jsonl: python3 controlnet_union.py, with torch, transformers, Pillow and diffusers (PYTHONPATH counts). Weights and
# pictures are formulas, which test/support/controlnet_golden.ts has too; numbers are float64's, and `atol` twenty times what float32 is off.
import json

import diffusers
import torch
from formulas import fill
from recorded import here, noted, picture, write

CONFIG = dict(
    addition_embed_type="text_time", addition_time_embed_dim=16, attention_head_dim=[1, 2, 4], block_out_channels=[16, 24, 32],
    conditioning_embedding_out_channels=[4, 8, 12, 16], cross_attention_dim=80,
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"], norm_num_groups=8,
    projection_class_embeddings_input_dim=136, transformer_layers_per_block=[1, 1, 2], use_linear_projection=True,
    num_control_type=6, num_trans_channel=16, num_trans_head=2, num_trans_layer=2, num_proj_channel=16,
)


def net(name, dtype):
    return fill(diffusers.ControlNetUnionModel(**CONFIG), name).to(dtype)


SETTINGS = dict(prompt="a red fox in the snow", negative_prompt="rain", height=64, width=64, num_inference_steps=4, guidance_scale=5)
# What is asked of each net: pictures with their modes. Guess mode fails there under guidance.
CALLS = [
    ("single", "text2img", [("union", [((1, 72, 60), 3)])], dict(controlnet_conditioning_scale=0.8, num_images_per_prompt=2)),
    ("no_guidance", "text2img", [("union", [((2, 64, 64), 0)])], dict(guidance_scale=1)),
    ("two_controls", "text2img", [("union", [((1, 64, 64), 0), ((3, 64, 64), 4)])], dict(controlnet_conditioning_scale=[0.7, 1.3])),
    (
        "two_windows", "text2img", [("union", [((1, 64, 64), 5), ((2, 64, 64), 1)])],
        dict(num_inference_steps=6, control_guidance_start=[0.0, 0.4], control_guidance_end=[0.6, 1.0]),
    ),
    ("guess", "text2img", [("union", [((1, 64, 64), 2)])], dict(guess_mode=True, guidance_scale=1, num_images_per_prompt=2)),
    ("guess_two", "text2img", [("union", [((1, 64, 64), 2), ((2, 64, 64), 3)])], dict(guess_mode=True, guidance_scale=1, controlnet_conditioning_scale=[0.5, 0.9])),
    ("img2img", "img2img", [("union", [((1, 64, 64), 3)])], dict(strength=0.6, num_inference_steps=6)),
    (
        "two_nets", "text2img", [("union", [((1, 64, 64), 1)]), ("other", [((3, 64, 64), 4)])],
        dict(controlnet_conditioning_scale=[0.6, 1.1], control_guidance_end=[1.0, 0.6]),
    ),
]
CLASSES = dict(
    text2img=(diffusers.StableDiffusionXLPipeline, diffusers.StableDiffusionXLControlNetUnionPipeline),
    img2img=(diffusers.StableDiffusionXLPipeline, diffusers.StableDiffusionXLControlNetUnionImg2ImgPipeline),
)

lines = []
for number, (id, kind, nets, more) in enumerate(CALLS):
    results = []
    for dtype in (torch.float32, torch.float64):
        plain, controlled = CLASSES[kind]
        parts = plain.from_pretrained(f"{here}/tiny-sdxl", torch_dtype=dtype).components
        own = [net(name, dtype) for name, _ in nets]
        pipeline = controlled(**parts, controlnet=own if len(own) > 1 else own[0]).to(dtype)
        pipeline.set_progress_bar_config(disable=True)
        controls = [control for _, of_one in nets for control in of_one]
        asked = dict(control_image=[picture(*of) for of, _ in controls], control_mode=[mode for _, mode in controls])
        if kind == "img2img":
            asked["image"] = picture(4, 64, 64)
        generator = torch.Generator("cpu").manual_seed(number)
        results.append(pipeline(generator=generator, output_type="latent", **asked, **{**SETTINGS, **more}).images)
    case = noted(*results)
    print(id, case["atol"])
    lines.append(dict(call=id, kind=kind, seed=number, nets=nets, settings={**SETTINGS, **more}, **case))
made = net("union", torch.float32)
keys = {key: list(value.shape) for key, value in made.state_dict().items()}
lines.append(dict(config=json.loads(made.to_json_string()), keys=keys))
write("controlnet_union", lines)
