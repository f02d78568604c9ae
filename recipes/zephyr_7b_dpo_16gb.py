"""Zephyr-7B, second step: QLoRA DPO on UltraFeedback with the published hyperparameters, in 16 GB.

Card: 16 GB. At rank 128 the adapter and its optimizer take more than the 4-bit base; paged AdamW may spill.
Memory: about 13.6 GiB, estimated by the formula in recipes/README.md and not yet measured on that card.

Follows alignment-handbook's zephyr-7b-beta/dpo/config_qlora.yaml: β 0.01, rank and alpha 128, dropout 0.05,
5e-6, cosine, warm-up 0.1, one epoch, 1024 tokens (prompt 512), 4 pairs × 4 accumulated = 16 a step.
It starts elsewhere: there from an SFT adapter, here from the same project's full fine-tune, one model on the
hub. recipes/zephyr_7b_sft_16gb.py makes a base of your own.
"""

from lora_dpo import DPO, Adapter, Base, Data, Recipe, Training, run

recipe = Recipe(
    base=Base("alignment-handbook/zephyr-7b-sft-full"),
    data=Data(
        train="HuggingFaceH4/ultrafeedback_binarized:train_prefs",
        eval="HuggingFaceH4/ultrafeedback_binarized:test_prefs",
        max_tokens=1024,
        max_prompt_tokens=512,
        on_bad_row="skip",
    ),
    loss=DPO(beta=0.01),
    adapter=Adapter(rank=128, alpha=128, dropout=0.05),
    training=Training(
        pairs_per_step=16,
        tokens_per_microbatch=4096,
        learning_rate=5e-6,
        optimizer="paged_adamw",
        seed=42,
        eval_every=500,
        save_every=100,
    ),
    run_directory="runs/zephyr_7b_dpo_16gb",
)

if __name__ == "__main__":
    run(recipe)  # python recipes/zephyr_7b_dpo_16gb.py base.model=runs/zephyr_7b_sft_16gb/export-merged
