"""Iterative DPO, the whole way in minutes: no network, no GPU, nothing downloaded.

On the quickstart's base: 300 pairs of its own responses are labelled by a rule, a reward model is trained on
them, and then come three rounds: 8 responses to each prompt, rewards, best against worst, DPO against last
round's policy, and a look at held-out prompts. The rule itself is never asked again but to keep count.

    python recipes/iterative_dpo.py [key=value ...] [--resume]

With a model and prompts of your own a recipe is what stands below, without `job`, and is run by
`lora-dpo rounds RECIPE`. The judge may also be judge.of=classifier:HUB_ID, function:FILE.py:NAME,
endpoint:URL or implicit.
"""

from lora_dpo import (
    DPO,
    Adapter,
    Base,
    Data,
    IterativeRecipe,
    Judge,
    Rounds,
    Sampling,
    Training,
)
from lora_dpo.quickstart import cache_folder

recipe = IterativeRecipe(
    base=Base(str(cache_folder() / "base")),
    data=Data(
        train=str(cache_folder() / "train.jsonl"), eval=str(cache_folder() / "eval.jsonl"), max_tokens=256
    ),
    judge=Judge("reward:runs/iterative-reward"),
    sampling=Sampling(responses=8, max_new_tokens=80),
    loss=DPO(beta=0.5),
    adapter=Adapter(rank=16, alpha=32),
    training=Training(pairs_per_step=16, epochs=1, learning_rate=4e-4, gradient_checkpointing="none"),
    rounds=Rounds(
        count=3,
        prompts=300,
        held_out_judge="function:lora_dpo.quickstart.iterating:rule_reward",
        max_kl=50,
    ),
    run_directory="runs/iterative",
)

if __name__ == "__main__":
    from lora_dpo.cli import run
    from lora_dpo.quickstart.iterating import iterate

    run(recipe, job=iterate)
