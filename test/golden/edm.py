# Makes edm.jsonl: python3 edm.py, with torch, transformers, Pillow and diffusers (PYTHONPATH counts). diffusers' two EDM schedulers step
# by step in float32; and whole calls over tiny-sdxl as Playground v2.5 (a VAE with a mean and a spread by channel) and as CosXL: every
# fifth number in float64, and `atol` twenty times what float32 is off. Diffusers' inpainting encodes without the mean and the spread that
# it decodes with; here it encodes with them, as its image to image does.
import sys
from unittest import mock

import diffusers
import numpy as np
import torch
from formulas import weight
from recorded import call, disc, full_controlnet, here, noted, packed, picture, write

EULER, SOLVER = "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"
COSXL = dict(prediction_type="v_prediction", sigma_schedule="exponential", sigma_data=1.0, sigma_min=0.002, sigma_max=120.0)
# Class, config, steps, and where the steps begin or what `step` takes.
STEPS = [
    (EULER, dict(), 6, dict()),
    (EULER, COSXL, 6, dict()),
    (EULER, dict(rho=5.0, sigma_data=0.7, sigma_max=40.0, sigma_min=0.05, prediction_type="v_prediction"), 5, dict(begin=2)),
    (EULER, dict(final_sigmas_type="sigma_min", sigma_schedule="exponential"), 4, dict(s_churn=1.5, s_tmin=0.1, s_noise=1.01)),
    (EULER, COSXL, 5, dict(s_churn=0.9)),
    (SOLVER, dict(), 6, dict()),
    (SOLVER, dict(), 18, dict(begin=6)),
    (SOLVER, COSXL, 7, dict()),
    (SOLVER, dict(solver_order=1, final_sigmas_type="sigma_min"), 4, dict()),
    (SOLVER, dict(solver_order=3), 9, dict()),
    (SOLVER, dict(solver_order=3, lower_order_final=False), 6, dict()),
    (SOLVER, dict(solver_type="heun", euler_at_final=True, sigma_data=0.8), 16, dict()),
    (SOLVER, dict(algorithm_type="sde-dpmsolver++"), 6, dict()),
    (SOLVER, dict(algorithm_type="sde-dpmsolver++", solver_type="heun", sigma_schedule="exponential"), 5, dict()),
]


def stepped(name, config, steps, more):
    """x starts at (i - 1.5) / 2 times init_noise_sigma, or as noise over 0.3 i; the network says 0.4 x + 0.3 t + 0.2 i."""
    more = dict(more)
    begin = more.pop("begin", 0)
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(steps)
    i = torch.arange(4, dtype=torch.float32)
    x = (i - 1.5) / 2 * scheduler.init_noise_sigma
    if begin:
        scheduler.set_begin_index(begin)
        x = scheduler.add_noise((0.3 * i)[None], ((i - 1.5) / 2)[None], scheduler.timesteps[begin : begin + 1])[0]
    drawn = 0

    def draw(shape, **_):
        nonlocal drawn
        drawn += 1
        return ((5 * (drawn - 1) + 3 * i) % 11 - 5) / 4

    module = sys.modules[type(scheduler).__module__]
    trajectory = [x]
    with mock.patch.object(module, "randn_tensor", draw):
        for t in scheduler.timesteps[begin:]:
            said = 0.4 * scheduler.scale_model_input(x, t) + 0.3 * t + 0.2 * i
            x = scheduler.step(said, t, x, return_dict=False, **more)[0]
            trajectory.append(x)
    numbers = dict(timesteps=scheduler.timesteps, sigmas=scheduler.sigmas, trajectory=torch.stack(trajectory))
    told = {key: packed(value.numpy()) for key, value in numbers.items()}
    return dict(scheduler=name, config=config, steps=steps, more=more, begin=begin, **told, draws=drawn)


