# Makes mask_crop.jsonl: python3 mask_crop.py, with torch, Pillow and diffusers (PYTHONPATH counts). What diffusers' inpainting pipelines
# do with padding_mask_crop: the part cut out, as the VAE's and the mask's processors resize it, and the picture laid back. Bytes in
# base64: the picture, its mask, what was drawn, and the results.
import base64
import json
import os

import numpy as np
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

here = os.path.dirname(os.path.abspath(__file__))
vae = VaeImageProcessor(vae_scale_factor=8)
masks = VaeImageProcessor(vae_scale_factor=8, do_normalize=False, do_binarize=True, do_convert_grayscale=True)
text = lambda a: base64.b64encode(np.ascontiguousarray(a).tobytes()).decode()

CASES = [
    # picture w, h; what is drawn w, h; padding; the mask's box left, top, right, bottom
    (21, 15, 16, 8, 2, (5, 4, 10, 8)),
    (15, 21, 8, 16, 0, (1, 1, 5, 3)),
    (17, 15, 16, 8, 3, (0, 12, 17, 15)),
    (10, 22, 24, 8, 1, (2, 3, 9, 20)),  # wider than the picture allows: filled beside
    (22, 10, 8, 24, 1, (3, 2, 20, 9)),  # higher: filled above and below
    (12, 12, 16, 16, 40, (0, 0, 12, 12)),
    (13, 12, 8, 8, 1, (6, 5, 7, 6)),
    (19, 18, 24, 16, 2, (15, 14, 19, 18)),
]

lines = []
random = np.random.default_rng(5)
for w, h, width, height, pad, (left, top, right, bottom) in CASES:
    picture = Image.fromarray(random.integers(0, 256, (h, w, 3), np.uint8))
    grey = np.zeros((h, w), np.uint8)
    grey[top:bottom, left:right] = random.choice([255, 255, 255, 0, 1, 90, 127, 128, 200, 254], (bottom - top, right - left))
    grey[top, left] = grey[bottom - 1, right - 1] = 255
    mask = Image.fromarray(grey)
    drawn = Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))
    window = masks.get_crop_region(mask, width, height, pad=pad)
    image = vae.preprocess(picture, height=height, width=width, crops_coords=window, resize_mode="fill")
    part = masks.preprocess(mask, height=height, width=width, crops_coords=window, resize_mode="fill")
    lines.append(dict(
        size=[w, h], drawn_size=[width, height], padding_mask_crop=pad, crops_coords=list(window),
        picture=text(picture), mask=text(mask), drawn=text(drawn),
        part=text(np.round((image[0].permute(1, 2, 0).numpy() + 1) * 127.5).astype(np.uint8)),
        mask_part=text(part[0, 0].numpy().astype(np.uint8)),
        overlay=text(vae.apply_overlay(mask, picture, drawn, window)),
    ))

with open(os.path.join(here, "mask_crop.jsonl"), "w") as file:
    for line in lines:
        file.write(json.dumps(line) + "\n")
