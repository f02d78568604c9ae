"""Zephyr-7B, first step: Mistral-7B learns to chat from UltraChat, QLoRA SFT in 16 GB.

Card: 16 GB. A completion model has no chat template; `data.chat_template` gives it Zephyr's.
Memory: about 11.2 GiB, estimated by the formula in recipes/README.md and not yet measured on that card.

Follows alignment-handbook's zephyr-7b-beta/sft/config_qlora.yaml: rank 16, alpha 16, dropout 0.05, 2e-4,
cosine, warm-up 0.1, one epoch, 2048 tokens. There a step is 8 sequences packed to 2048 tokens; here it is 12
conversations, about as many tokens, and none is cut in two. Then DPO, on the merged result:

    python recipes/zephyr_7b_sft_16gb.py
    lora-dpo export runs/zephyr_7b_sft_16gb --to merged
    python recipes/zephyr_7b_dpo_16gb.py base.model=runs/zephyr_7b_sft_16gb/export-merged
"""

from lora_dpo import SFT, Adapter, Base, Data, Recipe, Training, run

ZEPHYR_TEMPLATE = r"""
{%- for message in messages -%}
{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}
{%- endfor -%}
{{ '<|assistant|>\n' if add_generation_prompt else '' }}"""

recipe = Recipe(
    base=Base("mistralai/Mistral-7B-v0.1"),
    data=Data(
        train="HuggingFaceH4/ultrachat_200k:train_sft",
        eval="HuggingFaceH4/ultrachat_200k:test_sft",
        max_eval_rows=500,
        chat_template=ZEPHYR_TEMPLATE,
        max_tokens=2048,
        on_bad_row="skip",
    ),
    loss=SFT(),
    adapter=Adapter(rank=16, alpha=16, dropout=0.05),
    training=Training(
        pairs_per_step=12, tokens_per_microbatch=8192, learning_rate=2e-4, eval_every=500, save_every=500
    ),
    run_directory="runs/zephyr_7b_sft_16gb",
)

if __name__ == "__main__":
    run(recipe)  # python recipes/zephyr_7b_sft_16gb.py data.max_rows=20000
