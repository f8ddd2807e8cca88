# Makes lycoris.jsonl: python3 lycoris.py LYCORIS SD_SCRIPTS, with torch and peft, where the two are checkouts of KohakuBlueleaf/LyCORIS and
# kohya-ss/sd-scripts. What adapters compute and learn on one layer, in float64 (float32 in base64), by LyCORIS's modules, peft's layers,
# and kohya's LoRAModule with its draws replaced by formulas; what kohya's max-norm leaves of weights; and how LyCORIS's begin. Of the
# layer's tensors (weight, bias), x, dy and the adapter's, in this order, number i of the k-th is ((37 i + 11 k) mod 101 - 50) / 64.
import ast
import json
import math
import os
import sys

import torch
from adapter_layers import layer_of, numbers, packed

lycoris, scripts = sys.argv[1:]
sys.path.insert(0, lycoris)
from lycoris.functional import factorization
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from peft import LoHaConfig, LoKrConfig
from peft.tuners.loha.layer import Linear as PeftLoHa
from peft.tuners.lokr.layer import Conv2d as PeftLoKrConv, Linear as PeftLoKr

here = os.path.dirname(os.path.abspath(__file__))
torch.set_default_dtype(torch.float64)
# OFT takes (I - Q).float().inverse().
torch.Tensor.float = torch.Tensor.double
lines = []


def case(by, spec, module, names, run=None):
    """`names` are the trained tensors in the module, by the names that they are saved under."""
    x = numbers(spec["x"], 2).requires_grad_()
    tensors = [(saved, module.get_parameter(own)) for saved, own in names]
    with torch.no_grad():
        for k, (_, t) in enumerate(tensors):
            t.copy_(numbers(t.shape, 4 + k))
    y = (run or module)(x)
    dy = numbers(y.shape, 3)
    gradients = torch.autograd.grad((y * dy).sum(), [x, *(t for _, t in tensors)])
    shapes = [[saved, list(t.shape)] for saved, t in tensors]
    lines.append(dict(by=by, **spec, shapes=shapes, y=packed(y), dx=packed(gradients[0]), gradients=[packed(g) for g in gradients[1:]]))


def trained(module):
    return [(name, name) for name, p in module.named_parameters() if name.startswith(("hada", "lokr", "oft", "rescale"))]


LINEAR, CONV, POINT = [[10, 12], [2, 2, 12]], [[6, 4, 3, 3], [1, 4, 3, 4]], [[6, 8, 1, 1], [1, 8, 2, 3]]
OURS = dict(loha=LohaModule, lokr=LokrModule)
for algo, (weight, x), more in [
    ("loha", LINEAR, dict(rank=3, alpha=2)),
    ("loha", CONV, dict(rank=2, alpha=1, stride=2, padding=1)),
    ("loha", POINT, dict(rank=2, alpha=2)),
    ("lokr", LINEAR, dict(rank=2, alpha=1)),
    ("lokr", LINEAR, dict(rank=1, alpha=3, factor=4, decompose_both=True)),
    ("lokr", LINEAR, dict(rank=8, alpha=5, factor=7)),
    ("lokr", CONV, dict(rank=1, alpha=2, factor=2, padding=1)),
    ("lokr", CONV, dict(rank=4, alpha=2, stride=2, padding=1)),
    ("lokr", POINT, dict(rank=1, alpha=2, factor=2)),
]:
    spec = dict(algo=algo, weight=weight, x=x, **more)
    layer = layer_of(weight, more.get("stride", 1), more.get("padding", 0))
    options = {key: more[key] for key in ("factor", "decompose_both") if key in more}
    module = OURS[algo]("", layer, 1.0, more["rank"], more["alpha"], **options)
    module.apply_to()
    case("lycoris", spec, module, trained(module))

for (weight, x), more in [
    (([36, 4], [1, 2, 4]), dict(rank=6)),
    (LINEAR, dict(rank=-1, rescaled=True)),
    (CONV, dict(rank=3, stride=2, padding=1)),
    (POINT, dict(rank=3, rescaled=True)),
]:
    spec = dict(algo="oft", weight=weight, x=x, alpha=1, **more)
    module = DiagOFTModule("", layer_of(weight, more.get("stride", 1), more.get("padding", 0)), 1.0, more["rank"], rescaled=more.get("rescaled", False))
    module.apply_to()
    case("lycoris", spec, module, trained(module))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.1)
    inputs = numbers(x, 2)
    for _ in range(5):
        optimizer.zero_grad()
        y = module(inputs)
        (y * numbers(y.shape, 3)).sum().backward()
        optimizer.step()
    lines[-1]["after"] = [packed(module.get_parameter(name)) for name, _ in trained(module)]

