# Makes ip_adapter.jsonl: python3 ip_adapter.py, with torch, transformers, Pillow and diffusers (PYTHONPATH counts). Weights, pictures and
# mask are formulas, which test/support/controlnet_golden.ts and test/support/ip_adapter_golden.ts have too; numbers are float64's, and `atol` twenty times
# what float32 is off. DeepCache's own helper is wanted, too.
import tempfile

import diffusers
import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from recorded import CONTEXT, ENCODER, call, disc, here, noted, packed, picture, write, write_image_encoder, write_ip_adapter
from transformers import CLIPImageProcessor

scratch = tempfile.TemporaryDirectory()
folder = scratch.name
lines = []


def plus_shapes():
    """Of the projection, under the published files' keys."""
    width, inner, wide = 32, 128, 128
    shapes = {"latents": [1, 6, width]}
    shapes["proj_in.weight"], shapes["proj_in.bias"] = [width, ENCODER["hidden_size"]], [width]
    shapes["proj_out.weight"], shapes["proj_out.bias"] = [CONTEXT, width], [CONTEXT]
    shapes["norm_out.weight"] = shapes["norm_out.bias"] = [CONTEXT]
    for i in range(4):
        for norm in ("0.norm1", "0.norm2", "1.0"):
            shapes[f"layers.{i}.{norm}.weight"] = shapes[f"layers.{i}.{norm}.bias"] = [width]
        shapes[f"layers.{i}.0.to_q.weight"] = [inner, width]
        shapes[f"layers.{i}.0.to_kv.weight"] = [2 * inner, width]
        shapes[f"layers.{i}.0.to_out.weight"] = [width, inner]
        shapes[f"layers.{i}.1.1.weight"], shapes[f"layers.{i}.1.3.weight"] = [wide, width], [width, wide]
    return shapes


def note(exact, rough, **case):
    lines.append({**case, **noted(rough, exact)})


def preprocessing():
    for size, of in [(56, (1, 117, 149)), (56, (2, 200, 91)), (56, (3, 56, 56)), (56, (4, 31, 40)), (224, (5, 401, 300))]:
        pixels = CLIPImageProcessor(size=size, crop_size=size)(picture(*of), return_tensors="np").pixel_values
        stride = 41 if size == 56 else 499
        values = packed(pixels.ravel()[::stride])
        lines.append({"picture": of, "size": size, "stride": stride, "values": values})


def encoding(encoder):
    pixels = CLIPImageProcessor(size=56, crop_size=56)(picture(1, 117, 149), return_tensors="pt").pixel_values
    outputs = {}
    for dtype in (torch.float32, torch.float64):
        out = encoder.to(dtype)(pixels.to(dtype), output_hidden_states=True)
        outputs[dtype] = {"penultimate": out.hidden_states[-2], "image_embeds": out.image_embeds}
    for name in ("penultimate", "image_embeds"):
        note(outputs[torch.float64][name], outputs[torch.float32][name], encoder=ENCODER, picture=(1, 117, 149), of=name)


