"""Whoever loads a saved adapter without ilora is told that the gate is left out."""

import warnings

import pytest
import torch
from models import PAD, VOCABULARY, E, bert, gates, injected, llama, prompts, randomised
from saved_cases import close

import ilora

hf = pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("safetensors")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
TOLD = r"an iLoRA adapter, of which PEFT loads no gate .*: use ilora\.load_adapter\(model, path\)"
LOADERS = {
    "PeftModel": lambda base, path: peft.PeftModel.from_pretrained(hf.AutoModelForCausalLM.from_pretrained(base), path),
    "AutoPeftModel": lambda base, path: peft.AutoPeftModelForCausalLM.from_pretrained(path),
    "AutoModel": lambda base, path: hf.AutoModelForCausalLM.from_pretrained(path),
    "load_adapter": lambda base, path: loaded(hf.AutoModelForCausalLM.from_pretrained(base), path),
}


def loaded(model, path):
    model.load_adapter(str(path))  # transformers' own
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    llama().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("gate", [None, ilora.PromptGate], ids=["without a network", "prompt"])
@pytest.mark.parametrize("loader", LOADERS)
def test_what_loads_the_plain_lora_says_so(tmp_path, base, loader, gate):
    model = injected(lambda: hf.AutoModelForCausalLM.from_pretrained(base), gate=gate and gate(E))
    path = ilora.save_adapter(model, tmp_path / "a")
    with pytest.warns(UserWarning, match=TOLD):
        other = LOADERS[loader](base, path).eval()
    ids, mask = prompts((5, 5))
    uniform = model(ids, attention_mask=mask, ilora_gate=torch.full((1, E), 1 / E)).logits
    close(other(ids, attention_mask=mask).logits, uniform)


def test_a_plain_lora_that_was_exported_says_nothing(tmp_path, base):
    model = injected(lambda: hf.AutoModelForCausalLM.from_pretrained(base))
    path = ilora.to_peft(model, gates(1), tmp_path / "a")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*iLoRA")
        LOADERS["PeftModel"](base, path)


def test_from_peft_takes_the_directory_as_the_lora_that_it_is(tmp_path):
    model = injected()
    again = ilora.from_peft(ilora.save_adapter(model, tmp_path / "a"), E, model=injected_base())
    ids = prompts((5, 5))[0]
    close(again.eval()(ids, ilora_gate=gates(2)).logits, model(ids, ilora_gate=gates(2)).logits)


def injected_base():
    torch.manual_seed(0)
    return llama().eval()


@pytest.mark.parametrize("make", [llama, bert])
def test_a_forward_that_is_called_past_the_model_has_its_gate(make):
    """sentence-transformers calls `model.forward`."""
    model, (ids, mask) = injected(make, gate=ilora.PromptGate(E)), prompts((6, 4))
    torch.nn.init.normal_(model.ilora_gate.weight)
    expected = model(ids, attention_mask=mask).logits
    assert torch.equal(model.forward(ids, attention_mask=mask).logits, expected)
    assert torch.equal(model.forward(input_ids=ids, attention_mask=mask).logits, expected)
    gate = gates(2)
    with ilora.gated(model, gate):
        assert torch.equal(model.forward(ids).logits, model(ids).logits)
    with ilora.disable_adapter(model):
        frozen = model.forward(ids).logits
    ilora.merge(model, gate[0])
    assert not torch.equal(model.forward(ids).logits, frozen)
    with pytest.raises(ValueError, match="needs ilora_gate"):
        injected(make).forward(ids)


@pytest.fixture
def sentences(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("sentence_transformers")
    tokenizers = pytest.importorskip("tokenizers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    hf.BertModel(hf.BertConfig(**sizes, vocab_size=VOCABULARY, pad_token_id=PAD)).save_pretrained(tmp_path / "base")
    words = tokenizers.models.WordLevel({f"t{i:02}": i for i in range(VOCABULARY)}, unk_token="t03")
    words = tokenizers.Tokenizer(words)
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    hf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t00").save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def embedder(base):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(base, device="cpu")
    randomised(ilora.inject(model[0].model, ilora.ILoRAConfig(num_experts=E), gate=ilora.PromptGate(E)))
    torch.nn.init.normal_(model[0].model.ilora_gate.weight, generator=torch.Generator().manual_seed(0))
    return model.eval()


def test_a_sentence_transformer(tmp_path, sentences):
    from sentence_transformers import SentenceTransformer

    model, texts = embedder(sentences), ["t05 t06 t07", "t09 t10"]
    model.save_pretrained(str(tmp_path / "a"))
    with pytest.warns(UserWarning, match=TOLD):
        SentenceTransformer(str(tmp_path / "a"), device="cpu")
    again = SentenceTransformer(sentences, device="cpu")
    ilora.load_adapter(again[0].model, tmp_path / "a").eval()
    assert (again.encode(texts) == model.encode(texts)).all()


def test_the_best_model_of_its_trainer(tmp_path, sentences):
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss

    class Trainer(SentenceTransformerTrainer):
        def _load_from_checkpoint(self, checkpoint_path):
            ilora.load_adapter(self.model[0].model, checkpoint_path)

    model = embedder(sentences)
    rows = [{"sentence1": f"t{i + 5} t{i + 9}", "sentence2": f"t{i + 7}", "label": float(i % 2)} for i in range(10, 26)]
    settings = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True, "use_cpu": True}
    settings |= {"metric_for_best_model": "eval_loss", "greater_is_better": True, "report_to": [], "disable_tqdm": True}
    args = SentenceTransformerTrainingArguments(str(tmp_path), num_train_epochs=3, learning_rate=1e-3, **settings)
    data = Dataset.from_list(rows)
    trainer = Trainer(model, args, train_dataset=data, eval_dataset=data, loss=CosineSimilarityLoss(model))
    trainer.train()
    assert not trainer.state.best_model_checkpoint.endswith(str(trainer.state.global_step)), "the last one is the best"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)
