# Makes textual_inversion_training.jsonl: PYTHONPATH=DIFFUSERS/src python3 textual_inversion_training.py, with torch and transformers. The
# vectors of "<toy>" behind tiny-sdxl's text encoders as a script trains them: the whole tables get gradients and steps, and the other rows
# are put back. For each encoder how they begin (kohya's way, from a word of fewer tokens), the gradient of the first pass, and where four
# steps of AdamW take them, in float64 (float32 in base64), with `noise`, by how much float32 is off. Passes are all the same: captions
# below, inputs by formula. Pooled vectors are taken at the true EOS, as kohya's; the published config's 2 would find the last new token.
import base64
import json
import os

import torch
from diffusers import StableDiffusionXLPipeline

here = os.path.dirname(os.path.abspath(__file__))
TOKEN, WORD, COUNT = "<toy>", "a fox", 3
CAPTIONS = ["a photo of <toy>", "a <toy> in the style of <toy>, red"]
EOS = 1999


def told(t):
    return base64.b64encode(t.detach().to(torch.float32).contiguous().numpy().tobytes()).decode()


def numbers(step, *shape):
    """Channels last, as (((step i + floor(i / 7)) mod 129) - 64) / 64 has them."""
    n, h, w, c = shape
    i = torch.arange(n * h * w * c)
    return ((((step * i + i // 7) % 129) - 64) / 64).double().reshape(shape).permute(0, 3, 1, 2)


def train(dtype):
    pipe = StableDiffusionXLPipeline.from_pretrained(f"{here}/tiny-sdxl", torch_dtype=dtype)
    pipe.unet.requires_grad_(False)
    names = [TOKEN] + [f"{TOKEN}_{i}" for i in range(1, COUNT)]
    pairs = [(pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)]
    tables, ids, begun = [], [], []
    for tokenizer, encoder in pairs:
        words = tokenizer.encode(WORD, add_special_tokens=False)
        assert tokenizer.add_tokens(names) == COUNT and 1 < len(words) < COUNT, words
        ids.append(tokenizer.convert_tokens_to_ids(names))
        encoder.resize_token_embeddings(len(tokenizer))
        encoder.requires_grad_(False)
        inner = encoder.text_model if hasattr(encoder, "text_model") else encoder
        inner.eos_token_id = EOS
        table = encoder.get_input_embeddings().weight.requires_grad_(True)
        with torch.no_grad():
            for k, at in enumerate(ids[-1]):
                table[at] = table[words[k % len(words)]]
        tables.append(table)
        begun.append(table[ids[-1]].detach().clone())
    texts = [caption.replace(TOKEN, " ".join(names)) for caption in CAPTIONS]
    frozen = [table.detach().clone() for table in tables]
    optimizer = torch.optim.AdamW(tables, lr=0.01, weight_decay=0.1)
    gradients = None
    for _ in range(4):
        said = []
        for tokenizer, encoder in pairs:
            given = tokenizer(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
            said.append(encoder(given, output_hidden_states=True))
        predicted = pipe.unet(
            numbers(5, 2, 8, 8, 4).to(dtype),
            torch.tensor([7, 803]),
            encoder_hidden_states=torch.cat([each.hidden_states[-2] for each in said], dim=-1),
            added_cond_kwargs=dict(
                text_embeds=said[1].text_embeds,
                time_ids=torch.tensor([[64, 96, 0, 0, 64, 64], [80, 100, 8, 2, 64, 64]], dtype=dtype),
            ),
        ).sample
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(predicted, numbers(3, 2, 8, 8, 4).to(dtype)).backward()
        gradients = gradients or [table.grad[rows].clone() for table, rows in zip(tables, ids)]
        optimizer.step()
        with torch.no_grad():
            for table, whole, rows in zip(tables, frozen, ids):
                kept = torch.ones(len(table), dtype=torch.bool)
                kept[rows] = False
                table[kept] = whole[kept]
    return begun, gradients, [table[rows].detach() for table, rows in zip(tables, ids)]


exact, rough = train(torch.float64), train(torch.float32)
with open(os.path.join(here, "textual_inversion_training.jsonl"), "w") as out:
    for k, name in enumerate(["clip_l", "clip_g"]):
        begun, gradient, after = (part[k] for part in exact)
        noise = [(part[k] - whole[k]).abs().max().item() for part, whole in zip(rough[1:], exact[1:])]
        print(name, list(begun.shape), gradient.abs().max().item(), (after - begun).abs().max().item(), noise)
        line = dict(name=name, token=TOKEN, word=WORD, captions=CAPTIONS, begun=told(begun), gradient=told(gradient), after=told(after))
        out.write(json.dumps({**line, "noise": [float(f"{x:.2g}") for x in noise]}, separators=(",", ":")) + "\n")
