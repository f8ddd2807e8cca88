# Makes ip_adapter.jsonl: python3 ip_adapter.py, with torch, transformers, Pillow and diffusers (PYTHONPATH counts). Weights, pictures and
# mask are formulas, which test/controlnet_golden.ts and test/ip_adapter_golden.ts have too; numbers are float64's, and `atol` twenty times
# what float32 is off.
import tempfile

import diffusers
import torch
from recorded import CONTEXT, ENCODER, disc, here, noted, packed, picture, write, write_image_encoder, write_ip_adapter
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
]
CLASSES = dict(
    text2img=diffusers.StableDiffusionXLPipeline,
    img2img=diffusers.StableDiffusionXLImg2ImgPipeline,
    inpaint=diffusers.StableDiffusionXLInpaintPipeline,
)


def drawing():
    for number, (id, kind, adapters, more) in enumerate(CALLS):
        results = []
        for dtype in (torch.float32, torch.float64):
            pipeline = CLASSES[kind].from_pretrained(f"{here}/tiny-sdxl", torch_dtype=dtype)
            pipeline.set_progress_bar_config(disable=True)
            names = [f"{name}.safetensors" for name, *_ in adapters]
            pipeline.load_ip_adapter(folder, subfolder="", weight_name=names, image_encoder_folder="image_encoder")
            pipeline.to(dtype)
            pipeline.set_ip_adapter_scale([scale for *_, scale in adapters])
            images = [[picture(*each) for each in of] if isinstance(of, list) else picture(*of) for _, of, _ in adapters]
            over = {} if kind == "text2img" else {"image": picture(4, 64, 64)}
            over.update({"mask_image": disc()} if kind == "inpaint" else {})
            settings = {**SETTINGS, **more}
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
