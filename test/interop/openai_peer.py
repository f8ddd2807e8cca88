"""What OpenAI's own client makes of `sdxl serve`: pictures, an edit, a stream and an error, asked of the address given.

Writes the first picture to the path given and says what came, a JSON line. Exit status 3 where the client cannot be loaded.
"""

import base64
import json
import sys

try:
    from openai import BadRequestError, OpenAI
except ImportError as error:
    print(error)
    sys.exit(3)

url, image, out = sys.argv[1:]
client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
settings = {"model": "sdxl", "prompt": "a red fox", "size": "64x64"}
drawn = client.images.generate(**settings, n=2, extra_body={"seed": 5, "num_inference_steps": 3})
with open(out, "wb") as file:
    file.write(base64.b64decode(drawn.data[0].b64_json))
with open(image, "rb") as file:
    edited = client.images.edit(image=file, **settings)
events = client.images.generate(**settings, stream=True, partial_images=2)
told = {
    "pictures": len(drawn.data),
    "edited": len(edited.data),
    "events": [event.type for event in events],
    "models": [model.id for model in client.models.list()],
}
try:
    client.images.generate(**{**settings, "size": "65x64"})
except BadRequestError as error:
    told["error"] = error.body["message"]
print(json.dumps(told))
