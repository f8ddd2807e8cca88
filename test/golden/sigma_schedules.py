# Makes sigma_schedules.jsonl: python3 sigma_schedules.py FORGE K_DIFFUSION COMFYUI STABLE_DIFFUSION_CPP, with torch, scipy, transformers, Pillow
# and diffusers (PYTHONPATH counts). Levels by the programs' own functions over SDXL's table in float64 (float32 in base64): what A1111 has,
# by Forge's modules/sd_schedulers.py and k-diffusion; ComfyUI's comfy/samplers.py and comfy_extras/nodes_align_your_steps.py; and
# stable-diffusion.cpp's, whose formulas (src/runtime/denoiser.hpp) are told again here, but for its table gits_noise.h. Then where
# k-diffusion's own samplers come to over some of them in float64, with a formula for a network; and latents of whole calls over tiny-sdxl, of
# diffusers' Euler given the levels: every fifth number in float64, and `atol` twenty times what float32 is off.
import ast
import functools
import itertools
import json
import math
import re
import sys
from types import SimpleNamespace

import diffusers
import numpy as np
import scipy
import torch
from recorded import call, here, noted, packed, write

forge, k_diffusion, comfyui, stable_diffusion_cpp = sys.argv[1:5]
torch.set_default_dtype(torch.float64)


def taken(path, names, **more):
    """Functions, classes and tables of a file, without what it imports."""
    with open(path) as file:
        nodes = ast.parse(file.read()).body
    named = [(node.targets[0] if isinstance(node, ast.Assign) else node, node) for node in nodes]
    body = [node for holder, node in named if getattr(holder, "id", getattr(holder, "name", None)) in names]
    held = dict(torch=torch, nn=torch.nn, np=np, numpy=np, math=math, scipy=scipy, stats=scipy.stats, **more)
    exec(compile(ast.Module(body, []), path, "exec"), held)
    return SimpleNamespace(**held)


sampling = taken(
    f"{k_diffusion}/k_diffusion/sampling.py",
    [
        *["append_zero", "get_sigmas_karras", "get_sigmas_exponential", "get_sigmas_polyexponential", "to_d", "get_ancestral_step"],
        *["linear_multistep_coeff", "sample_euler_ancestral", "sample_heun", "sample_lms", "sample_dpmpp_2m"],
    ],
    integrate=scipy.integrate,
    trange=lambda n, disable: range(n),
    utils=SimpleNamespace(append_dims=lambda x, dims: x[(...,) + (None,) * (dims - x.ndim)]),
)
external = taken(f"{k_diffusion}/k_diffusion/external.py", ["DiscreteSchedule"], sampling=sampling)
shared = SimpleNamespace(sd_model=SimpleNamespace(is_sdxl=True), opts=SimpleNamespace(beta_dist_alpha=0.6, beta_dist_beta=0.6))
webui = taken(
    f"{forge}/modules/sd_schedulers.py",
    [
        *["uniform", "sgm_uniform", "get_align_your_steps_sigmas", "kl_optimal", "simple_scheduler", "normal_scheduler"],
        *["ddim_scheduler", "beta_scheduler", "turbo_scheduler"],
    ],
    shared=shared,
)
comfy = taken(f"{comfyui}/comfy/samplers.py", [
    *["simple_scheduler", "ddim_scheduler", "normal_scheduler", "beta_scheduler", "linear_quadratic_schedule", "kl_optimal_scheduler"],
])
nodes = taken(f"{comfyui}/comfy_extras/nodes_align_your_steps.py", ["loglinear_interp", "NOISE_LEVELS"])

betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
alphas = torch.cumprod(1 - betas, 0)
model = external.DiscreteSchedule((((1 - alphas) / alphas) ** 0.5).double(), quantize=False)
least, greatest = float(model.sigmas[0]), float(model.sigmas[-1])
# What ComfyUI and Forge ask of a model.
model.timestep = lambda sigma: (sigma.log() - model.log_sigmas).abs().argmin()
model.sigma = model.t_to_sigma
unet = SimpleNamespace(model=SimpleNamespace(predictor=SimpleNamespace(sigma=lambda timesteps: model.sigmas[timesteps])))
model.inner_model = SimpleNamespace(forge_objects=SimpleNamespace(unet=unet))


def of_webui(function, *more):
    return lambda n: function(n, least, greatest, *more, "cpu")


def of_comfy(function, **more):
    return lambda n: function(model, n, **more)


def at(timesteps):
    return [*(float(model.t_to_sigma(torch.tensor(float(t)))) for t in timesteps), 0.0]


def resampled(levels, count):
    return np.exp(np.interp(np.linspace(0, 1, count), np.linspace(0, 1, len(levels)), np.log(levels)))


def gits(n):
    with open(f"{stable_diffusion_cpp}/src/runtime/gits_noise.h") as file:
        text = file.read().split("GITS_NOISE_1_20 = {", 1)[1].split("};", 1)[0]
    rows = [[float(each) for each in re.findall(r"[\d.]+(?=f)", row)] for row in re.findall(r"{([^{}]*)}", text)]
    return [*(rows[n - 2] if n <= 20 else resampled(rows[-1], n + 1))[:-1], 0.0]


def smooth(n):
    return [math.floor((1 - i / n) ** 2 * (3 - 2 * (1 - i / n)) * 999 + 0.5) for i in range(n)]


def distinct(timesteps):
    return [each for each, _ in itertools.groupby(timesteps)]


