# Makes seamless.jsonl: python3 seamless.py, with torch, transformers, Pillow and diffusers (PYTHONPATH counts). Latents of whole calls of
# diffusers' pipelines, and pixels, where the convolutions of the UNet, the ControlNet and the VAE have torch's padding_mode "circular",
# as people have patterns drawn; along one axis their padding is circular there and zeros along the other. Every fifth number in float64
# (every fiftieth of pixels), and `atol` twenty times what float32 is off.
import diffusers
import torch
from recorded import call, full_controlnet, here, noted, picture, write
from torch.nn import functional

SETTINGS = dict(prompt="a red fox in the snow", negative_prompt="rain", num_inference_steps=5, guidance_scale=5)
SIZE = dict(height=64, width=64)
# The kind, and the rest of the call.
CALLS = [
    ("text2img", dict(seamless="xy")),
    ("text2img", dict(seamless="x", num_images_per_prompt=2)),
    ("text2img", dict(seamless="y")),
    ("img2img", dict(seamless="xy", strength=0.8)),
    ("controlled", dict(seamless="xy")),
]
CLASSES = dict(text2img=diffusers.StableDiffusionXLPipeline, img2img=diffusers.StableDiffusionXLImg2ImgPipeline)


def without_seams(module, axes):
    for layer in module.modules():
        if not isinstance(layer, torch.nn.Conv2d):
            continue
        if axes == "xy":
            layer.padding_mode = "circular"
            layer._reversed_padding_repeated_twice = [side for side in reversed(layer.padding) for _ in range(2)]
            continue
        y, x = layer.padding
        around, zeros = ((x, x, 0, 0), (0, 0, y, y)) if axes == "x" else ((0, 0, y, y), (x, x, 0, 0))

        def forward(weight, bias, of=layer, around=around, zeros=zeros):
            return lambda image: functional.conv2d(
                functional.pad(functional.pad(image, around, mode="circular"), zeros), weight, bias, of.stride
            )

        layer.forward = forward(layer.weight, layer.bias)


def pipeline_of(kind, dtype):
    if kind != "controlled":
        return CLASSES[kind].from_pretrained(f"{here}/tiny-sdxl", torch_dtype=dtype).to(dtype)
    parts = diffusers.StableDiffusionXLPipeline.from_pretrained(f"{here}/tiny-sdxl", torch_dtype=torch.float32).components
    return diffusers.StableDiffusionXLControlNetPipeline(**parts, controlnet=full_controlnet(parts["unet"], dtype)).to(dtype)


def given(kind):
    return {**(SIZE if kind != "img2img" else {}), **(dict(image=picture(1 if kind == "controlled" else 4, 64, 64)) if kind != "text2img" else {})}


def drawn(kind, seed, dtype, settings):
    pipeline, settings = call(pipeline_of(kind, dtype), settings)
    axes = settings.pop("seamless", None)
    for module in (pipeline.unet, pipeline.vae, getattr(pipeline, "controlnet", None)):
        if axes and module:
            without_seams(module, axes)
    generator = torch.Generator("cpu").manual_seed(seed)
    latents = pipeline(generator=generator, output_type="latent", **settings, **given(kind)).images
    return latents.double().numpy(), pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample.double().numpy()


lines = []
for seed, (kind, more) in enumerate(CALLS):
    settings = {**SETTINGS, **more}
    (rough, rough_pixels), (exact, pixels) = (drawn(kind, seed, dtype, settings) for dtype in (torch.float32, torch.float64))
    plain, _ = drawn(kind, seed, torch.float64, {key: value for key, value in settings.items() if key != "seamless"})
    case = dict(**noted(rough, exact, 5), pixels=noted(rough_pixels, pixels, 50))
    print(kind, more, "atol", case["atol"], case["pixels"]["atol"], "from with seams", abs(exact - plain).max())
    lines.append(dict(kind=kind, settings=settings, seed=seed, **case))
write("seamless", lines)
