"""Qwen2.5-14B-Instruct on UltraFeedback: QLoRA DPO of the largest model that is comfortable in 24 GB.

Card: 24 GB, such as an RTX 3090 or 4090.
Memory: about 17.8 GiB, estimated by the formula in recipes/README.md and not yet measured on that card.
"""

from lora_dpo import DPO, Adapter, Base, Data, Recipe, Training, run

recipe = Recipe(
    base=Base("Qwen/Qwen2.5-14B-Instruct"),
    data=Data(
        train="HuggingFaceH4/ultrafeedback_binarized:train_prefs",
        eval="HuggingFaceH4/ultrafeedback_binarized:test_prefs",
        max_eval_rows=500,
        max_tokens=1536,
        max_prompt_tokens=768,
        on_bad_row="skip",
    ),
    loss=DPO(beta=0.1),
    adapter=Adapter(rank=16),
    training=Training(
        pairs_per_step=64,
        tokens_per_microbatch=8192,
        learning_rate=5e-6,
        optimizer="paged_adamw_8bit",
        eval_every=100,
        save_every=100,
    ),
    run_directory="runs/qwen2_5_14b_24gb",
)

if __name__ == "__main__":
    run(recipe)  # python recipes/qwen2_5_14b_24gb.py training.tokens_per_microbatch=4096