PEFT = dict(loha=(PeftLoHa, LoHaConfig), lokr=(PeftLoKr, LoKrConfig))
for algo, (weight, x), more in [
    ("loha", LINEAR, dict(rank=3, alpha=2)),
    # Of 12 its factor 4 makes 4 and 3, LyCORIS's 3 and 4.
    ("lokr", LINEAR, dict(rank=1, alpha=3, factor=3, decompose_both=True)),
    ("lokr", CONV, dict(rank=1, alpha=2, factor=2, padding=1)),
]:
    spec = dict(algo=algo, weight=weight, x=x, **more)
    kind, config = PEFT[algo]
    kind = PeftLoKrConv if len(weight) == 4 else kind
    options = dict(decompose_factor=more["factor"], decompose_both=more.get("decompose_both", False)) if algo == "lokr" else {}
    layer = layer_of(weight, padding=more.get("padding", 0))
    module = kind(layer, "default", config(r=more["rank"], alpha=more["alpha"], **options), r=more["rank"], alpha=more["alpha"])
    names = [(name.split(".")[0], name) for name, p in module.named_parameters() if name.endswith(".default")]
    module.double()
    case("peft", spec, module, sorted(names))


def from_source(path, name, of=None):
    """A class or a method of a file that imports more than is there."""
    tree = ast.parse(open(os.path.join(scripts, path)).read())
    body = next(node.body for node in tree.body if getattr(node, "name", "") == of) if of else tree.body
    node = next(node for node in body if getattr(node, "name", "") == name)
    scope = dict(torch=torch, math=math)
    exec(compile(ast.Module([node], []), path, "exec"), scope)
    return scope[name]


LoRAModule = from_source("networks/lora.py", "LoRAModule")


class Draws:
    """Number i of the k-th call is ((7 i + 3 k) mod 16) / 16."""

    def __enter__(self):
        self.calls = 0
        self.before = torch.rand, torch.nn.functional.dropout
        torch.rand = self.rand
        torch.nn.functional.dropout = lambda x, p: x * (self.rand(x.shape) > p) / (1 - p)

    def __exit__(self, *_):
        torch.rand, torch.nn.functional.dropout = self.before

    def rand(self, *shape, device=None):
        shape = shape[0] if isinstance(shape[0], (tuple, torch.Size)) else shape
        self.calls += 1
        return torch.tensor([((7 * i + 3 * (self.calls - 1)) % 16) / 16 for i in range(math.prod(shape))]).reshape(shape)


for (weight, x), more in [
    (LINEAR, dict(network_dropout=0.3)),
    (LINEAR, dict(rank_dropout=0.4)),
    (CONV, dict(network_dropout=0.25, rank_dropout=0.4, stride=2, padding=1)),
]:
    spec = dict(algo="lora", weight=weight, x=x, rank=3, alpha=2, **more)
    layer = layer_of(weight, more.get("stride", 1), more.get("padding", 0))
    module = LoRAModule("", layer, 1.0, 3, 2, more.get("network_dropout"), more.get("rank_dropout"))
    module.apply_to()

    def run(x):
        with Draws():
            return module(x)

    case("kohya", spec, module, [("lora_down", "lora_down.weight"), ("lora_up", "lora_up.weight")], run)

# kohya's bound: half, and no word on what is below it.
apply_max_norm = from_source("networks/lora.py", "apply_max_norm_regularization", "LoRANetwork")
for weight, bound in [([10, 12], 1), ([10, 12], 60), ([6, 4, 3, 3], 1), ([6, 8, 1, 1], 1)]:
    o, i, *kernel = weight
    shapes = [[3, i, *kernel], [o, 3, *(1 for _ in kernel)]]
    down, up = (numbers(shape, 4 + k) for k, shape in enumerate(shapes))
    state = {"a.lora_down.weight": down, "a.lora_up.weight": up, "a.alpha": torch.tensor(2.0)}
    network = type("Network", (), dict(state_dict=lambda self: state))()
    apply_max_norm(network, bound, "cpu")
    lines.append(dict(by="max norm", weight=weight, rank=3, alpha=2, bound=bound, after=[packed(down), packed(up)]))

# How they begin: the spread of many numbers, and the greatest.
torch.manual_seed(0)
for algo, more in [("loha", {}), ("lokr", dict(factor=16, decompose_both=True)), ("lokr", dict(factor=4, rank=999))]:
    weight = [640, 320, 3, 3]
    rank = more.get("rank", 5)
    options = {key: value for key, value in more.items() if key != "rank"}
    module = OURS[algo]("", layer_of(weight, padding=1), 1.0, rank, 1, **options)
    starts = [[name, list(p.shape), p.std().item(), p.abs().max().item()] for name, p in module.named_parameters() if name.startswith(("hada", "lokr"))]
    lines.append(dict(by="starts", algo=algo, weight=weight, **{**more, "rank": rank}, starts=starts))

sides, factors = [12, 127, 128, 250, 320, 360, 640, 768, 1280, 2048], [-1, 1, 2, 4, 7, 8, 16, 40]
divided = [[factorization(side, factor) for factor in factors] for side in sides]
lines.append(dict(by="factorization", sides=sides, factors=factors, divided=divided))

with open(os.path.join(here, "lycoris.jsonl"), "w") as out:
    out.writelines(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
