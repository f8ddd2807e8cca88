# Makes prodigy.jsonl: python3 prodigy.py, with torch and prodigyopt (PYTHONPATH counts). What prodigyopt's Prodigy does in float64 with
# weights whose gradients pull them to a target, under some jitter: by case the options, the schedule of the learning rate, d after every
# third step, and the weights after the last one. `noise` is how far float32 is off, the most of d (relative) and of weights.
import json
import math
import os

import torch
from prodigyopt import Prodigy

here = os.path.dirname(os.path.abspath(__file__))
SHAPES = [(3, 4), (2, 2, 3, 3), (5,), (4, 2)]
STEPS = 60


def begin(k, i):
    # Small, so that float32 sees the first steps, of a millionth; the last one zeros, as half of a LoRA.
    return 0.0 if k == 3 else math.cos(1 + 0.7 * i + k) / 256


def gradient(k, step, i, w):
    target = 0.5 * math.sin(2 + 1.1 * i + k)
    return 0.02 * (1 + (i % 3)) * (w - target) + 0.003 * math.sin(1 + 1.3 * i + k + 2.1 * step)


# As diffusers' get_scheduler; cosine with 5 steps of warm-up, the first at a rate of 0.
RATES = {
    "constant": lambda step: 1,
    "linear": lambda step: 1 - step / STEPS,
    "cosine": lambda step: step / 5 if step < 5 else 0.5 * (1 + math.cos(math.pi * (step - 5) / (STEPS - 5))),
}


CASES = [
    ("plain", 1, "constant", {}),
    (
        "as guides say",
        1,
        "cosine",
        dict(betas=(0.9, 0.99), weight_decay=0.5, d_coef=2.0, use_bias_correction=True, safeguard_warmup=True),
    ),
    ("warm-up without its safeguard", 1, "cosine", dict(weight_decay=0.1, use_bias_correction=True)),
    ("bounded", 0.5, "constant", dict(beta3=0.9, growth_rate=1.3, d0=1e-4, eps=1e-3, weight_decay=0.2)),
    ("falling", 1, "linear", dict(betas=(0.5, 0.95), d0=1e-3, d_coef=0.5, weight_decay=0.1)),
]


def run(lr, rate, options, dtype):
    weights = [torch.tensor([begin(k, i) for i in range(math.prod(s))], dtype=dtype).reshape(s) for k, s in enumerate(SHAPES)]
    weights = [torch.nn.Parameter(w) for w in weights]
    optimizer = Prodigy(weights, lr=1.0, **options)
    group = optimizer.param_groups[0]
    ds = []
    for step in range(STEPS):
        for k, w in enumerate(weights):
            values = [gradient(k, step, i, x) for i, x in enumerate(w.detach().flatten().tolist())]
            w.grad = torch.tensor(values, dtype=dtype).reshape(w.shape)
        group["lr"] = lr * rate(step)
        optimizer.step()
        ds.append(group["d"])
    return ds[2::3], [x for w in weights for x in w.detach().flatten().tolist()]


lines = []
for name, lr, schedule, options in CASES:
    (ds, weights), (ds32, weights32) = (run(lr, RATES[schedule], options, dtype) for dtype in (torch.float64, torch.float32))
    noise = [max(abs(a / b - 1) for a, b in zip(ds32, ds)), max(abs(a - b) for a, b in zip(weights32, weights))]
    short = lambda values, digits: [float(f"%.{digits}g" % x) for x in values]
    line = dict(id=name, lr=lr, schedule=schedule, options=options, d=short(ds, 8))
    lines.append({**line, "weights": short(weights, 8), "noise": short(noise, 2)})
    print(name, noise, ds[::4])
with open(os.path.join(here, "prodigy.jsonl"), "w") as out:
    out.writelines(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
