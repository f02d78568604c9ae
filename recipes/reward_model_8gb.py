"""A reward model: Qwen2.5-3B-Instruct on UltraFeedback with the Bradley-Terry loss, in 8 GB.

Card: 8 GB, such as an RTX 3060 Ti, 3070 or 4060.
Memory: about 5.2 GiB, estimated by the formula in recipes/README.md and not yet measured on that card.

What is trained is an adapter and a scalar head on the 4-bit base; what is kept is the one with the best
held-out accuracy. `lora-dpo export RUN --to adapter` says how transformers loads it with PEFT.
"""

from lora_dpo import Adapter, Base, BradleyTerry, Data, Recipe, Training, run

recipe = Recipe(
    base=Base("Qwen/Qwen2.5-3B-Instruct"),
    data=Data(
        train="HuggingFaceH4/ultrafeedback_binarized:train_prefs",
        eval="HuggingFaceH4/ultrafeedback_binarized:test_prefs",
        max_eval_rows=500,
        max_tokens=1024,
        max_prompt_tokens=512,
        on_bad_row="skip",
    ),
    loss=BradleyTerry(centering=0.01),
    adapter=Adapter(rank=16),
    training=Training(
        pairs_per_step=64,
        tokens_per_microbatch=4096,
        learning_rate=1e-4,
        eval_every=100,
        save_every=100,
        best_metric="rewards/accuracy",
    ),
    run_directory="runs/reward_model_8gb",
)

if __name__ == "__main__":
    run(recipe)  # python recipes/reward_model_8gb.py adapter.start_from=runs/my_sft
