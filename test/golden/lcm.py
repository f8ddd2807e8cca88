"""Makes lcm.jsonl: latent consistency distillation over tiny-sdxl as diffusers' script distils.

    PYTHONPATH=DIFFUSERS/src python3 lcm.py DIFFUSERS/examples/consistency_distillation

The solver, boundary conditions, the embedding of w and readings of the network are the scripts' own functions, the adapters peft's, all in
float64. First lines have the solver's tables. Then, for each case, the loss, and of each trained weight its gradient's norm and sum with
the formula's numbers of that name as factors; `noise` is how far float32's gradients are from these. Adapters, inputs, the layer that is
told w and what the student (and its target) differ by from the teacher are formulas: `numbers` of test/support/controlnet_golden.ts. Last come
latents of whole calls of diffusers' pipelines over a UNet that is told w, float64's, with `atol` twenty times what float32 is off.
"""
import ast
import base64
import json
import os
import sys

import diffusers
import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from formulas import numbers
from peft import LoraConfig

here = os.path.dirname(os.path.abspath(__file__))
WANTED = {
    "DDIMSolver",
    "append_dims",
    "scalings_for_boundary_conditions",
    "get_predicted_original_sample",
    "get_predicted_noise",
    "extract_into_tensor",
    "guidance_scale_embedding",
}
ROWS, SIDE, RANK = 2, 8, 2
CASES = [
    dict(name="lora", prediction_type="epsilon", loss_type="huber", huber_c=0.001, scaling=10.0, index=[0, 37], w=[3.5, 14.25]),
    dict(name="velocity", prediction_type="v_prediction", loss_type="l2", huber_c=0.001, scaling=10.0, index=[49, 12], w=[0.0, 7.0]),
    dict(name="unet", prediction_type="epsilon", loss_type="huber", huber_c=0.05, scaling=4.0, index=[20, 3], w=[4.0, 9.5], part="attn2.to_k"),
    dict(name="told", prediction_type="epsilon", loss_type="l2", huber_c=0.001, scaling=10.0, index=[30, 8], w=[3.0, 12.5], part="time_embedding"),
]
TARGETS = ["to_k", "to_out.0"]
DIM, COND = 8, "time_embedding.cond_proj.weight"  # time_cond_proj_dim
PROMPTS = dict(prompt="a red fox in the snow", negative_prompt="rain", height=64, width=64)
CALLS = [
    dict(seed=1, scheduler="LCMScheduler", num_inference_steps=4, guidance_scale=8.5),
    dict(seed=2, scheduler="EulerDiscreteScheduler", num_inference_steps=3, guidance_scale=0.5, num_images_per_prompt=2),
]


def functions(folder):
    theirs = dict(np=np, torch=torch)
    for name in "train_lcm_distill_sdxl_wds.py", "train_lcm_distill_lora_sdxl.py":
        tree = ast.parse(open(os.path.join(folder, name)).read())
        tree.body = [node for node in tree.body if getattr(node, "name", "") in WANTED]
        exec(compile(tree, name, "exec"), theirs)
    return theirs


def unet_of(dtype, told=False, part=None, moved=None):
    """tiny-sdxl's, with a layer that is told w, and the weights of a part moved by the numbers of that name."""
    unet = UNet2DConditionModel.from_pretrained(f"{here}/tiny-sdxl", subfolder="unet")
    if told:
        weights = unet.state_dict()
        unet = UNet2DConditionModel.from_config(unet.config, time_cond_proj_dim=DIM).eval()
        unet.load_state_dict({**weights, COND: numbers(COND, *unet.state_dict()[COND].shape) / 4})
    unet.to(dtype).requires_grad_(False)
    for key, p in unet.named_parameters():
        if moved and part in key:
            p += (numbers(f"{moved}.{key}", *p.shape) / 32).to(dtype)
    return unet


def gradients(theirs, case, dtype):
    told = case["name"] == "told"
    teacher, part = unet_of(dtype, told), case.get("part")
    if part:
        student, target = (unet_of(dtype, told, part, moved) for moved in ("student", "target"))
        trained = {key: p for key, p in student.named_parameters() if part in key}
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

    embedded = theirs["guidance_scale_embedding"](w.flatten(), embedding_dim=DIM, dtype=dtype) if told else None

    def ask(unet, x, t, said=1, **more):
        return unet(x, t, context * said, added_cond_kwargs=dict(text_embeds=pooled * said, time_ids=times), **more).sample

    def read(which, said, x, t):
        return theirs[which](said, t, x, case["prediction_type"], alphas, sigmas)

    def consistent(said, x, t):
        skip, out = theirs["scalings_for_boundary_conditions"](t.double(), timestep_scaling=case["scaling"])
        skip, out = (theirs["append_dims"](each.to(dtype), 4) for each in (skip, out))
        return skip * x + out * read("get_predicted_original_sample", said, x, t)

    given = consistent(ask(student, noisy, start, timestep_cond=embedded), noisy, start)
    with torch.no_grad():
        said, untold = ask(teacher, noisy, start), ask(teacher, noisy, start, 0)
        x0, noise = (
            read(which, said, noisy, start) + w * (read(which, said, noisy, start) - read(which, untold, noisy, start))
            for which in ("get_predicted_original_sample", "get_predicted_noise")
        )
        before = solver.ddim_step(x0, noise, index).to(dtype)
        wanted = consistent(ask(target, before, end, timestep_cond=embedded), before, end)
    if case["loss_type"] == "l2":
        loss = torch.nn.functional.mse_loss(given, wanted)
    else:
        loss = torch.mean(torch.sqrt((given - wanted) ** 2 + case["huber_c"] ** 2) - case["huber_c"])
    loss.backward()
    return loss.item(), {key: p.grad.double() for key, p in trained.items()}


randn = torch.randn
torch.randn = lambda *args, dtype=None, **more: randn(*args, dtype=torch.float32, **more).to(dtype or torch.float32)


@torch.no_grad()
def latents(call, dtype):
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(f"{here}/tiny-sdxl", unet=unet_of(dtype, True)).to(dtype)
    seed, scheduler, more = call["seed"], call["scheduler"], {k: v for k, v in call.items() if k not in ("seed", "scheduler")}
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe(**PROMPTS, **more, generator=torch.Generator().manual_seed(seed), output_type="latent").images.double()


def main(folder):
    theirs = functions(folder)
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
        for call in CALLS:
            exact, rough = (latents(call, dtype) for dtype in (torch.float64, torch.float32))
            atol = float(f"{20 * (exact - rough).abs().max().item():.2g}")
            print(call, atol, exact.std().item())
            some = exact.flatten()[::5].to(torch.float32).numpy().tobytes()
            write({"call": call, "atol": atol, "values": base64.b64encode(some).decode()})


main(sys.argv[1])
