# Draws latents with diffusers from one of our exports: argv is a JSON object with what to load and how to sample.
import json
import sys

try:
    import torch
    from diffusers import StableDiffusionXLPipeline
    from safetensors.torch import save_file
except ImportError as error:
    print(f"absent: {error}")
    sys.exit(3)

job = json.loads(sys.argv[1])
torch.set_grad_enabled(False)
if job["model"].endswith(".safetensors"):
    pipeline = StableDiffusionXLPipeline.from_single_file(
        job["model"], config=job["configs"], local_files_only=True, torch_dtype=torch.float32
    )
else:
    pipeline = StableDiffusionXLPipeline.from_pretrained(job["model"], torch_dtype=torch.float32)
pipeline.set_progress_bar_config(disable=True)
if job.get("lora"):
    pipeline.load_lora_weights(job["lora"])
latents = pipeline(
    job["prompt"],
    width=job["width"],
    height=job["height"],
    num_inference_steps=job["steps"],
    guidance_scale=job["guidance_scale"],
    generator=torch.Generator("cpu").manual_seed(job["seed"]),
    output_type="latent",
).images
save_file({"latents": latents.contiguous()}, job["out"])
print("done")
