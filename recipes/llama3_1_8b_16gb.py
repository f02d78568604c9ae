"""Llama-3.1-8B-Instruct on UltraFeedback: QLoRA DPO in 16 GB.

Card: 16 GB, such as an RTX 4060 Ti, 4080 or a T4 (which has no bfloat16 and runs in float16).
Memory: about 11.8 GiB, estimated by the formula in recipes/README.md and not yet measured on that card.
The model is gated: accept its licence on the hub, then `hf auth login`.
"""

from lora_dpo import DPO, Adapter, Base, Data, Recipe, Training, run

recipe = Recipe(
    base=Base("meta-llama/Llama-3.1-8B-Instruct"),
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
        pairs_per_step=64, tokens_per_microbatch=8192, learning_rate=5e-6, eval_every=100, save_every=100
    ),
    run_directory="runs/llama3_1_8b_16gb",
)

if __name__ == "__main__":
    run(recipe)  # python recipes/llama3_1_8b_16gb.py adapter.rank=64 adapter.alpha=128