SETTINGS = dict(prompt="a red fox in the snow", negative_prompt="rain", height=64, width=64, num_inference_steps=4, guidance_scale=5)
# Of each adapter the picture or pictures, the scale and perhaps the masks, one for each picture.
CALLS = [
    ("plain", "text2img", [("plain", (1, 117, 149), 1)], dict(num_images_per_prompt=2)),
    ("plus", "text2img", [("plus", (2, 200, 91), 0.6)], {}),
    ("no_guidance", "text2img", [("plus", (4, 31, 40), 1)], dict(guidance_scale=1)),
    ("two", "text2img", [("plain", (1, 117, 149), 0.7), ("plus", (3, 56, 56), -0.4)], {}),
    ("img2img", "img2img", [("plain", (2, 200, 91), 0.8)], dict(strength=0.6, num_inference_steps=6)),
    ("inpaint", "inpaint", [("plus", (1, 117, 149), 1.5)], dict(strength=0.9, num_inference_steps=6)),
    (
        "several", "text2img",
        [("plain", [(1, 117, 149), (4, 31, 40)], 0.7), ("plus", [(3, 56, 56), (2, 200, 91), (5, 60, 60)], 0.5)],
        dict(num_images_per_prompt=2),
    ),
    ("several_of_one", "text2img", [("plus", [(1, 117, 149), (2, 200, 91)], 0.8)], {}),
    ("style", "text2img", [("plain", (1, 117, 149), {"up": {"block_0": [0.0, 1.0, 0.0]}})], {}),
    (
        "blocks_of_two", "text2img",
        [
            ("plain", (1, 117, 149), {"down": {"block_2": [0.0, 1.0]}, "mid": 0.5}),
            ("plus", (3, 56, 56), {"up": 0.8, "down": {"block_1": [-0.3]}}),
        ],
        {},
    ),
    ("mask", "text2img", [("plus", (2, 200, 91), 0.9, ["disc"])], dict(width=96, num_images_per_prompt=2)),
    (
        "masks", "text2img", [("plain", [(1, 117, 149), (4, 31, 40)], [0.7, 1.2], ["disc", (2, 60, 80)])],
        dict(width=72, height=56, cache_interval=2, cache_branch_id=0),
    ),
    (
        "masks_by_block", "pag",
        [
            ("plain", [(1, 117, 149), (4, 31, 40)], {"up": {"block_0": [0.0, [0.5, 1.2], 0.6]}, "mid": [[0.3, 0.9]]}, [(2, 60, 80), "disc"]),
            ("plus", (3, 56, 56), -0.4, None),
        ],
        dict(pag_scale=2),
    ),
    (
        "masks_of_two", "inpaint", [("plain", (1, 117, 149), 0.7, ["disc"]), ("plus", (2, 200, 91), 1.1, [(3, 70, 50)])],
        dict(strength=0.9, num_inference_steps=5),
    ),
]
CLASSES = dict(
    text2img=diffusers.StableDiffusionXLPipeline,
    img2img=diffusers.StableDiffusionXLImg2ImgPipeline,
    inpaint=diffusers.StableDiffusionXLInpaintPipeline,
    pag=diffusers.StableDiffusionXLPAGPipeline,
)


def masks_of(adapters, height, width):
    """What the pipelines take as cross_attention_kwargs."""
    made = []
    for _, _, _, *masks in adapters:
        given = [disc() if each == "disc" else picture(*each) for each in (masks[0] if masks else None) or []]
        planes = [IPAdapterMaskProcessor().preprocess(each, height=height, width=width) for each in given]
        made.append(torch.cat(planes, 1) if planes else None)
    return dict(cross_attention_kwargs=dict(ip_adapter_masks=made)) if any(each is not None for each in made) else {}


def drawing():
    for number, (id, kind, adapters, more) in enumerate(CALLS):
        results = []
        for dtype in (torch.float32, torch.float64):
            pipeline = CLASSES[kind].from_pretrained(f"{here}/tiny-sdxl", torch_dtype=dtype)
            names = [f"{name}.safetensors" for name, *_ in adapters]
            pipeline.load_ip_adapter(folder, subfolder="", weight_name=names, image_encoder_folder="image_encoder")
            pipeline.to(dtype)
            pipeline.set_ip_adapter_scale([adapter[2] for adapter in adapters])
            images = [[picture(*each) for each in of] if isinstance(of, list) else picture(*of) for _, of, *_ in adapters]
            over = {} if kind in ("text2img", "pag") else {"image": picture(4, 64, 64)}
            over.update({"mask_image": disc()} if kind == "inpaint" else {})
            pipeline, settings = call(pipeline, {**SETTINGS, **more})
            over.update(masks_of(adapters, settings["height"], settings["width"]))
            if kind == "img2img":
                settings = {name: value for name, value in settings.items() if name not in ("height", "width")}
            if dtype == torch.float64 and id in ("plain", "plus"):
                embeds = pipeline.prepare_ip_adapter_image_embeds(images, None, "cpu", 1, True)
                tokens = pipeline.unet.encoder_hid_proj(embeds)[0]
                note(tokens, tokens.float(), adapter=adapters[0][0], picture=adapters[0][1], of="tokens")
            generator = torch.Generator("cpu").manual_seed(number)
            results.append(
                pipeline(ip_adapter_image=images, generator=generator, output_type="latent", **over, **settings).images
            )
        rough, exact = results
        note(exact, rough, call=id, seed=number, adapters=adapters, settings=more)


encoder = write_image_encoder(folder)
write_ip_adapter(folder)
write_ip_adapter(folder, "plus", plus_shapes())
preprocessing()
encoding(encoder)
drawing()
write("ip_adapter", lines)
