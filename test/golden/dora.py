# Makes dora.jsonl: python3 dora.py, with torch and peft. What peft's DoRA computes on one layer, its gradients, and where five steps of
# torch's AdamW take it, in float64 (float32 in base64). Of the layer's tensors (weight, bias), x, dy and A, B, number i of the k-th is
# ((37 i + 11 k) mod 101 - 50) / 64; of the magnitude, the sixth, 1 + half of that.
import json
import os

import torch
from adapter_layers import layer_of, numbers, packed
from peft import LoraConfig
from peft.tuners.lora.layer import Conv2d, Linear

here = os.path.dirname(os.path.abspath(__file__))
torch.set_default_dtype(torch.float64)
lines = []


for weight, x, more in [
    ([10, 12], [2, 2, 12], dict(rank=3, alpha=2)),
    ([6, 4, 3, 3], [1, 4, 3, 4], dict(rank=2, alpha=1, stride=2, padding=1)),
    ([6, 8, 1, 1], [1, 8, 2, 3], dict(rank=2, alpha=2)),
]:
    layer = layer_of(weight, more.get("stride", 1), more.get("padding", 0))
    config = LoraConfig(r=more["rank"], lora_alpha=more["alpha"], use_dora=True)
    module = (Conv2d if len(weight) == 4 else Linear)(layer, "default", config=config, r=more["rank"], lora_alpha=more["alpha"]).double()
    trained = [
        ("lora_A.weight", module.lora_A["default"].weight),
        ("lora_B.weight", module.lora_B["default"].weight),
        ("lora_magnitude_vector", module.lora_magnitude_vector["default"].weight),
    ]
    start = packed(trained[2][1])
    with torch.no_grad():
        for k, (_, t) in enumerate(trained):
            t.copy_(numbers(t.shape, 4 + k) if k < 2 else 1 + numbers(t.shape, 6) / 2)
    inputs = numbers(x, 2).requires_grad_()
    y = module(inputs)
    dy = numbers(y.shape, 3)
    gradients = torch.autograd.grad((y * dy).sum(), [inputs, *(t for _, t in trained)])
    optimizer = torch.optim.AdamW([t for _, t in trained], lr=0.01, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (module(inputs) * dy).sum().backward()
        optimizer.step()
    lines.append(
        dict(
            by="peft",
            algo="lora",
            use_dora=True,
            weight=weight,
            x=x,
            **more,
            start=start,
            shapes=[[name, list(t.shape)] for name, t in trained],
            y=packed(y),
            dx=packed(gradients[0]),
            gradients=[packed(g) for g in gradients[1:]],
            after=[packed(t) for _, t in trained],
        )
    )

with open(os.path.join(here, "dora.jsonl"), "w") as out:
    out.writelines(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
