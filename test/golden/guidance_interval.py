# Makes guidance_interval.jsonl: python3 guidance_interval.py, with torch, transformers, Pillow and diffusers (PYTHONPATH counts). Latents of
# whole calls of diffusers' pipelines whose UNet says of the other rows what it says of the text's wherever a guider of diffusers (start, stop)
# would switch guidance off, which leaves nothing to be guided by; every fifth number in float64, and `atol` twenty times what float32 is off.
import diffusers
import torch
from recorded import call, full_controlnet, here, instruct_pix2pix, noted, picture, write

SETTINGS = dict(prompt="a red fox in the snow", negative_prompt="rain", num_inference_steps=7, guidance_scale=5)
SIZE = dict(height=64, width=64)
# The kind, and the rest of the call.
CALLS = [
    ("text2img", dict(guidance_stop=0.6)),
    ("text2img", dict(guidance_start=0.3, guidance_stop=0.75, guidance_rescale=0.7, num_images_per_prompt=2)),
    ("text2img", dict(guidance_start=0.5, scheduler="HeunDiscreteScheduler")),
    ("text2img", dict(guidance_stop=0.5, pag_scale=3, num_images_per_prompt=2)),
    ("img2img", dict(guidance_stop=0.7, strength=0.6)),
    ("controlled", dict(guidance_start=0.2, guidance_stop=0.8, control_guidance_end=0.5)),
    ("controlled", dict(guidance_stop=0.5, guess_mode=True)),
    ("instruct_pix2pix", dict(guidance_start=0.2, guidance_stop=0.7)),
]
CLASSES = dict(text2img=diffusers.StableDiffusionXLPAGPipeline, img2img=diffusers.StableDiffusionXLImg2ImgPipeline)


def pipeline_of(kind, dtype):
    if kind == "instruct_pix2pix":
        return instruct_pix2pix(dtype)
    if kind != "controlled":
        return CLASSES[kind].from_pretrained(f"{here}/tiny-sdxl", torch_dtype=dtype).to(dtype)
    parts = diffusers.StableDiffusionXLPipeline.from_pretrained(f"{here}/tiny-sdxl", torch_dtype=torch.float32).components
    return diffusers.StableDiffusionXLControlNetPipeline(**parts, controlnet=full_controlnet(parts["unet"], dtype)).to(dtype)


def given(kind):
    if kind == "text2img":
        return SIZE
    return dict(image=picture(1 if kind == "controlled" else 4, 64, 64), **(SIZE if kind != "img2img" else {}))


def unguided(kind, said, images):
    """Rows whose guided prediction is the text's."""
    text = said[:images] if kind == "instruct_pix2pix" else said[images : 2 * images]
    parts = [text] * (len(said) // images)
    if kind == "text2img" and len(parts) == 3:
        parts[2] = said[2 * images :]
    return torch.cat(parts)


def drawn(kind, seed, dtype, settings):
    pipeline, settings = call(pipeline_of(kind, dtype), settings)
    start, stop = settings.pop("guidance_start", 0), settings.pop("guidance_stop", 1)
    images = settings.get("num_images_per_prompt", 1)
    forward, calls = pipeline.unet.forward, []

    def switched(*args, **more):
        (said, *_), all = forward(*args, **more), len(pipeline.scheduler.timesteps)
        # Of image to image only some are left, as pipeline.num_timesteps tells.
        left, i = getattr(pipeline, "num_timesteps", all), len(calls)
        calls.append(i)
        return (said if int(start * left) <= i < int(stop * left) else unguided(kind, said, images),)

    pipeline.unet.forward = switched
    plain = {} if kind == "text2img" else {"pag_scale": None}
    more = {key: value for key, value in {"pag_scale": 0, **settings, **plain}.items() if value is not None}
    generator = torch.Generator("cpu").manual_seed(seed)
    return pipeline(generator=generator, output_type="latent", **more, **given(kind)).images.double().numpy()


lines = []
for seed, (kind, more) in enumerate(CALLS):
    settings = {**SETTINGS, **more}
    rough, exact = (drawn(kind, seed, dtype, settings) for dtype in (torch.float32, torch.float64))
    always = drawn(kind, seed, torch.float64, {key: value for key, value in settings.items() if key not in ("guidance_start", "guidance_stop")})
    case = noted(rough, exact, 5)
    print(kind, more, "atol", case["atol"], "from always guided", abs(exact - always).max())
    lines.append(dict(kind=kind, settings=settings, seed=seed, **case))
write("guidance_interval", lines)
