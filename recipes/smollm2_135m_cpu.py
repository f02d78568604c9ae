"""SmolLM2-135M-Instruct on Orca pairs: DPO on a laptop's CPU, to see a whole run before renting anything.

Card: none, the CPU. 2,000 pairs are enough to watch the margin grow; a GPU is used where there is one.
Memory: about 2.0 GiB, estimated by the formula in recipes/README.md and not yet measured. A CPU without
bfloat16 computes in float32, and its activations are twice as large.
"""

from lora_dpo import DPO, Adapter, Base, Data, Recipe, Training, run

recipe = Recipe(
    base=Base("HuggingFaceTB/SmolLM2-135M-Instruct"),
    data=Data(
        train="Intel/orca_dpo_pairs",
        eval_fraction=0.02,
        max_rows=2000,
        max_eval_rows=100,
        max_tokens=512,
        on_bad_row="skip",
    ),
    loss=DPO(beta=0.1),
    adapter=Adapter(rank=16),
    training=Training(
        pairs_per_step=16, tokens_per_microbatch=4096, learning_rate=5e-5, eval_every=50, save_every=50
    ),
    run_directory="runs/smollm2_135m_cpu",
)

if __name__ == "__main__":
    run(recipe)  # python recipes/smollm2_135m_cpu.py data.max_rows=200
