"""What llama.cpp writes, greedily, in a process of its own.

    python llama_cpp_text.py PROMPT TOKENS MODEL [ADAPTER]

Prints the last line as JSON: the text, and the log-probabilities of the first token's best four.
"""

import json
import sys

import xllamacpp


def main(prompt, tokens, model, adapter=None):
    asked = xllamacpp.CommonParams()
    asked.model.path, asked.n_ctx, asked.n_parallel, asked.verbosity = model, 64, 1, 0
    asked.cpuparams.n_threads, asked.warmup = 1, False
    # Otherwise it computes attention in f16.
    asked.cache_type_k = asked.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    asked.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter is not None:
        info = xllamacpp.CommonAdapterLoraInfo()
        info.path, info.scale = adapter, 1.0
        asked.lora_adapters = [info]
    server = xllamacpp.Server(asked)
    request = {"prompt": prompt, "temperature": 0, "max_tokens": int(tokens), "logprobs": 4}
    found = server.handle_completions(request)["choices"][0]
    first = found["logprobs"]["content"][0]["top_logprobs"]
    told = {"text": found["text"], "first": {each["token"]: each["logprob"] for each in first}}
    print("\n" + json.dumps(told), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
