# Draws latents with diffusers: argv names a file of jobs, one JSON object a line, each a call of calls.ts with `out`, where
# its latents go. A model that is one file takes its configs from the folder `configs`.
import json
import os
import sys

try:
    import diffusers
    import torch
    from PIL import Image
    from safetensors.torch import load_file, save_file
except ImportError as error:
    print(f"absent: {error}")
    sys.exit(3)

torch.set_grad_enabled(False)
# The models are tiny: threads would wait for each other more than they work.
torch.set_num_threads(1)
diffusers.utils.logging.set_verbosity_error()
CLASSES = {
    "text2img": diffusers.StableDiffusionXLPipeline,
    "img2img": diffusers.StableDiffusionXLImg2ImgPipeline,
    "inpaint": diffusers.StableDiffusionXLInpaintPipeline,
    "edit": diffusers.StableDiffusionXLInstructPix2PixPipeline,
}
UNDER_CONTROL = {
    "text2img": diffusers.StableDiffusionXLControlNetPipeline,
    "img2img": diffusers.StableDiffusionXLControlNetImg2ImgPipeline,
    "inpaint": diffusers.StableDiffusionXLControlNetInpaintPipeline,
}
loaded = {}


def load(kind, model, configs, controls=(), pictures=(), followed=()):
    """The pipeline and its own scheduler, which a job may replace."""
    folders = tuple(folder for folder, *_ in controls)
    files = tuple(file for file, *_ in pictures)
    adapters = tuple(folder for folder, *_ in followed)
    key = (kind, model, folders, files, adapters)
    if key not in loaded:
        if model.endswith(".safetensors"):
            pipeline = CLASSES[kind].from_single_file(
                model, config=configs, local_files_only=True, torch_dtype=torch.float32
            )
        elif controls:
            nets = [diffusers.ControlNetModel.from_pretrained(each, torch_dtype=torch.float32) for each in folders]
            pipeline = UNDER_CONTROL[kind].from_pretrained(
                model, controlnet=nets if len(nets) > 1 else nets[0], torch_dtype=torch.float32
            )
        elif adapters:
            models = [diffusers.T2IAdapter.from_pretrained(each, torch_dtype=torch.float32) for each in adapters]
            pipeline = diffusers.StableDiffusionXLAdapterPipeline.from_pretrained(
                model, adapter=diffusers.MultiAdapter(models) if len(models) > 1 else models[0], torch_dtype=torch.float32
            )
        else:
            pipeline = CLASSES[kind].from_pretrained(model, torch_dtype=torch.float32)
        if files:
            names = [os.path.basename(file) for file in files]
            pipeline.load_ip_adapter(
                os.path.dirname(files[0]), subfolder="", weight_name=names, image_encoder_folder="image_encoder"
            )
        pipeline.set_progress_bar_config(disable=True)
        loaded[key] = (pipeline, pipeline.scheduler)
    return loaded[key]


def follow(kind, controls):
    """What a pipeline under control is called with."""
    if not controls:
        return {}
    one_or_all = lambda items: items if len(items) > 1 else items[0]
    images = one_or_all([Image.open(image).convert("RGB") for _, image, *_ in controls])
    scales = [scale for _, _, *scales in controls for scale in scales]
    return {
        "image" if kind == "text2img" else "control_image": images,
        **({"controlnet_conditioning_scale": one_or_all(scales)} if scales else {}),
    }


def follow_by_adapters(pipeline, followed):
    if not followed:
        return {}
    adapters = getattr(pipeline.adapter, "adapters", [pipeline.adapter])
    modes = ["L" if adapter.config.in_channels == 1 else "RGB" for adapter in adapters]
    one_or_all = lambda items: items if len(items) > 1 else items[0]
    return {
        "image": one_or_all([Image.open(image).convert(mode) for (_, image, *_), mode in zip(followed, modes)]),
        "adapter_conditioning_scale": one_or_all([scales[0] if scales else 1.0 for _, _, *scales in followed]),
    }


def draw(kind, model, job, generator, settings, controls=(), pictures=(), followed=(), **more):
    pipeline, own = load(kind, model, job.get("configs"), controls, pictures, followed)
    more.update(follow(kind, controls))
    more.update(follow_by_adapters(pipeline, followed))
    if pictures:
        pipeline.set_ip_adapter_scale([scales[0] if scales else 1.0 for _, _, *scales in pictures])
        more["ip_adapter_image"] = [Image.open(image).convert("RGB") for _, image, *_ in pictures]
    wanted = job.get("scheduler") or {}
    chosen = getattr(diffusers, wanted["class"]) if "class" in wanted else type(own)
    pipeline.scheduler = chosen.from_config(own.config, **wanted.get("config", {}))
    lists = {name: tuple(value) for name, value in settings.items() if isinstance(value, list)}
    images = {
        name: Image.open(settings[name]).convert(mode)
        for name, mode in (("image", "RGB"), ("mask_image", "L"))
        if name in settings
    }
    arguments = {**settings, **lists, **images, **more}
    return pipeline(generator=generator, output_type="latent", **arguments).images


def in_each_encoder(pipeline, call):
    for part, number in ("clip_l", ""), ("clip_g", "_2"):
        call(part, getattr(pipeline, f"text_encoder{number}"), getattr(pipeline, f"tokenizer{number}"))


def invert(pipeline, file, token):
    vectors = load_file(file)

    def add(part, encoder, tokenizer):
        pipeline.load_textual_inversion(vectors[part], token=token, text_encoder=encoder, tokenizer=tokenizer)
        # The config's 2 would have the pooled vector taken at the last new token.
        inner = getattr(encoder, "text_model", encoder)
        inner.eos_token_id = tokenizer.eos_token_id

    in_each_encoder(pipeline, add)


def revert(pipeline, token):
    def drop(_, encoder, tokenizer):
        pipeline.unload_textual_inversion(token, text_encoder=encoder, tokenizer=tokenizer)
        inner = getattr(encoder, "text_model", encoder)
        inner.eos_token_id = 2

    in_each_encoder(pipeline, drop)


for line in open(sys.argv[1]):
    job = json.loads(line)
    generator = torch.Generator("cpu").manual_seed(job["seed"])
    adapters = job.get("loras") or []
    if adapters:
        pipeline, _ = load(job["pipeline"], job["model"], job.get("configs"))
        names = [f"a{i}" for i in range(len(adapters))]
        for name, (file, _) in zip(names, adapters):
            pipeline.load_lora_weights(file, adapter_name=name)
        pipeline.set_adapters(names, [scale for _, scale in adapters])
    if "inversion" in job:
        pipeline, _ = load(job["pipeline"], job["model"], job.get("configs"))
        invert(pipeline, *job["inversion"])
    controls = job.get("controlnets") or []
    pictures = job.get("ipAdapters") or []
    followed = job.get("t2iAdapters") or []
    latents = draw(job["pipeline"], job["model"], job, generator, job["settings"], controls, pictures, followed)
    if "save" in job:
        load(job["pipeline"], job["model"], job.get("configs"))[0].save_pretrained(job["save"])
    if adapters:
        pipeline.unload_lora_weights()
    if "inversion" in job:
        revert(pipeline, job["inversion"][1])
    if job.get("refiner"):
        refiner = job["refiner"]
        latents = draw("img2img", refiner["model"], job, generator, refiner["settings"], image=latents)
    save_file({"latents": latents.float().contiguous()}, job["out"])
