"""Qwen2.5-0.5B-Instruct on Orca pairs: the quick experiment in 8 GB, to try a β or a learning rate.

Card: 8 GB. The best adapter by held-out accuracy is kept, and the run stops when it no longer improves.
Memory: about 4.1 GiB, estimated by the formula in recipes/README.md and not yet measured on that card.
"""

from lora_dpo import DPO, Adapter, Base, Data, Recipe, Training, run

recipe = Recipe(
    base=Base("Qwen/Qwen2.5-0.5B-Instruct"),
    data=Data(train="Intel/orca_dpo_pairs", eval_fraction=0.04, max_tokens=1024, on_bad_row="skip"),
    loss=DPO(beta=0.1),
    adapter=Adapter(rank=16),
    training=Training(
        pairs_per_step=32,
        tokens_per_microbatch=16384,
        epochs=2,
        learning_rate=3e-5,
        eval_every=50,
        best_metric="rewards/accuracy",
        early_stopping=4,
    ),
    run_directory="runs/qwen2_5_0_5b_8gb",
)

if __name__ == "__main__":
    run(recipe)  # python recipes/qwen2_5_0_5b_8gb.py loss.beta=0.05
