# Makes prompt_schedule.jsonl: python3 prompt_schedule.py STABLE_DIFFUSION_WEBUI, with lark. What prompts that change with the steps are by
# get_learned_conditioning_prompt_schedules of A1111's modules/prompt_parser.py: the prompt, steps, those of a second pass or null, and each
# text behind its end. Some are those of its doctests, some lie at the edges of its grammar, others are made at random by it.
import json
import os
import random
import sys

sys.path.insert(0, sys.argv[1])
from modules.prompt_parser import get_learned_conditioning_prompt_schedules  # noqa: E402

WRITTEN = [
    "", "test", "a [b:3]", "a [b: 3]", "a [b:3 ] c", "a [[[b]]:2]", "[(a:2):3]", "a [b : c : 1] d", "a[b:[c:d:2]:1]e",
    "a [unbalanced", "a [b:.5] c", "a [{b|d{:.5] c", "((a][:b:c [d:3]", "[a|(b:1.1)]", "[fe|]male", "[fe|||]male", "[|a]",
    "a [b:c:1] d", "a [b:c:1.0] d", "a [b:c:1.5] d", "a [b:c:0] d", "a [b:c:0.0] d", "a [b:c:-2] d", "a [b:c:+2] d",
    "a [b:c:12] d", "a [b:c:5e-1] d", "a [b:c:2E0] d", "a [b:c:.3e1] d", "a [b:c:5.] d", "a [b::0.25] d", "a [:b:0.25] d",
    "[b:c:d:3]", "[b:c:three]", "[3]", "[:3]", "[::3]", "[a:3:5]", "[a:b]", "[a:]", "(a:b:3)", "[a:b|c:3]", "a | [b:c:3]",
    "(a|b) [c:d:3]", "[c:d:3] \\", "[a\\:b:c:3]", "\\[a:b:3\\]", "[a\\]:b:3]", "[a\\|b|c]", "[a:b:3\\]", "[a\n:b\n:\n0.5\n]",
    "a BREAK [b:c BREAK d:3]", "[[a|b]:[c|d|e]:4]", "[a|[b:c:5]|d]", "[(a:1.3)|[b]]", "([a:b:3])", "[a:b:3]]", "[[a:b:3]",
    "x) [c:d:3] [e:f:0.7]", ":) [c:d:3]", "[x: [c:d:3] y", "[q[c:d:3]w:b:z]", "[[c:b:1.5]::0.5]:",
    "[mountain:lake:0.25] and [an oak:a christmas tree:0.75][ in foreground::0.6][ in background:0.25] [shoddy:masterful:0.5]",
]


def made(depth: int) -> str:
    kind = random.random()
    if depth == 0 or kind < 0.25:
        return random.choice(["a", "b", "c d", " ", "", "x, y", "fox"])
    if kind < 0.45:
        return made(depth - 1) + made(depth - 1)
    when = random.choice(["0.5", "3", ".25", "1.5", "12", " 2", "0.75 ", "1", "1.0", "0", "2.", "7 "])
    if kind < 0.65:
        return f"[{made(depth - 1)}:{made(depth - 1)}:{when}]"
    if kind < 0.75:
        return f"[{made(depth - 1)}:{when}]"
    if kind < 0.85:
        return "[" + "|".join(made(depth - 1) for _ in range(random.randint(2, 4))) + "]"
    return random.choice(["({}:1.2)", "[{}]", "({})"]).format(made(depth - 1))


random.seed(3)
prompts = WRITTEN + [p for p in (made(4) for _ in range(90)) if "[" in p and len(p) > 12]
here = os.path.dirname(os.path.abspath(__file__))
with open(os.path.join(here, "prompt_schedule.jsonl"), "w") as file:
    for prompt in dict.fromkeys(prompts):
        for steps, hires_steps in ((10, None), (12, 7)):
            [schedule] = get_learned_conditioning_prompt_schedules([prompt], steps, hires_steps)
            file.write(json.dumps([prompt, steps, hires_steps, schedule], ensure_ascii=False) + "\n")
