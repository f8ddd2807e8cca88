# Makes apg.jsonl: python3 apg.py, with torch, transformers, Pillow and diffusers (PYTHONPATH counts). Latents of whole calls of diffusers'
# pipelines whose UNet says of all rows what diffusers' AdaptiveProjectedGuidance makes of them, which leaves the pipeline nothing to guide
# by; every fifth number in float64, and `atol` twenty times what float32 is off.
import diffusers
import torch
from recorded import call, here, noted, picture, write

SETTINGS = dict(prompt="a red fox in the snow", negative_prompt="rain", num_inference_steps=5, guidance_scale=8)
# The kind, the guider's numbers, and the rest of the call. What the prompt changes is 0.5 to 3 long.
CALLS = [
    ("text2img", dict(momentum=-0.5, rescale=0.5, eta=0), dict(num_images_per_prompt=2)),
    ("text2img", dict(momentum=0.6, rescale=0, eta=0.3), dict(guidance_start=0.2, guidance_stop=0.8, guidance_rescale=0.7, scheduler="HeunDiscreteScheduler")),
    ("text2img", dict(momentum=-0.75, rescale=1, eta=-1), dict(pag_scale=3)),
    ("refiner", dict(momentum=0, rescale=1.5, eta=0.5), dict(strength=0.8)),
]
CLASSES = dict(text2img=diffusers.StableDiffusionXLPAGPipeline, refiner=diffusers.StableDiffusionXLImg2ImgPipeline)
WORDS = dict(momentum="adaptive_projected_guidance_momentum", rescale="adaptive_projected_guidance_rescale", eta="eta")
lengths = []


def drawn(kind, seed, dtype, apg, settings):
    model = f"{here}/tiny-sdxl{'-refiner' * (kind == 'refiner')}"
    pipeline, settings = call(CLASSES[kind].from_pretrained(model, torch_dtype=dtype).to(dtype), settings)
    numbers = {WORDS[key]: value for key, value in apg.items()}
    numbers["adaptive_projected_guidance_momentum"] = apg["momentum"] or None
    scale, rescale = settings["guidance_scale"], settings.pop("guidance_rescale", 0)
    start, stop = settings.pop("guidance_start", 0), settings.pop("guidance_stop", 1)
    guider = diffusers.AdaptiveProjectedGuidance(scale, guidance_rescale=rescale, start=start, stop=stop, **numbers)
    forward, calls = pipeline.unet.forward, []

    def guided(*args, **more):
        said, *_ = forward(*args, **more)
        images = settings.get("num_images_per_prompt", 1)
        uncond, text, *perturbed = said.split(images)
        guider.set_state(len(calls), pipeline.num_timesteps, args[1])
        calls.append(0)
        guider.prepare_inputs({})
        lengths.append((text - uncond).norm().item())
        pred = guider.forward(text, uncond).pred
        return (torch.cat([pred, pred, *(pred - (text - each) for each in perturbed)]),)

    pipeline.unet.forward = guided
    given = dict(image=picture(4, 64, 64)) if kind == "refiner" else {"height": 64, "width": 64, "pag_scale": 0}
    generator = torch.Generator("cpu").manual_seed(seed)
    return pipeline(generator=generator, output_type="latent", **{**given, **settings}).images.double().numpy()


lines = []
for seed, (kind, apg, more) in enumerate(CALLS):
    settings = {**SETTINGS, **more}
    rough, exact = (drawn(kind, seed, dtype, apg, settings) for dtype in (torch.float32, torch.float64))
    case = noted(rough, exact, 5)
    print(kind, apg, more, "atol", case["atol"], "lengths", lengths)
    plain = drawn(kind, seed, torch.float64, dict(momentum=0, rescale=0, eta=1), settings)
    print("from plain guidance", abs(exact - plain).max())
    lengths.clear()
    lines.append(dict(kind=kind, settings={**settings, "adaptive_projected_guidance": apg}, seed=seed, **case))
write("apg", lines)
