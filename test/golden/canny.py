# Makes canny.jsonl: python3 canny.py, with numpy and OpenCV (5.0.0). Edges of noise, of smoothed noise, which has long ones, and of
# shapes with slopes of every direction, as bits: 1 is an edge.
import base64
import json
import os

import cv2
import numpy as np

here = os.path.dirname(os.path.abspath(__file__))
random = np.random.default_rng(7)
text = lambda a: base64.b64encode(np.ascontiguousarray(a).tobytes()).decode()


def shapes(h, w):
    y, x = np.mgrid[0:h, 0:w]
    r = np.hypot(x - w / 2.3, y - h / 1.9)
    return np.stack([127 + 120 * np.sin(r / 3), 255 * ((x * 3 + y * 2) % 23 < 11), 8 * x - 3 * y], -1).clip(0, 255).astype(np.uint8)


noise = lambda h, w: random.integers(0, 256, (h, w, 3), np.uint8)
smooth = lambda h, w: cv2.GaussianBlur(noise(h, w), (0, 0), 1.2)
CASES = [
    (noise(9, 12), 100, 200),
    (smooth(40, 33), 100, 200),
    (smooth(40, 33), 40, 90.5),
    (shapes(31, 47), 100, 200),
    (shapes(31, 47), 0, 30),
    (noise(1, 7), 10, 20),
    (noise(6, 1), 10, 20),
    (np.repeat(smooth(20, 20)[:, :, :1], 3, 2), 30, 60),
]
with open(os.path.join(here, "canny.jsonl"), "w") as file:
    for picture, low, high in CASES:
        edges = cv2.Canny(picture, low, high)
        assert set(np.unique(edges)) <= {0, 255}
        h, w = edges.shape
        line = {"size": [w, h], "low": low, "high": high, "picture": text(picture), "edges": text(np.packbits(edges > 0))}
        file.write(json.dumps(line) + "\n")
        print(line["size"], int((edges > 0).sum()))
