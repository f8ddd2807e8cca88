# Makes edm_training.jsonl: python3 edm_training.py, with torch and diffusers (PYTHONPATH counts). What a pass of training is under EDM's
# noise, by diffusers' EDMEulerScheduler in float64: for a level the network's input and what it is told, and of a given output the error of
# the denoised latents, squared and weighed as the paper has it (Karras et al. 2022, table 1: lambda). x0 is (i - 3.5) / 4, i from 0 to 7,
# times sigma_data, the noise ((3 i) mod 8 - 3.5) / 2, the output ((5 i) mod 8 - 3.5) / 3.
import json
import os

import torch
from diffusers import EDMEulerScheduler

here = os.path.dirname(os.path.abspath(__file__))
COSXL = dict(prediction_type="v_prediction", sigma_schedule="exponential", sigma_data=1.0, sigma_min=0.002, sigma_max=120.0)
CONFIGS = [dict(), COSXL, dict(sigma_data=0.7, sigma_min=0.05, sigma_max=40.0, prediction_type="v_prediction", rho=5.0)]

i = torch.arange(8, dtype=torch.float64)
noise, output = ((3 * i) % 8 - 3.5) / 2, ((5 * i) % 8 - 3.5) / 3
with open(os.path.join(here, "edm_training.jsonl"), "w") as file:
    for config in CONFIGS:
        scheduler = EDMEulerScheduler(**config)
        data = scheduler.config.sigma_data
        x0 = (i - 3.5) / 4 * data
        layout = scheduler._compute_karras_sigmas if scheduler.config.sigma_schedule == "karras" else scheduler._compute_exponential_sigmas
        sigmas = layout(torch.linspace(0, 1, 1000, dtype=torch.float64)).double().flip(0)
        for t in [0, 1, 250, 640, 998, 999]:
            sigma = sigmas[t]
            noisy = x0 + sigma * noise
            denoised = scheduler.precondition_outputs(noisy, output, sigma)
            weight = (sigma**2 + data**2) / (sigma * data) ** 2
            line = dict(
                config=config,
                level=t,
                sample=scheduler.precondition_inputs(noisy, sigma).tolist(),
                told=scheduler.precondition_noise(sigma).item(),
                errors=(weight * (denoised - x0) ** 2).tolist(),
            )
            file.write(json.dumps(line) + "\n")
