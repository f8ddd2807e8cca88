"""Makes lcm.jsonl: latent consistency distillation over tiny-sdxl as diffusers' script distils.

    PYTHONPATH=DIFFUSERS/src python3 lcm.py DIFFUSERS/examples/consistency_distillation/train_lcm_distill_lora_sdxl.py

The solver, boundary conditions and readings of the network are that script's own functions, the adapters peft's, all in float64. A first
line has the solver's tables. Then, for each case, the loss, and of each trained weight its gradient's norm and sum with the formula's
numbers of that name as factors; `noise` is how far float32's gradients are from these. Adapters, inputs and what the student (and its
target) differ by from the teacher are formulas: `numbers` of test/controlnet_golden.ts.
"""
import ast
import json
import math
import os
import sys

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig

here = os.path.dirname(os.path.abspath(__file__))
WANTED = {
    "DDIMSolver",
    "append_dims",
    "scalings_for_boundary_conditions",
    "get_predicted_original_sample",
    "get_predicted_noise",
    "extract_into_tensor",
}
ROWS, SIDE, RANK = 2, 8, 2
CASES = [
    dict(name="lora", prediction_type="epsilon", loss_type="huber", huber_c=0.001, scaling=10.0, index=[0, 37], w=[3.5, 14.25]),
    dict(name="velocity", prediction_type="v_prediction", loss_type="l2", huber_c=0.001, scaling=10.0, index=[49, 12], w=[0.0, 7.0]),
    dict(name="unet", prediction_type="epsilon", loss_type="huber", huber_c=0.05, scaling=4.0, index=[20, 3], w=[4.0, 9.5]),
]
TARGETS = ["to_k", "to_out.0"]
PART = "attn2.to_k"


def functions(path):
    tree = ast.parse(open(path).read())
    tree.body = [node for node in tree.body if getattr(node, "name", "") in WANTED]
    theirs = dict(np=np, torch=torch)
    exec(compile(tree, path, "exec"), theirs)
    return theirs


def numbers(name, *shape):
    seed = 0x811C9DC5
    for byte in name.encode():
        seed = ((seed ^ byte) * 0x01000193) & 0xFFFFFFFF
    h = np.uint32(seed) + np.arange(math.prod(shape), dtype=np.uint32) * np.uint32(0x9E3779B9)
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    whole = ((h ^ (h >> np.uint32(16))) >> np.uint32(23)).astype(np.float64) - 256
    return torch.from_numpy(whole / 128).reshape(shape)


def unet_of(dtype, moved=None):
    """tiny-sdxl's, with its PART weights moved by the numbers of that name."""
    unet = UNet2DConditionModel.from_pretrained(f"{here}/tiny-sdxl", subfolder="unet").to(dtype).requires_grad_(False)
    for key, p in unet.named_parameters():
        if moved and PART in key:
            p += (numbers(f"{moved}.{key}", *p.shape) / 32).to(dtype)
    return unet


def gradients(theirs, case, dtype):
    teacher = unet_of(dtype)
    if case["name"] == "unet":
        student, target = unet_of(dtype, "student"), unet_of(dtype, "target")
        trained = {key: p for key, p in student.named_parameters() if PART in key}
    else:
        student = target = unet_of(dtype)
        student.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
        student.to(dtype)
        trained = {key.replace(".default", ""): p for key, p in student.named_parameters() if "lora_" in key}
        with torch.no_grad():
            for key, p in trained.items():
                p.copy_(numbers(key, *p.shape) / 16)
    for p in trained.values():
        p.requires_grad_()
    scheduler = DDPMScheduler.from_pretrained(f"{here}/tiny-sdxl", subfolder="scheduler")
    abar = scheduler.alphas_cumprod
    solver = theirs["DDIMSolver"](abar.numpy(), timesteps=1000, ddim_timesteps=50)
    alphas, sigmas = abar.double().sqrt(), (1 - abar.double()).sqrt()
    solver.ddim_alpha_cumprods_prev = solver.ddim_alpha_cumprods_prev.double()
    alphas, sigmas = alphas.to(dtype), sigmas.to(dtype)
    index = torch.tensor(case["index"])
    start = solver.ddim_timesteps[index]
    end = (start - 1000 // 50).clamp(min=0)
    noisy = numbers("sample", ROWS, 4, SIDE, SIDE).to(dtype)
    w = torch.tensor(case["w"], dtype=dtype).reshape(ROWS, 1, 1, 1)
    times = torch.tensor([[64, 96, 0, 0, 64, 64], [80, 100, 8, 2, 64, 64]], dtype=dtype)
    context, pooled = numbers("context", ROWS, 77, 80).to(dtype), numbers("pooled", ROWS, 40).to(dtype)

    def ask(unet, x, t, told=1):
        return unet(x, t, context * told, added_cond_kwargs=dict(text_embeds=pooled * told, time_ids=times)).sample

    def read(which, said, x, t):
        return theirs[which](said, t, x, case["prediction_type"], alphas, sigmas)

    def consistent(said, x, t):
        skip, out = theirs["scalings_for_boundary_conditions"](t.double(), timestep_scaling=case["scaling"])
        skip, out = (theirs["append_dims"](each.to(dtype), 4) for each in (skip, out))
        return skip * x + out * read("get_predicted_original_sample", said, x, t)

    given = consistent(ask(student, noisy, start), noisy, start)
    with torch.no_grad():
        said, untold = ask(teacher, noisy, start), ask(teacher, noisy, start, 0)
        x0, noise = (
            read(which, said, noisy, start) + w * (read(which, said, noisy, start) - read(which, untold, noisy, start))
            for which in ("get_predicted_original_sample", "get_predicted_noise")
        )
        before = solver.ddim_step(x0, noise, index).to(dtype)
        wanted = consistent(ask(target, before, end), before, end)
    if case["loss_type"] == "l2":
        loss = torch.nn.functional.mse_loss(given, wanted)
    else:
        loss = torch.mean(torch.sqrt((given - wanted) ** 2 + case["huber_c"] ** 2) - case["huber_c"])
    loss.backward()
    return loss.item(), {key: p.grad.double() for key, p in trained.items()}


def main(script):
    theirs = functions(script)
    scheduler = DDPMScheduler.from_pretrained(f"{here}/tiny-sdxl", subfolder="scheduler")
    rms = lambda t: t.pow(2).mean().sqrt()
    with open(os.path.join(here, "lcm.jsonl"), "w") as out:
        write = lambda line: out.write(json.dumps(line, separators=(",", ":")) + "\n")
        for count in (50, 7):
            solver = theirs["DDIMSolver"](scheduler.alphas_cumprod.numpy(), timesteps=1000, ddim_timesteps=count)
            prev = [float(f"{x:.9g}") for x in solver.ddim_alpha_cumprods_prev.tolist()]
            write(dict(ddim_timesteps=solver.ddim_timesteps.tolist(), ddim_alpha_cumprods_prev=prev))
        for case in CASES:
            rough_loss, rough = gradients(theirs, case, torch.float32)
            loss, exact = gradients(theirs, case, torch.float64)
            noise = max((rms(rough[key] - g) / rms(g)).item() for key, g in exact.items())
            print(case["name"], loss, rough_loss - loss, len(exact), noise)
            told = [[key, *(float(f"{x.item():.7g}") for x in (g.norm(), g.flatten() @ numbers(key, g.numel())))] for key, g in exact.items()]
            write({**case, "loss": loss, "noise": float(f"{noise:.2g}"), "gradients": told})


main(sys.argv[1])
