"""Makes dpo_esd.jsonl: losses over tiny-sdxl beside itself as it was loaded, and their gradients: of Diffusion-DPO as diffusers'
train_diffusion_dpo_sdxl.py has it, and of ESD as Gandikota et al. 2023 and diffengine have it, without a caption zeros.

    PYTHONPATH=DIFFUSERS/src python test/golden/dpo_esd.py test/golden/tiny-sdxl > test/golden/dpo_esd.jsonl

Inputs and what is trained are the formulas of test/support/controlnet_golden.ts. `lora`: adapters as the script puts them on, with A and B of
numbers(key) / 8 and / 16; `unet`: the UNet's own weights, times 1 + numbers(key) / 32, beside those it was loaded with. A first line for
each method and target has the loss, in float64, and how far float32's gradients are off; each further line a parameter's gradient: its
norm, and its sum with the formula's numbers of that name as factors. Of the parameters every STRIDE-th is told.
"""
import copy
import json
import sys

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from formulas import folded, numbers
from peft import LoraConfig

PAIRS, HEIGHT, WIDTH = 2, 8, 12
BETA_DPO, NEGATIVE_GUIDANCE = 200, 1.5
STRIDE = dict(lora=7, unet=23)


def trained(folder, target):
    """The network, its parameters by key, and the network that it is held against."""
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32).requires_grad_(False)
    reference = copy.deepcopy(unet)
    if target == "lora":
        unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
        named = {k.replace(".default", ""): p for k, p in unet.named_parameters() if "lora_" in k}
        values = {k: numbers(k, *p.shape) / (8 if "lora_A" in k else 16) for k, p in named.items()}
    else:
        named = dict(unet.named_parameters())
        values = {k: p.double() * (1 + numbers(k, *p.shape) / 32) for k, p in named.items()}
    with torch.no_grad():
        for key, p in named.items():
            p.copy_(values[key])  # rounded to float32, as in ours
    for p in named.values():
        p.requires_grad_(True)
    return unet, named, reference


def dpo(unet, reference, noise):
    def losses(said):
        squares = F.mse_loss(said, noise, reduction="none")
        return squares.mean(dim=list(range(1, squares.ndim)))

    model_w, model_l = losses(unet()).chunk(2)
    with torch.no_grad():
        ref_w, ref_l = losses(reference()).chunk(2)
    inside = -0.5 * BETA_DPO * ((model_w - model_l) - (ref_w - ref_l))
    print("the sigmoids are given", inside.tolist(), file=sys.stderr)
    return -1 * F.logsigmoid(inside).mean()


def esd(unet, reference, noise):
    with torch.no_grad():
        free, named = reference(0), reference()
    return F.mse_loss(unet(), free - NEGATIVE_GUIDANCE * (named - free))


def batch(folder, dtype):
    """The timesteps and noise of a pass, and what a network says there."""
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    latents = numbers("latents", 2 * PAIRS, 4, HEIGHT, WIDTH).to(dtype)
    noise = numbers("noise", PAIRS, 4, HEIGHT, WIDTH).to(dtype).repeat(2, 1, 1, 1)
    timesteps = torch.tensor([107, 803]).repeat(2)
    seen = scheduler.add_noise(latents, noise, timesteps)
    context = numbers("encoder_hidden_states", PAIRS, 77, 80).to(dtype).repeat(2, 1, 1)
    pooled = numbers("text_embeds", PAIRS, 40).to(dtype).repeat(2, 1)
    sizes = torch.tensor([[64, 96, 0, 0, 64, 96], [80, 100, 8, 2, 64, 96]], dtype=dtype).repeat(2, 1)

    def saying(net):
        return lambda told=1: net(
            seen, timesteps, context * told, added_cond_kwargs=dict(text_embeds=pooled * told, time_ids=sizes)
        ).sample

    return scheduler.alphas_cumprod[timesteps].to(dtype), noise, saying


def compute(folder, method, target, dtype):
    unet, named, reference = trained(folder, target)
    unet, reference = unet.to(dtype), reference.to(dtype)
    _, noise, saying = batch(folder, dtype)
    loss = method(saying(unet), saying(reference), noise)
    loss.backward()
    return loss.item(), {k: p.grad.double().clone() for k, p in named.items()}


def tell(name, target, stride, computed):
    """The lines of what `computed` gives in a type."""
    rms = lambda t: t.pow(2).mean().sqrt()
    _, rough = computed(torch.float32)
    loss, exact = computed(torch.float64)
    chosen = list(exact)[::stride]
    noise = max((rms(rough[k] - exact[k]) / rms(exact[k])).item() for k in chosen)
    about = dict(method=name, target=target, loss=loss, count=len(exact), noise=float(f"{noise:.2g}"))
    print(json.dumps(about, separators=(",", ":")))
    print(about, len(chosen), file=sys.stderr)
    for key in chosen:
        print(json.dumps([name, target, key, *folded(exact[key], key)], separators=(",", ":")))


if __name__ == "__main__":
    for method in dpo, esd:
        for target, stride in STRIDE.items():
            tell(method.__name__, target, stride, lambda dtype: compute(sys.argv[1], method, target, dtype))
