# Makes lllite.jsonl: python3 lllite.py, with torch, transformers, Pillow, diffusers and kohya's sd-scripts (PYTHONPATH counts). Latents of whole
# calls of diffusers' pipelines, whose UNet has kohya's LLLiteModules beside its projections, by the original's names of blocks; where there are
# several, each adds to the same x. Every fifth number in float64, and `atol` twenty times what float32 is off.
import sys
import types

import diffusers
import numpy as np
import torch
from formulas import fill
from recorded import call, full_controlnet, here, noted, picture, write

library = types.ModuleType("library")
library.model_util, library.sdxl_original_unet = None, types.SimpleNamespace(SdxlUNet2DConditionModel=None)
utils = types.ModuleType("library.utils")
utils.setup_logging = lambda: None
sys.modules.update({"library": library, "library.utils": utils})
from networks.control_net_lllite import LLLiteModule

# The original's rows of blocks with attention, by diffusers' names; kohya's depths are told by these.
DOWN = {f"down_blocks.{i}.attentions.{j}": (f"input_blocks.{1 + 3 * i + j}.1", i + 1) for i in (1, 2) for j in (0, 1)}
UP = {f"up_blocks.{i}.attentions.{j}": (f"output_blocks.{3 * i + j}.1", 3 - i) for i in (0, 1) for j in (0, 1, 2)}
MIDDLE = {"mid_block.attentions.0": ("middle_block.1", 3)}
# What kohya's script makes, and all that sd-webui-controlnet runs.
NETS = dict(edges=(8, 12, {**DOWN, **MIDDLE}), everywhere=(6, 7, {**DOWN, **MIDDLE, **UP}))
SETTINGS = dict(prompt="a red fox in the snow", negative_prompt="rain", num_inference_steps=5, guidance_scale=5, height=64, width=64)
# The kind, nets with their pictures, scales and parts of the steps, and the rest of the call.
CALLS = [
    ("text2img", [("edges", (1, 64, 64), 1, 0, 1)], dict(num_images_per_prompt=2)),
    ("text2img", [("everywhere", (2, 96, 64), 0.6, 0, 1)], dict(width=96, guidance_scale=1, scheduler="DPMSolverMultistepScheduler")),
    ("text2img", [("edges", (1, 64, 64), 1, 0.2, 0.8)], dict()),
    ("text2img", [("edges", (1, 64, 64), 0.7, 0, 1), ("everywhere", (3, 64, 64), -0.5, 0, 0.6)], dict()),
    ("text2img", [("edges", (1, 64, 64), 1, 0, 1), ("edges", (3, 64, 64), 0.4, 0, 1)], dict()),
    ("controlled", [("edges", (2, 64, 64), 0.8, 0, 1)], dict(controlnet_conditioning_scale=0.8)),
    ("img2img", [("everywhere", (1, 64, 64), 0.8, 0, 1)], dict(strength=0.8)),
    ("perturbed", [("edges", (1, 64, 64), 1, 0, 1)], dict(pag_scale=3)),
]


def modules_of(name, unet, dtype):
    """By kohya's names."""
    emb, mlp, blocks = NETS[name]
    made = {}
    for path, module in unet.named_modules():
        block = next((block for block in blocks if path.startswith(f"{block}.")), None)
        if block is None or not path.endswith(("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q")):
            continue
        original, depth = blocks[block]
        key = f"lllite_unet_{original}{path[len(block):]}".replace(".", "_")
        each = LLLiteModule(depth, emb, key, module, mlp)
        # Keys stand behind the module's own name in a file.
        torch.nn.ModuleDict({key: each}).load_state_dict(fill(torch.nn.ModuleDict({key: each}), name).state_dict())
        made[key] = each.to(dtype)
    return made


def added(module, x, scale):
    seen = module.cond_emb.repeat(x.shape[0] // module.cond_emb.shape[0], 1, 1)
    return scale * module.up(module.mid(torch.cat([seen, module.down(x)], dim=2)))


def steer(pipeline, nets, dtype):
    """Has each projection read x and what the nets that are on add to it; gives what is called before each step."""
    beside, on = {}, [True] * len(nets)
    for k, (name, of, scale, *_) in enumerate(nets):
        pixels = torch.from_numpy(np.asarray(picture(*of), dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)[None].to(dtype)
        for module in modules_of(name, pipeline.unet, dtype).values():
            module.set_cond_image(pixels)
            beside.setdefault(module.org_module[0], []).append((k, module, scale))
    for linear, all in beside.items():
        if len(all) == 1 and all[0][2] == 1:  # that this is what kohya's forward does
            x = torch.sin(torch.arange(2 * all[0][1].cond_emb.shape[1] * linear.in_features, dtype=dtype)).reshape(2, -1, linear.in_features)
            all[0][1].org_forward = linear.forward
            assert torch.equal(all[0][1].forward(x), linear.forward(x + added(all[0][1], x, 1)))
        hook = lambda linear, args, all=all: (args[0] + sum(added(module, args[0], scale) for k, module, scale in all if on[k]),)
        linear.register_forward_pre_hook(hook)

    def before(i, steps):
        on[:] = [i / steps >= start and (i + 1) / steps <= end for *_, start, end in nets]

    return before


def opened(kind, dtype):
    load = lambda made, **more: made.from_pretrained(f"{here}/tiny-sdxl", torch_dtype=torch.float32, **more)
    if kind == "controlled":
        parts = load(diffusers.StableDiffusionXLPipeline).components
        net = full_controlnet(parts["unet"], dtype)
        return diffusers.StableDiffusionXLControlNetPipeline(**parts, controlnet=net).to(dtype)
    kinds = dict(img2img=diffusers.StableDiffusionXLImg2ImgPipeline, perturbed=diffusers.StableDiffusionXLPAGPipeline)
    return load(kinds.get(kind, diffusers.StableDiffusionXLPipeline)).to(dtype)


def drawn(kind, nets, seed, dtype, settings):
    pipeline, settings = call(opened(kind, dtype), settings)
    before = steer(pipeline, nets, dtype)
    steps = settings["num_inference_steps"]
    if kind == "img2img":
        settings = {name: value for name, value in settings.items() if name not in ("height", "width")}
        settings["image"] = picture(4, 64, 64)
        steps = int(steps * settings["strength"])
    if kind == "controlled":
        settings["image"] = picture(1, 64, 64)
    before(0, steps)

    def after(_, i, __, more):
        before(i + 1, steps)
        return more

    generator = torch.Generator("cpu").manual_seed(seed)
    more = dict(callback_on_step_end=after, output_type="latent", generator=generator)
    return pipeline(**more, **settings).images.double().numpy()


def main():
    lines = []
    for name in NETS:
        unet = opened("text2img", torch.float32).unet
        made = torch.nn.ModuleDict(modules_of(name, unet, torch.float32))
        lines.append(dict(net=name, keys={key: list(value.shape) for key, value in made.state_dict().items()}))
    for seed, (kind, nets, more) in enumerate(CALLS):
        settings = {**SETTINGS, **more}
        rough, exact = (drawn(kind, nets, seed, dtype, settings) for dtype in (torch.float32, torch.float64))
        without = drawn(kind, [(name, of, 0, *part) for name, of, _, *part in nets], seed, torch.float64, settings)
        case = noted(rough, exact, 5)
        print(kind, nets, more, "atol", case["atol"], "from without", np.abs(exact - without).max())
        lines.append(dict(kind=kind, nets=nets, settings=settings, seed=seed, **case))
    write("lllite", lines)


if __name__ == "__main__":
    main()
