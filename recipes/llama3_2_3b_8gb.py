"""Llama-3.2-3B-Instruct on UltraFeedback: QLoRA DPO in 8 GB.

Card: 8 GB, such as an RTX 4060 or 3070; one without bfloat16 (RTX 2070) runs in float16 with loss scaling.
Memory: about 5.4 GiB, estimated by the formula in recipes/README.md and not yet measured on that card.
The model is gated: accept its licence on the hub, then `hf auth login`.
"""

from lora_dpo import DPO, Adapter, Base, Data, Recipe, Training, run

recipe = Recipe(
    base=Base("meta-llama/Llama-3.2-3B-Instruct"),
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
        pairs_per_step=32, tokens_per_microbatch=4096, learning_rate=1e-5, eval_every=200, save_every=200
    ),
    run_directory="runs/llama3_2_3b_8gb",
)

if __name__ == "__main__":
    run(recipe)  # python recipes/llama3_2_3b_8gb.py data.max_rows=10000
