"""Mistral-7B-Instruct-v0.3 on UltraFeedback: QLoRA DPO of a 7B model in 12 GB.

Card: 12 GB, such as an RTX 3060 or 4070. Paged 8-bit AdamW keeps its state small and may spill to the CPU.
Memory: about 8.0 GiB, estimated by the formula in recipes/README.md and not yet measured on that card.
The model may be gated: accept its terms on the hub, then `hf auth login`.
"""

from lora_dpo import DPO, Adapter, Base, Data, Recipe, Training, run

recipe = Recipe(
    base=Base("mistralai/Mistral-7B-Instruct-v0.3"),
    data=Data(
        train="HuggingFaceH4/ultrafeedback_binarized:train_prefs",
        eval="HuggingFaceH4/ultrafeedback_binarized:test_prefs",
        max_eval_rows=500,
        max_tokens=1024,
        max_prompt_tokens=512,
        on_bad_row="skip",
    ),
    loss=DPO(beta=0.1),
    adapter=Adapter(rank=16),
    training=Training(
        pairs_per_step=32,
        tokens_per_microbatch=4096,
        learning_rate=5e-6,
        optimizer="paged_adamw_8bit",
        eval_every=200,
        save_every=200,
    ),
    run_directory="runs/mistral_7b_12gb",
)

if __name__ == "__main__":
    run(recipe)  # python recipes/mistral_7b_12gb.py training.tokens_per_microbatch=2048
