"""Classify images with an ONNX file that 'dapt export' wrote; needs onnxruntime, numpy, Pillow.

Reads images of 8 bits as 'dapt predict' does; greyscale of 16 bits is to be scaled to 8 before.

python onnx_predict.py photos.onnx new/*.jpg
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

if len(sys.argv) < 3:
    sys.exit("usage: python onnx_predict.py MODEL.onnx IMAGE ...")
session = onnxruntime.InferenceSession(sys.argv[1])
metadata = session.get_modelmeta().custom_metadata_map
labels, seen = json.loads(metadata["labels"]), json.loads(metadata["preprocessing"])
size, how = seen["size"], getattr(Image.Resampling, seen["interpolation"].upper())
for path in sys.argv[2:]:
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if seen["resize_mode"] == "squash":
        image = image.resize((size, size), how)
    else:  # the short side, then the centre of the long one
        width, height = (int(size * side / min(image.size)) for side in image.size)
        left, top = round((width - size) / 2), round((height - size) / 2)
        image = image.resize((width, height), how).crop((left, top, left + size, top + size))
    pixels = (np.asarray(image, np.float32) / 255 - seen["mean"]) / seen["std"]  # (S, S, 3)
    batch = pixels.transpose(2, 0, 1)[None].astype(np.float32)  # (1, 3, S, S)
    probabilities = session.run(None, {"images": batch})[0][0]
    best = int(probabilities.argmax())
    print(f"{path}: {labels[best]} {probabilities[best]:.1%}")