karras = functools.partial(sampling.get_sigmas_karras, sigma_min=least, sigma_max=greatest)
exponential = functools.partial(sampling.get_sigmas_exponential, sigma_min=least, sigma_max=greatest)
ays = nodes.NOISE_LEVELS["SDXL"]
PROGRAMS = {
    "A1111": {
        "Karras": ("karras", karras),
        "Exponential": ("exponential", exponential),
        "Polyexponential": ("exponential", lambda n: sampling.get_sigmas_polyexponential(n, least, greatest, 1.0)),
        "Uniform": ("normal", of_webui(webui.uniform, model)),
        "Normal": ("normal", of_webui(webui.normal_scheduler, model)),
        "SGM Uniform": ("sgm_uniform", of_webui(webui.sgm_uniform, model)),
        "KL Optimal": ("kl_optimal", of_webui(webui.kl_optimal)),
        "Align Your Steps": ("align_your_steps", of_webui(webui.get_align_your_steps_sigmas)),
        "Simple": ("simple", of_webui(webui.simple_scheduler, model)),
        "DDIM": ("ddim_uniform", of_webui(webui.ddim_scheduler, model)),
        "Beta": ("beta", of_webui(webui.beta_scheduler, model)),
        "Turbo": ("turbo", of_webui(webui.turbo_scheduler, model)),
    },
    "ComfyUI": {
        "karras": ("karras", karras),
        "exponential": ("exponential", exponential),
        "normal": ("normal", of_comfy(comfy.normal_scheduler)),
        "simple": ("simple", of_comfy(comfy.simple_scheduler)),
        "sgm_uniform": ("sgm_uniform", of_comfy(comfy.normal_scheduler, sgm=True)),
        "ddim_uniform": ("ddim_uniform", of_comfy(comfy.ddim_scheduler)),
        "beta": ("beta_timesteps", of_comfy(comfy.beta_scheduler)),
        "linear_quadratic": ("linear_quadratic", of_comfy(comfy.linear_quadratic_schedule)),
        "kl_optimal": ("kl_optimal_zero", lambda n: comfy.kl_optimal_scheduler(n, least, greatest)),
        "AlignYourStepsScheduler": ("ays", lambda n: [*nodes.loglinear_interp(ays, n + 1)[:-1], 0.0]),
    },
    "stable-diffusion.cpp": {
        "discrete": ("normal", lambda n: at(max(999 - 999 / (n - 1) * i, 0) for i in range(n))),
        "karras": ("karras", karras),
        "exponential": ("exponential", exponential),
        "ays": ("ays", lambda n: [*resampled(ays, n + 1)[:-1], 0.0]),
        "gits": ("gits", gits),
        "sgm_uniform": ("sgm_uniform", lambda n: at(999 - 999 / n * i for i in range(n))),
        "simple": ("simple", lambda n: at(999 - int(i * (1000 / n)) for i in range(n))),
        "smoothstep": ("smoothstep", lambda n: at(smooth(n))),
        "kl_optimal": (
            "kl_optimal_zero",
            lambda n: [*(math.tan(i / (n - 1) * math.atan(least) + (1 - i / (n - 1)) * math.atan(greatest)) for i in range(n)), 0.0],
        ),
        "lcm": ("lcm", lambda n: at((50 - i * 50 // n) * 20 - 1 for i in range(n))),
        "beta": ("beta_timesteps", lambda n: at(distinct(round(scipy.stats.beta.ppf(1 - i / n, 0.6, 0.6) * 999) for i in range(n)))),
    },
}

lines = {}
for program, schedules in PROGRAMS.items():
    for name, (schedule, levels) in schedules.items():
        for steps in [2, 6, 10, 16, 30, *([150] if program == "ComfyUI" and name == "beta" else [])]:
            line = dict(schedule=schedule, steps=steps, sigmas=packed(levels(steps)))
            of = lines.setdefault(json.dumps(line), dict(line, names={}))["names"]
            of.setdefault(program, []).append(name)



def last_of(sampler, levels, **more):
    """From the first level times i - 1.5, of a network that says 0.1 x + t / 100000 + (i - 1.5) / 4."""
    noise = torch.arange(4.0)[None] - 1.5

    def denoiser(x, sigma):
        return x - sigma * (0.1 * x / (sigma**2 + 1) ** 0.5 + model.sigma_to_t(sigma) / 100000 + noise / 4)

    sigmas = torch.as_tensor(levels).double()
    return packed(getattr(sampling, sampler)(denoiser, sigmas[0] * noise, sigmas, disable=True, **more))


steady = dict(noise_sampler=lambda *_: torch.arange(4.0)[None] / 2)
runs = [
    dict(run=f"{ours}_{schedule}", steps=8, last=last_of(sampler, levels(8), **more))
    for ours, sampler, (schedule, levels), more in [
        ("dpm++2m", "sample_dpmpp_2m", PROGRAMS["A1111"]["SGM Uniform"], {}),
        ("lms", "sample_lms", PROGRAMS["A1111"]["Align Your Steps"], {}),
        ("heun", "sample_heun", PROGRAMS["stable-diffusion.cpp"]["gits"], {}),
        ("euler_a", "sample_euler_ancestral", PROGRAMS["A1111"]["KL Optimal"], steady),
    ]
]
torch.set_default_dtype(torch.float32)


def latents(sigmas, dtype):
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(f"{here}/tiny-sdxl", torch_dtype=dtype).to(dtype)
    pipeline, _ = call(pipeline, dict())
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipeline.scheduler.config, timestep_spacing="linspace")
    given = dict(generator=torch.manual_seed(7), guidance_scale=3.0, height=64, width=64, output_type="latent")
    return pipeline("a red fox", sigmas=sigmas, **given).images.double().numpy()


calls = []
for program, name, steps in [("A1111", "KL Optimal", 4), ("stable-diffusion.cpp", "ays", 5)]:
    schedule, levels = PROGRAMS[program][name]
    sigmas = [float(each) for each in levels(steps)]
    calls.append(dict(call=schedule, steps=steps, **noted(*(latents(sigmas, dtype) for dtype in (torch.float32, torch.float64)), 5)))

write("sigma_schedules", [*lines.values(), *runs, *calls])
