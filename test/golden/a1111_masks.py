# Makes a1111_masks.jsonl: python3 a1111_masks.py, with numpy, OpenCV (5.0.0) and Pillow (12.3.0). What A1111's processing.py does with a mask
# before and after it draws: the blur of its edge along both axes by OpenCV, what masking.fill puts where it marks (blurs and compositions
# of Pillow's), and the picture laid back under the mask at twice its levels. Inputs are formulas, results SHA-256 of their bytes.
import hashlib
import json
import os

import cv2
import numpy as np
from PIL import Image, ImageFilter, ImageOps

here = os.path.dirname(os.path.abspath(__file__))
text = lambda a: hashlib.sha256(np.ascontiguousarray(a).tobytes()).hexdigest()


def levels(count, factor):
    i = np.arange(count, dtype=np.int64)
    return ((factor * i * i + 31 * i) // 8 % 256).astype(np.uint8)


def blurred(mask, sigma):
    size = 2 * int(2.5 * sigma + 0.5) + 1
    return cv2.GaussianBlur(cv2.GaussianBlur(mask, (size, 1), sigma), (1, size), sigma)


def without(picture, mask):
    out = Image.new("RGBa", picture.size)
    out.paste(picture.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask))
    return out


def filled(picture, mask):
    known = without(picture, mask)
    out = Image.new("RGBA", picture.size)
    for radius, times in [(256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1)]:
        layer = known.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(times):
            out.alpha_composite(layer)
    return out.convert("RGB")


def laid_back(picture, mask, drawn):
    soft = np.clip(np.asarray(mask).astype(np.float32) * 2, 0, 255).astype(np.uint8)
    out = drawn.convert("RGBA")
    out.alpha_composite(without(picture, Image.fromarray(soft)).convert("RGBA"))
    return out.convert("RGB")


CASES = [  # width, height, sigma, the mask's box
    (24, 17, 2, (6, 5, 15, 12)),
    (17, 24, 4, (0, 0, 9, 24)),
    (300, 200, 4, (60, 50, 190, 170)),
    (9, 7, 16, (3, 2, 6, 5)),
    (123, 121, 0, (4, 3, 119, 118)),
    (1, 12, 3, (0, 4, 1, 9)),
    (6, 6, 5, (0, 0, 6, 6)),
]
with open(os.path.join(here, "a1111_masks.jsonl"), "w") as file:
    for w, h, sigma, (left, top, right, bottom) in CASES:
        picture, drawn = [levels(3 * w * h, factor).reshape(h, w, 3) for factor in (7, 5)]
        mask = np.zeros((h, w), np.uint8)
        grey = levels(w * h, 3).reshape(h, w)[top:bottom, left:right]
        mask[top:bottom, left:right] = np.where(grey < 32, grey, 255)
        soft = blurred(mask, sigma) if sigma else mask
        images = [Image.fromarray(each) for each in (picture, soft, drawn)]
        line = {
            "size": [w, h], "sigma": sigma, "box": [left, top, right, bottom],
            "blurred": text(soft), "filled": text(filled(*images[:2])), "laid_back": text(laid_back(*images)),
        }
        file.write(json.dumps(line) + "\n")
