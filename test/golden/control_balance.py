# Makes control_balance.jsonl: python3 control_balance.py, with torch, transformers, Pillow and diffusers (PYTHONPATH counts). Latents of whole
# calls of diffusers' pipeline with ControlNets whose features are weighed as hook.py of sd-webui-controlnet (003bcda0) weighs them in its
# control modes: 0.825 to the power of 12 - i, and for "ControlNet is more important" none of them where there is no prompt.
import diffusers
import torch
from recorded import call, full_controlnet, here, noted, picture, write

SETTINGS = dict(prompt="a red fox in the snow", negative_prompt="rain", num_inference_steps=4, guidance_scale=5)
CALLS = [
    dict(control_balance="more_prompt", controlnet_conditioning_scale=2.0),
    dict(control_balance="more_control", controlnet_conditioning_scale=2.0),
    dict(control_balance="more_control", guidance_scale=1, num_images_per_prompt=2),
    dict(control_balance=["more_control", "balanced"], controlnet_conditioning_scale=[2.0, 0.7]),
]


class Balanced(diffusers.ControlNetModel):
    def forward(self, *args, **more):
        down, middle = super().forward(*args, **{**more, "return_dict": False})
        if self.balance == "balanced":
            return down, middle
        features = [x * 0.825 ** (12 - i) for i, x in enumerate([*down, middle])]
        if self.balance == "more_control" and self.guided:
            features = [torch.cat([x[: len(x) // 2] * 0, x[len(x) // 2 :]]) for x in features]
        return features[:-1], features[-1]


def pipeline_of(dtype, balances, guided):
    parts = diffusers.StableDiffusionXLPipeline.from_pretrained(f"{here}/tiny-sdxl", torch_dtype=torch.float32).components
    nets = []
    for balance in balances:
        net = full_controlnet(parts["unet"], dtype)
        net.__class__ = Balanced
        net.balance, net.guided = balance, guided
        nets.append(net)
    return diffusers.StableDiffusionXLControlNetPipeline(**parts, controlnet=nets[0] if len(nets) == 1 else nets).to(dtype)


lines = []
for seed, more in enumerate(CALLS):
    balances = more["control_balance"] if isinstance(more["control_balance"], list) else [more["control_balance"]]
    pictures = [picture(1, 64, 64), picture(3, 64, 64)][: len(balances)]

    def drawn(dtype):
        settings = {**SETTINGS, **more}
        settings.pop("control_balance")
        pipeline, settings = call(pipeline_of(dtype, balances, settings["guidance_scale"] > 1), settings)
        generator = torch.Generator("cpu").manual_seed(seed)
        image = pictures if len(pictures) > 1 else pictures[0]
        return pipeline(generator=generator, output_type="latent", height=64, width=64, image=image, **settings).images.double().numpy()

    case = noted(drawn(torch.float32), drawn(torch.float64), 5)
    print(balances, case["atol"])
    lines.append(dict(kind="controlled", settings={**SETTINGS, **more}, seed=seed, **case))
write("control_balance", lines)
