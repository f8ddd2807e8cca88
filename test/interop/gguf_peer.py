# Reads a GGUF file with gguf's own reader: argv names the file and where its tensors go, in float32 and the shapes that ComfyUI-GGUF gives
# them. Its metadata, but for those shapes, go to stdout as JSON.
import json
import sys

try:
    import gguf
    import numpy as np
    from safetensors.numpy import save_file
except ImportError as error:
    print(f"absent: {error}")
    sys.exit(3)

path, out = sys.argv[1:]
reader = gguf.GGUFReader(path)
shapes = "comfy.gguf.orig_shape."
tensors = {}
for tensor in reader.tensors:
    laid_out = reader.get_field(shapes + tensor.name)
    shape = laid_out.contents() if laid_out else [int(size) for size in reversed(tensor.shape)]
    values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    tensors[tensor.name] = np.ascontiguousarray(values.reshape(shape))
save_file(tensors, out)
told = {key: field.contents() for key, field in reader.fields.items() if not key.startswith(("GGUF.", shapes))}
print(json.dumps({"metadata": told, "types": sorted({tensor.tensor_type.name for tensor in reader.tensors})}))