SETTINGS = dict(prompt="a red fox in the snow", negative_prompt="rain", num_inference_steps=5, guidance_scale=3)
VAE = dict(latents_mean=[-1.6574, 1.886, -1.383, 2.5155], latents_std=[8.4927, 5.9022, 6.5498, 5.2299], scaling_factor=0.5)
CLASSES = dict(
    text2img=diffusers.StableDiffusionXLPipeline,
    img2img=diffusers.StableDiffusionXLImg2ImgPipeline,
    inpaint=diffusers.StableDiffusionXLInpaintPipeline,
    controlled=diffusers.StableDiffusionXLControlNetPipeline,
    instruct_pix2pix=diffusers.StableDiffusionXLInstructPix2PixPipeline,
)
SDE = dict(algorithm_type="sde-dpmsolver++")
# The model, the pipeline, the scheduler where it is not the model's own, and the rest of the call.
CALLS = [
    ("playground", "text2img", None, dict(), dict()),
    ("playground", "img2img", None, dict(), dict(strength=0.7)),
    ("playground", "img2img", SOLVER, SDE, dict(strength=0.5, num_images_per_prompt=2)),
    ("playground", "inpaint", None, dict(), dict(strength=0.8)),
    ("playground", "controlled", EULER, dict(), dict()),
    ("cosxl", "text2img", None, dict(), dict(guidance_rescale=0.7, num_images_per_prompt=2)),
    ("cosxl", "inpaint", SOLVER, dict(), dict(strength=1.0)),
    ("cosxl", "instruct_pix2pix", None, dict(), dict(guidance_scale=5)),
]


def encode_as_img2img(pipeline):
    config = pipeline.vae.config
    plain = pipeline._encode_vae_image
    mean, std = (torch.tensor(config[key]).view(1, 4, 1, 1) for key in ("latents_mean", "latents_std"))
    factor = config.scaling_factor
    pipeline._encode_vae_image = lambda *of, **given: (plain(*of, **given) / factor - mean) * factor / std


def pipeline_of(model, kind, scheduler, config, dtype):
    load = dict(pretrained_model_name_or_path=f"{here}/tiny-sdxl", torch_dtype=dtype)
    unet = diffusers.UNet2DConditionModel.from_pretrained(f"{here}/tiny-sdxl", subfolder="unet", torch_dtype=torch.float32)
    parts = dict(controlnet=full_controlnet(unet, dtype)) if kind == "controlled" else {}
    if kind == "instruct_pix2pix":
        bias = unet.conv_in.bias
        unet.conv_in = torch.nn.Conv2d(8, 16, 3, padding=1)
        unet.conv_in.weight.copy_(weight("instruct_pix2pix", "conv_in.weight", [16, 8, 3, 3]))
        unet.conv_in.bias.copy_(bias)
        unet.register_to_config(in_channels=8)
        parts = dict(is_cosxl_edit=True)
    pipeline = CLASSES[kind].from_pretrained(**load, unet=unet.to(dtype), **parts).to(dtype)
    own, settings = (SOLVER, dict()) if model == "playground" else (EULER, COSXL)
    pipeline.scheduler = getattr(diffusers, scheduler or own)(**settings, **config)
    if model == "playground":
        pipeline.vae.register_to_config(**VAE)
        if kind == "inpaint":
            encode_as_img2img(pipeline)
    return pipeline


def drawn(number, model, kind, scheduler, config, more, dtype, output="latent"):
    pipeline, settings = call(pipeline_of(model, kind, scheduler, config, dtype), more)
    given = {} if kind == "img2img" else dict(height=64, width=64)
    if kind in ("img2img", "inpaint", "instruct_pix2pix"):
        given["image"] = picture(4, 64, 64)
    if kind == "inpaint":
        given["mask_image"] = disc()
    if kind == "controlled":
        given["image"] = picture(1, 64, 64)
    generator = torch.Generator("cpu").manual_seed(number)
    return pipeline(generator=generator, output_type=output, **{**SETTINGS, **more}, **given).images


lines = [stepped(*each) for each in STEPS]
for number, (model, kind, scheduler, config, more) in enumerate(CALLS):
    rough, exact = (
        drawn(number, model, kind, scheduler, config, more, dtype).double().numpy() for dtype in (torch.float32, torch.float64)
    )
    case = noted(rough, exact, 5)
    print(model, kind, "atol", case["atol"], "largest", np.abs(exact).max())
    told = dict(scheduler=scheduler, config=config, settings={**SETTINGS, **more}, seed=number)
    lines.append(dict(model=model, kind=kind, **told, **case))
pixels = [drawn(0, *CALLS[0], dtype, "np") for dtype in (torch.float32, torch.float64)]
lines.append(dict(pixels=True, **noted(*pixels, 50)))
write("edm", lines)
