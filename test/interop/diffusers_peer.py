# Draws latents with diffusers: argv names a file of jobs, one JSON object a line, each a call of calls.ts with `out`, where
# its latents go. A model that is one file takes its configs from the folder `configs`.
import json
import sys

try:
    import diffusers
    import torch
    from PIL import Image
    from safetensors.torch import save_file
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
}
loaded = {}


def load(kind, model, configs):
    """The pipeline and its own scheduler, which a job may replace."""
    if (kind, model) not in loaded:
        if model.endswith(".safetensors"):
            pipeline = CLASSES[kind].from_single_file(
                model, config=configs, local_files_only=True, torch_dtype=torch.float32
            )
        else:
            pipeline = CLASSES[kind].from_pretrained(model, torch_dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        loaded[kind, model] = (pipeline, pipeline.scheduler)
    return loaded[kind, model]


def draw(kind, model, job, generator, settings, **more):
    pipeline, own = load(kind, model, job.get("configs"))
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
    latents = draw(job["pipeline"], job["model"], job, generator, job["settings"])
    if "save" in job:
        load(job["pipeline"], job["model"], job.get("configs"))[0].save_pretrained(job["save"])
    if adapters:
        pipeline.unload_lora_weights()
    if job.get("refiner"):
        refiner = job["refiner"]
        latents = draw("img2img", refiner["model"], job, generator, refiner["settings"], image=latents)
    save_file({"latents": latents.float().contiguous()}, job["out"])
