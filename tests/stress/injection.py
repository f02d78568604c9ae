"""Hostile chats by the thousand against every tokenizer design: how many control ids come from content?

    python tests/stress/injection.py --examples 2000

Each design is attacked as its tokenizer flags its tokens, with all of them special, and with none: `examples`
chats in all. Exits with 1 if one control id was forged.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from builders import SHARED
from injection import Attack, Tally, hostile_texts
from tokenizer_designs import BUILDERS, TRICKY, Design, with_flags
from transformers import AutoTokenizer

FLAGS = ({}, {"special": True}, {"special": False})


def real() -> Design:
    """The shared model's own tokenizer and template."""
    tokenizer = AutoTokenizer.from_pretrained(str(SHARED / "models" / "chat-10m"))
    return Design("chat-10m", tokenizer, str(tokenizer.chat_template), "<|im_end|>", "<|im_end|>")


def attacked(design: Design, examples: int, seed: int) -> Tally:
    total = Tally()
    for number, flags in enumerate(FLAGS):
        under = Attack(with_flags(design, **flags))
        rng = random.Random(f"{design.name} {number} {seed}")
        texts = hostile_texts(rng, under.strings)
        for n in range(examples * (number + 1) // len(FLAGS) - examples * number // len(FLAGS)):
            under.run(rng.getrandbits(30), texts, spoken=n % 2 == 0)
        for name in ("chats", "texts", "forged", "refused"):
            setattr(total, name, getattr(total, name) + getattr(under.tally, name))
        total.seen += under.tally.seen
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--examples", type=int, default=2000, help="chats a design")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    builders = {**BUILDERS, **TRICKY}
    if (SHARED / "models" / "chat-10m").is_dir():
        builders["chat-10m"] = real
    print(f"{'design':16}{'chats':>8}{'refused':>9}{'hostile strings':>17}{'control ids from content':>26}")
    forged = 0
    for name, build in builders.items():
        tally = attacked(build(), options.examples, options.seed)
        forged += tally.forged
        print(f"{name:16}{tally.chats:8}{tally.refused:9}{tally.texts:17}{tally.forged:26}", flush=True)
        for chat in tally.seen[:1]:
            print(f"    {chat}")
    return int(forged > 0)


if __name__ == "__main__":
    sys.exit(main())
