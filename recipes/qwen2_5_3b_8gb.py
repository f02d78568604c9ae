"""Qwen2.5-3B-Instruct on two sets at once: a mixture of UltraFeedback and Orca pairs in 8 GB.

Card: 8 GB. Shows sources with weights and caps, an evaluation set split off by prompt, and 8-bit AdamW.
Memory: about 5.1 GiB, estimated by the formula in recipes/README.md and not yet measured on that card.
"""

from lora_dpo import DPO, Adapter, Base, Data, Recipe, Source, Training, run

recipe = Recipe(
    base=Base("Qwen/Qwen2.5-3B-Instruct"),
    data=Data(
        train=(
            Source("HuggingFaceH4/ultrafeedback_binarized:train_prefs", rows=20000),
            Source("Intel/orca_dpo_pairs", weight=0.5),
        ),
        eval_fraction=0.02,
        max_tokens=1024,
        max_prompt_tokens=512,
        on_bad_row="skip",
    ),
    loss=DPO(beta=0.1),
    adapter=Adapter(rank=16),
    training=Training(
        pairs_per_step=32,
        tokens_per_microbatch=4096,
        learning_rate=1e-5,
        optimizer="adamw_8bit",
        eval_every=200,
        save_every=200,
    ),
    run_directory="runs/qwen2_5_3b_8gb",
)

if __name__ == "__main__":
    run(recipe)  # python recipes/qwen2_5_3b_8gb.py training.learning_rate=2e-5
