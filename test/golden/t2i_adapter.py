# Makes t2i_adapter.jsonl: python3 t2i_adapter.py, with torch, transformers, Pillow, diffusers and DeepCache (PYTHONPATH counts). Latents of
# whole calls of StableDiffusionXLAdapterPipeline, and of pipelines without adapters whose UNet is handed what T2IAdapter gives; every fifth
# number in float64, and `atol` twenty times what float32 is off.
import json
import tempfile

import diffusers
import numpy as np
import torch
from formulas import fill
from recorded import call, disc, full_controlnet, here, noted, picture, with_ip_adapter, write

CONFIG = dict(channels=[16, 24, 32, 32], downscale_factor=16, adapter_type="full_adapter_xl")
ADAPTERS = dict(edges=dict(**CONFIG, in_channels=3, num_res_blocks=2), sketch=dict(**CONFIG, in_channels=1, num_res_blocks=1))
scratch = tempfile.TemporaryDirectory()
SETTINGS = dict(prompt="a red fox in the snow", negative_prompt="rain", num_inference_steps=5, guidance_scale=5, height=64, width=64)
PAIR = dict(prompt=["a red fox", "a castle"], negative_prompt=["rain", "fog"])
# The kind, adapters with their pictures and scales, and the rest of the call.
CALLS = [
    ("text2img", [("edges", (1, 64, 64), 1)], dict(num_images_per_prompt=2)),
    ("text2img", [("sketch", (2, 90, 70), 0.7)], dict(scheduler="DPMSolverMultistepScheduler", adapter_conditioning_factor=0.6, height=96)),
    ("text2img", [("edges", (3, 117, 149), 1.4)], dict(scheduler="EulerAncestralDiscreteScheduler", guidance_scale=1)),
    ("text2img", [("edges", (1, 64, 64), 0.6), ("sketch", (2, 80, 48), 1.2)], dict(scheduler="DDIMScheduler", height=48, width=80)),
    ("text2img", [("sketch", (2, 64, 64), 0.5), ("edges", (3, 72, 60), -0.8)], dict(scheduler="UniPCMultistepScheduler", adapter_conditioning_factor=0.25)),
    ("text2img", [("edges", (4, 64, 64), 1)], PAIR),
    ("text2img", [("edges", (1, 64, 64), 1)], dict(scheduler="HeunDiscreteScheduler", denoising_end=0.8, adapter_conditioning_factor=0.5)),
    ("text2img", [("edges", (1, 64, 64), 1)], dict(guidance_rescale=0.7, scheduler="LMSDiscreteScheduler")),
    ("adapted", [("edges", (2, 64, 64), 0.8)], dict()),
    ("img2img", [("edges", (1, 64, 64), 1)], dict(strength=0.6, num_images_per_prompt=2)),
    ("inpaint", [("sketch", (1, 64, 64), 1)], dict(strength=0.9)),
    ("controlled", [("edges", (2, 64, 64), 1)], dict(controlnet_conditioning_scale=0.8, control_guidance_end=0.6)),
    ("perturbed", [("edges", (2, 64, 64), 1)], dict(pag_scale=3)),
    ("cached", [("edges", (2, 64, 64), 1)], dict(cache_interval=2, cache_branch_id=1)),
    ("cached", [("sketch", (2, 64, 64), 1)], dict(cache_interval=3, cache_branch_id=5)),
]
OTHERS = dict(
    img2img=diffusers.StableDiffusionXLImg2ImgPipeline,
    inpaint=diffusers.StableDiffusionXLInpaintPipeline,
    perturbed=diffusers.StableDiffusionXLPAGPipeline,
    cached=diffusers.StableDiffusionXLPipeline,
)


def adapter_of(name, dtype):
    return fill(diffusers.T2IAdapter(**ADAPTERS[name]), name).to(dtype)


def seen(name, of):
    return picture(*of).convert("L") if ADAPTERS[name]["in_channels"] == 1 else picture(*of)


def opened(kind, adapters, dtype):
    load = lambda made, **more: made.from_pretrained(f"{here}/tiny-sdxl", torch_dtype=torch.float32, **more)
    if kind in ("text2img", "adapted"):
        models = [adapter_of(name, dtype) for name, *_ in adapters]
        adapter = diffusers.MultiAdapter(models) if len(models) > 1 else models[0]
        pipeline = load(diffusers.StableDiffusionXLAdapterPipeline, adapter=adapter)
        if kind == "adapted":
            with_ip_adapter(pipeline, scratch.name, 0.7)
        return pipeline.to(dtype)
    if kind == "controlled":
        parts = load(diffusers.StableDiffusionXLPipeline).components
        net = full_controlnet(parts["unet"], dtype)
        return diffusers.StableDiffusionXLControlNetPipeline(**parts, controlnet=net).to(dtype)
    return load(OTHERS[kind]).to(dtype)


def hand_over(unet, adapters, dtype):
    """Has the UNet add in each call what adapters of one picture give."""
    [(name, of, scale)] = adapters
    pixels = torch.from_numpy(np.atleast_3d(np.asarray(seen(name, of), dtype=np.float32) / 255)).permute(2, 0, 1)[None]
    features = [scale * x for x in adapter_of(name, dtype)(pixels.to(dtype))]
    forward = unet.forward

    def followed(sample, *args, **more):
        within = [x.repeat(sample.shape[0], 1, 1, 1) for x in features]
        return forward(sample, *args, down_intrablock_additional_residuals=within, **more)

    unet.forward = followed


def drawn(kind, adapters, seed, dtype, settings):
    pipeline, settings = call(opened(kind, adapters, dtype), settings)
    if kind in ("text2img", "adapted"):
        images, scales = [seen(name, of) for name, of, _ in adapters], [scale for *_, scale in adapters]
        prompts = len(settings["prompt"]) if isinstance(settings["prompt"], list) else 1
        settings["image"] = images if len(images) > 1 else images * prompts
        settings["adapter_conditioning_scale"] = scales if len(scales) > 1 else scales[0]
        settings.update(dict(ip_adapter_image=picture(1, 117, 149)) if kind == "adapted" else {})
    else:
        hand_over(pipeline.unet, adapters, dtype)
        settings.update(dict(image=picture(4, 64, 64)) if kind in ("img2img", "inpaint") else {})
        settings.update(dict(mask_image=disc()) if kind == "inpaint" else {})
        settings.update(dict(image=picture(1, 64, 64)) if kind == "controlled" else {})
    if kind == "img2img":
        settings = {name: value for name, value in settings.items() if name not in ("height", "width")}
    generator = torch.Generator("cpu").manual_seed(seed)
    return pipeline(generator=generator, output_type="latent", **settings).images.double().numpy()


lines = []
for name, config in ADAPTERS.items():
    made = adapter_of(name, torch.float32)
    keys = {key: list(value.shape) for key, value in made.state_dict().items()}
    lines.append(dict(adapter=name, config=json.loads(made.to_json_string()), keys=keys))
for seed, (kind, adapters, more) in enumerate(CALLS):
    settings = {**SETTINGS, **more}
    rough, exact = (drawn(kind, adapters, seed, dtype, settings) for dtype in (torch.float32, torch.float64))
    without = drawn(kind, [(name, of, 0) for name, of, _ in adapters], seed, torch.float64, settings)
    case = noted(rough, exact, 5)
    print(kind, adapters, more, "atol", case["atol"], "from without", np.abs(exact - without).max())
    lines.append(dict(kind=kind, adapters=adapters, settings=settings, seed=seed, **case))
write("t2i_adapter", lines)
