"""Ask a GGUF file questions in llama.cpp, through its package xllamacpp.

    pip install xllamacpp
    python examples/ask_llama_cpp.py MODEL.gguf [--lora ADAPTER.gguf] QUESTION ...

Each question begins a conversation of its own, in the file's chat template; answers are greedy.
`llama-cli -m MODEL.gguf --lora ADAPTER.gguf --temp 0` does the same for one conversation.
"""

import argparse
import os

import xllamacpp


def server(model: str, lora: str | None = None) -> xllamacpp.Server:
    """Load a model, and an adapter beside it."""
    settings = xllamacpp.CommonParams()
    settings.model.path = model
    settings.n_ctx, settings.n_parallel, settings.verbosity = 2048, 1, 0
    settings.cpuparams.n_threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    if lora is not None:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = lora, 1.0
        settings.lora_adapters = [adapter]
    return xllamacpp.Server(settings)


def answer(asked: xllamacpp.Server, question: str) -> str:
    """Return what a loaded model answers."""
    turn = {"role": "user", "content": question}
    request = {"messages": [turn], "temperature": 0, "max_tokens": 128}
    return asked.handle_chat_completions(request)["choices"][0]["message"]["content"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("questions", nargs="+", metavar="QUESTION")
    parser.add_argument("--lora", metavar="FILE")
    options = parser.parse_args()
    for file in filter(None, (options.model, options.lora)):
        if not os.path.isfile(file):
            parser.error(f"found no file {file}")
    asked = server(options.model, options.lora)
    for question in options.questions:
        print(f"> {question}\n{answer(asked, question)}", flush=True)


if __name__ == "__main__":
    main()
