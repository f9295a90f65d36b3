"""Peak memory of a training step by size of the vocabulary and length of the responses: full logits, and ours.

With a small random Llama, so that logits dominate; every number is measured in a separate process.

    python -m benchmarks.vocabulary_memory
"""

from benchmarks.common import describe_machine, format_table, make_parser, peak_memory, run_in_process

VOCABULARIES = (49_152, 128_256, 256_000)
RESPONSES = (64, 256)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--vocabulary", type=int, action="append")
    parser.add_argument("--response", type=int, action="append", help="tokens per response")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--chunk", type=int, default=128, help="model.logprob_chunk_tokens")
    args = parser.parse_args()
    print(describe_machine())
    print(f"GiB above the loaded model with its gradients; {args.pairs} pairs, chunks of {args.chunk} tokens\n")
    rows = []
    for response in args.response or RESPONSES:
        for vocabulary in args.vocabulary or VOCABULARIES:
            full, ours = (
                run_in_process(measure, how, vocabulary, response, args.pairs, args.chunk, args.device)
                for how in ("full", "ours")
            )
            rows.append([response, f"{vocabulary:,}", f"{full:.2f}", f"{ours:.2f}", f"{ours / full:.2f}"])
    print(format_table(["response tokens", "vocabulary", "full logits", "rlhf-pl", "share"], rows))


def measure(how: str, vocabulary: int, response: int, pairs: int, chunk: int, device: str) -> float:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rlhf_pl.models.logprobs import gather_logps
    from rlhf_pl.models.packed_batch import PrefixGroup, pack, unpack
    from rlhf_pl.models.policy import PolicyLM
    from rlhf_pl.models.shared_prefix import share_prompts

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, **sizes)).train().to(device)
    for parameter in lm.parameters():
        parameter.grad = torch.zeros_like(parameter)
    responses = torch.randint(vocabulary, (pairs, 2, response)).tolist()
    rows = pack([PrefixGroup(list(range(100)), (chosen, rejected)) for chosen, rejected in responses]).to(device)
    before = torch.cuda.memory_allocated() / 2**30 if device == "cuda" else 0.0  # on CPUs the peak excludes the start
    with peak_memory(device) as peak:
        if how == "ours":
            assert share_prompts(lm)
            rows.sum_per_response(PolicyLM(lm, chunk)(**rows.inputs())).sum().backward()
        else:
            ids, mask = unpack(rows.input_ids, rows.lengths)
            logits = lm(input_ids=ids, attention_mask=mask).logits
            logps = gather_logps(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            (logps * mask[:, 1:].flatten()).sum().backward()
    return peak["gib"] - before


if __name__ == "__main__":
    main()
