"""DPO with LoRA on one 4-bit base, flat, for reading: `lora_dpo.train` without what makes it sturdy.

    python recipes/plain_loop.py [MODEL] [DATA] [STEPS]

Not here: preflight, checkpoints and --resume, several processes, running out of memory, and the loss scaling
that float16 cards need (RTX 20, T4).
"""

import argparse
import math

import torch

from lora_dpo import (
    DPO,
    Adapter,
    Base,
    ChatTokenizer,
    Data,
    LogProbs,
    StepSampler,
    evaluate,
    load_model,
    load_preferences,
    pack,
    reference_logprobs,
    token_logprobs,
    tokenize,
)


def main() -> None:
    parser = argparse.ArgumentParser(description="DPO with LoRA on one 4-bit base, as one flat loop.")
    parser.add_argument("model", nargs="?", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("data", nargs="?", default="Intel/orca_dpo_pairs", help="file, folder or hub id")
    parser.add_argument("steps", nargs="?", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--pairs", type=int, default=16, help="pairs of a step: the mathematics")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a micro-batch: the memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs/plain_loop", help="folder of the adapter; overwritten")
    args = parser.parse_args()

    # One model in memory. The base is 4-bit and frozen; the adapter on it is float32 and starts as B = 0, so
    # that the policy begins exactly as its reference.
    model = load_model(Base(args.model), Adapter(rank=16), seed=args.seed)
    # Each layer is recomputed in the backward pass: a third more work for a fraction of the memory.
    model.checkpoint_layers()

    # Rows become conversations, and those become branches: [what both sides share | chosen | rejected].
    # The split is by prompt, so that no held-out question is trained on.
    data = Data(args.data, eval_fraction=0.1, max_eval_rows=100, max_tokens=1024, on_bad_row="skip")
    preferences = load_preferences(data, seed=args.seed)
    chat = ChatTokenizer(model.tokenizer, max_tokens=data.max_tokens)
    train, held_out = tokenize(preferences.train, chat).branches, tokenize(preferences.eval, chat).branches
    skipped = sum(preferences.skipped.values())
    print(f"{len(train)} pairs to train on, {len(held_out)} held out, {skipped} bad rows skipped")

    objective = DPO(beta=args.beta)
    sampler = StepSampler(len(train), args.pairs, args.seed)
    adapter = list(model.trainable.values())  # nothing else requires a gradient
    optimizer = torch.optim.AdamW(adapter, lr=args.learning_rate, weight_decay=0.0)
    warmup = math.ceil(0.1 * args.steps)

    for step in range(args.steps):
        # Adam's first estimates are noise, hence the warm-up; then half a cosine down to nothing.
        rise = (step + 1) / warmup
        fall = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, args.steps - warmup)))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * (rise if step < warmup else fall)

        pairs = [train[n] for n in sampler.step(step)]
        sums = {"loss": 0.0, "rewards/margin": 0.0, "rewards/accuracy": 0.0}
        # The step's pairs lie end to end, without padding, in as few micro-batches as fit.
        for batch in pack(pairs, args.tokens, model.way):
            batch = batch.to(model.device)
            # Adapters off, no gradient: the same weights are the reference. A second model is never loaded.
            reference = batch.per_sequence(reference_logprobs(model, batch))
            # Adapters on: the policy. Both are sums over the responses' tokens, [pairs, (chosen, rejected)].
            policy = batch.per_sequence(token_logprobs(model, batch))
            # −log σ(β[(log π(chosen) − log ref(chosen)) − (log π(rejected) − log ref(rejected))])
            loss = objective(LogProbs(policy, reference, batch.scored_lengths()))
            # Divided by the pairs of the step, not of the micro-batch: how they were packed must not matter.
            total = loss.per_example.sum() / len(pairs)
            total.backward()
            sums["loss"] += total.item()
            for name in ("rewards/margin", "rewards/accuracy"):
                sums[name] += loss.metrics[name].sum().item() / len(pairs)

        # One odd pair must not throw the adapter far off.
        torch.nn.utils.clip_grad_norm_(adapter, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        facts = "  ".join(f"{name.removeprefix('rewards/')} {value:.4f}" for name, value in sums.items())
        print(f"step {step + 1}/{args.steps}  {facts}", flush=True)

    # Accuracy: how often the implicit reward, β · log-ratio, ranks a pair as its label does; 0.5 is chance.
    metrics = evaluate(model, objective, held_out, tokens_per_microbatch=args.tokens).metrics
    print(f"held out: accuracy {metrics['rewards/accuracy']}, margin {metrics['rewards/margin']}")

    # Only the adapter is written, as PEFT does it: PeftModel.from_pretrained(base, folder) loads it anywhere.
    model.network.save_pretrained(args.output, save_embedding_layers=False)
    model.tokenizer.save_pretrained(args.output)
    print(f"adapter: {args.output}")


if __name__ == "__main__":
    main()
