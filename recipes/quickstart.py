"""The whole way in a few minutes: no network, no GPU, nothing downloaded.

A small chat model and preferences ("short and right" over "rambling") are made from a seed and kept for the
next time; then DPO on a 4-bit copy, held-out evaluation, answers before and after, and both exports.

    python recipes/quickstart.py [key=value ...]
"""

from lora_dpo import DPO, Adapter, Base, Data, Recipe, Training
from lora_dpo.quickstart import cache_folder

recipe = Recipe(
    base=Base(str(cache_folder() / "base")),
    data=Data(
        train=str(cache_folder() / "train.jsonl"), eval=str(cache_folder() / "eval.jsonl"), max_tokens=256
    ),
    loss=DPO(beta=0.5),
    adapter=Adapter(rank=16, alpha=32),
    training=Training(
        pairs_per_step=16, epochs=1, learning_rate=3e-4, eval_every=16, gradient_checkpointing="none"
    ),
    run_directory="runs/quickstart",
)

if __name__ == "__main__":
    from lora_dpo.cli import run
    from lora_dpo.quickstart import tour

    run(recipe, job=tour)
