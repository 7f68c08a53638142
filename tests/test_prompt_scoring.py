"""Scoring answers under PromptGate: each under the gate of its prompt, as in training and generation."""

import copy
import warnings

import pytest
import torch
from models import PAD, VOCABULARY, E, injected, llama, prompts, t5

import ilora
from ilora import ILoRAConfig

hf = pytest.importorskip("transformers", reason="transformers is not installed")


def scorer(make=llama, **options):
    """A model whose gate depends on the prompt visibly."""
    model = injected(make, gate=ilora.PromptGate(E, **options))
    torch.nn.init.normal_(model.ilora_gate.weight, generator=torch.Generator().manual_seed(0))
    return model


@torch.no_grad()
def labelled(model, ids, lengths, mask=None):
    labels = ids.clone()
    for row, length in zip(labels, lengths, strict=True):
        row[:length] = -100
    return model(ids, labels=labels, attention_mask=mask).logits


@pytest.mark.parametrize("given", ["list", "tensor", "one"])
def test_lengths_give_the_gate_of_the_labels(given):
    model, ids = scorer(), prompts((9, 9, 9))[0]
    counts = [5, 5, 5] if given == "one" else [2, 7, 4]
    lengths = {"list": counts, "tensor": torch.tensor(counts, dtype=torch.int32), "one": 5}[given]
    expected = labelled(model, ids, counts)
    with torch.no_grad(), ilora.prompt_lengths(model, lengths):
        assert torch.equal(model(ids).logits, expected)
        assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, expected)
        given = model(ids, ilora_prompt_mask=torch.ones_like(ids).bool())
    assert not torch.equal(given.logits, expected)
    assert torch.equal(model(ids).logits, given.logits), "the block is over"


def test_nobody_is_needed_to_tell_the_padding():
    """Tokens that a padded row holds before its prompt do not count as its prompt, whether or not the mask is given."""
    model, (ids, mask) = scorer(), prompts((9, 6))
    with torch.no_grad(), ilora.prompt_lengths(model, [4, 2]):
        batched, inferred = model(ids, attention_mask=mask).logits, (model(ids), ilora.last_gate(model))[1]
        assert torch.equal(inferred, ilora.gate_of(model, input_ids=ids, attention_mask=mask))
    alone = labelled(model, ids[1:, 3:], [2])
    torch.testing.assert_close(batched[1:, 3:], alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ilora.last_gate(model)[0], inferred[1])


def test_a_forward_without_a_mask_leaves_padding_out_as_generate_does():
    model, (ids, mask) = scorer(), prompts((9, 6), left=False)
    with torch.no_grad():
        model(ids)
        read = ilora.last_gate(model)
        model(ids, attention_mask=mask)
        torch.testing.assert_close(read, ilora.last_gate(model))
        model.generate(ids, max_new_tokens=1)
        assert torch.equal(read, ilora.last_gate(model))
        model.generation_config.pad_token_id = model.generation_config.eos_token_id  # generate cannot tell then
        model(ids)
    assert not torch.equal(read[1], ilora.last_gate(model)[1])
    torch.testing.assert_close(read[0], ilora.last_gate(model)[0])


def test_packed_rows_and_encoder_decoders_have_lengths_too():
    model, ids = scorer(), prompts((10,))[0]
    segments = torch.tensor([0, 6, 10])
    with torch.no_grad(), ilora.prompt_lengths(model, [4, 1]):
        model(ids, ilora_segments=segments)
    packed = ilora.last_gate(model)
    for gate, row, length in zip(packed, (ids[:, :6], ids[:, 6:]), (4, 1), strict=True):
        labelled(model, row, [length])
        torch.testing.assert_close(ilora.last_gate(model)[0], gate)
    model = scorer(t5)
    with torch.no_grad(), ilora.prompt_lengths(model, 4):
        model(ids, labels=ids)
    torch.testing.assert_close(ilora.last_gate(model), ilora.gate_of(model, input_ids=ids[:, :4]))


def test_generation_min_tokens_and_nesting():
    model, ids = scorer(min_tokens=3), prompts((9, 9))[0]
    with torch.no_grad(), ilora.prompt_lengths(model, [1, 5]):
        expected = labelled(model, ids, [1, 5])
        with ilora.prompt_lengths(model, 9):
            assert not torch.equal(model(ids).logits, expected)
        assert torch.equal(model(ids).logits, expected), "at least min_tokens"
        model.generate(ids, max_new_tokens=3, num_beams=2, num_return_sequences=2)
        assert torch.equal(ilora.last_gate(model), ilora.gate_of(model, input_ids=ids))
        with pytest.raises(ValueError, match="one length for each of 1 sequences, got 2"):
            model(ids[:1])
        with pytest.raises(KeyError), ilora.prompt_lengths(model, 2):
            raise KeyError
        assert torch.equal(model(ids).logits, expected), "also after an exception"
    model.train()
    with ilora.prompt_lengths(model, 4):
        model(ids).logits.sum().backward()  # the lengths say what is no answer
    with pytest.raises(ValueError, match="without labels would show it the answer"):
        model(ids)
    assert copy.deepcopy(model).ilora.state.prompt_lengths is None


def test_compiled_code_follows_the_lengths():
    model, ids = scorer(), prompts((9, 9))[0]
    torch._dynamo.reset()  # other tests' compiled code of the same functions
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        whole = compiled(ids).logits
        for lengths in ([2, 5], [4, 3]):
            with ilora.prompt_lengths(model, lengths):
                torch.testing.assert_close(compiled(ids).logits, model(ids).logits)
        torch.testing.assert_close(compiled(ids).logits, whole)
        assert not torch.allclose(whole, labelled(model, ids, [4, 3]))


@pytest.mark.parametrize(
    ("lengths", "error", "words"),
    [
        (-1, ValueError, "lengths >= 0, got -1"),
        ([], TypeError, "expected an int or ints"),
        (torch.zeros(0, dtype=torch.long), ValueError, "lengths >= 0"),
        (1.5, TypeError, "an int or ints"),
        ([[1, 2]], TypeError, r"got torch.int64 \[1, 2\]"),
        (torch.tensor([True]), TypeError, "torch.bool"),
    ],
)
def test_other_lengths_are_refused(lengths, error, words):
    with pytest.raises(error, match=words), ilora.prompt_lengths(scorer(), lengths):
        raise AssertionError


def test_only_a_prompt_gate_has_prompts():
    for model in (injected(), injected(gate=ilora.UniformGate(E)), llama()):
        with pytest.raises(ValueError, match="LlamaForCausalLM has no PromptGate"), ilora.prompt_lengths(model, 1):
            raise AssertionError


def test_a_forward_that_cannot_tell_the_answer_warns_once():
    def warned(model, *args, **kwargs):
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            model(*args, **kwargs)
        return [str(w.message) for w in caught if "PromptGate reads every token" in str(w.message)]

    model, (ids, mask) = scorer(), prompts((6, 6))
    gate = ilora.gate_of(model, input_ids=ids)
    assert not warned(model, ids, labels=ids)
    assert not warned(model, ids, ilora_gate=gate)
    assert not warned(model, ids, ilora_prompt_mask=mask.bool())
    with ilora.gated(model, gate):
        assert not warned(model, ids)
    with ilora.prompt_lengths(model, 3):
        assert not warned(model, ids)
    assert not warned(model.generate, ids, max_new_tokens=2)
    assert len(warned(model, ids, attention_mask=mask)) == 1
    assert not warned(model, ids, attention_mask=mask)
    assert not warned(scorer(t5), ids, labels=ids)


SHORT = {"do_sample": False, "max_new_tokens": 3, "min_new_tokens": 3}


def turns(model, ids, **more):
    """The first turn of a chat, and the prompts of its second: all that was said, and more."""
    first = model.generate(ids, return_dict_in_generate=True, **{**SHORT, **more})
    more_words = ids[:, :4].repeat_interleave(len(first.sequences) // len(ids), 0)
    return first, torch.cat([first.sequences, more_words], 1)


@pytest.mark.parametrize("case", ["returned", "given", "two return sequences", "the first of two"])
def test_a_second_turn_goes_on_under_the_gate_of_its_cache(case):
    model, ids = scorer(), prompts((6, 6))[0]
    more = {"past_key_values": hf.DynamicCache(config=model.config)} if case == "given" else {}
    if "two" in case:
        more = {"do_sample": True, "num_return_sequences": 2}
    first, second = turns(model, ids, **more)
    cache, gate = more.get("past_key_values", first.past_key_values), ilora.gate_of(model, input_ids=ids)
    if case == "the first of two":
        cache.batch_select_indices(torch.tensor([0, 2]))
        second = second[::2]
    gate = gate.repeat_interleave(len(second) // 2, 0)
    assert not torch.allclose(gate, ilora.gate_of(model, input_ids=second), atol=1e-4)
    for kept in (copy.deepcopy(cache), cache):
        assert kept.get_seq_length() > 0
        sequences = model.generate(second, past_key_values=kept, **SHORT)
        scores = model(second[:, -1:], past_key_values=kept).logits
        assert torch.equal(sequences, model.generate(second, ilora_gate=gate, **SHORT))
        whole = model(torch.cat([sequences[:, :-1], second[:, -1:]], 1), ilora_gate=gate).logits[:, -1:]
        torch.testing.assert_close(scores, whole, rtol=1e-4, atol=1e-4)


def test_a_cache_that_keeps_no_gate_of_this_adapter_says_what_to_do():
    model, ids = scorer(), prompts((6, 6))[0]
    first, second = turns(model, ids)
    more = {"past_key_values": first.past_key_values, **SHORT}
    with pytest.raises(ValueError, match="ilora_prompt_mask was given with past_key_values"):
        model.generate(second, ilora_prompt_mask=torch.ones_like(second).bool(), **more)
    ilora.add_adapter(model, "another", ILoRAConfig(num_experts=E), gate=ilora.PromptGate(E))
    with pytest.raises(ValueError, match=r"keep one gate for all steps and turns, `with ilora\.gated"):
        model.generate(second, **more)


PLACES = {"above": VOCABULARY, "far above": 2**40, "below": -1, "llava's": -200}


@pytest.mark.parametrize("place", PLACES)
def test_ids_that_are_no_rows_of_the_embedding_are_left_out(place):
    model, ids = scorer(), prompts((8, 8))[0]
    marked = ids.clone()
    marked[:, 2:4] = PLACES[place]
    mask = torch.ones_like(ids).bool()
    gate = ilora.gate_of(model, input_ids=marked, attention_mask=mask)
    mask[:, 2:4] = False
    torch.testing.assert_close(gate, ilora.gate_of(model, input_ids=ids, ilora_prompt_mask=mask))
    marked[0] = PLACES[place]  # nothing else: the mean of nothing
    gate = ilora.gate_of(model, input_ids=marked, ilora_prompt_mask=torch.ones_like(mask))
    torch.testing.assert_close(gate[0], torch.full((E,), 1 / E))


def paligemma():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision = {**sizes, "model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8, "projection_dim": 32}
    text = {**sizes, "model_type": "gemma", "vocab_size": VOCABULARY, "num_key_value_heads": 1, "head_dim": 8}
    text |= {"pad_token_id": PAD}
    configs = {"vision_config": {**vision, "vision_use_head": False}, "text_config": text}
    return hf.PaliGemmaForConditionalGeneration(
        hf.PaliGemmaConfig(image_token_index=VOCABULARY, image_token_id=VOCABULARY, projection_dim=32, **configs)
    )


def test_an_image_outside_of_the_vocabulary():
    """PaliGemma's placeholder is no row of its embedding: forwards and generation read the text alone."""
    model = scorer(paligemma, hidden_size=32)
    ids = prompts((10, 10))[0]
    ids[:, :4] = VOCABULARY
    batch = {"pixel_values": torch.randn(2, 3, 16, 16), "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        together = model(ids, token_type_ids=torch.zeros_like(ids), **batch).logits
        torch.testing.assert_close(ilora.last_gate(model), ilora.gate_of(model, input_ids=ids[:, 4:]))
        for i in range(2):
            one = {name: tensor[i : i + 1] for name, tensor in batch.items()}
            alone = model(ids[i : i + 1], token_type_ids=torch.zeros_like(ids[:1]), **one).logits
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)
        model.generate(ids, max_new_tokens=2, **batch)
    torch.testing.assert_close(ilora.last_gate(model), ilora.gate_of(model, input_ids=ids[:, 4:]))


class Harness:
    """What lm-evaluation-harness's HFLM does with requests (text, context, continuation), and no more: rows are
    contexts with all of the continuation but its last token, cut on the left, filled with zeros on the right; requests
    that make one row share its logits."""

    backend = "causal"

    def __init__(self, model, batch_size, max_length=12):
        self.model, self.batch_size, self.max_length, self.rows = model, batch_size, max_length, 0

    def _model_call(self, inps):
        self.rows += len(inps)
        with torch.no_grad():
            return self.model(inps).logits

    def _loglikelihood_tokens(self, requests, disable_tqdm=False):
        groups = {}
        for i, (_, context, continuation) in enumerate(requests):
            groups.setdefault(tuple(context + continuation[:-1]), []).append(i)
        heads, scores = [max(group, key=lambda i: len(requests[i][2])) for group in groups.values()], {}
        for start in range(0, len(heads), self.batch_size):
            chunk = heads[start : start + self.batch_size]
            joint = [(requests[i][1] + requests[i][2])[-(self.max_length + 1) :][:-1] for i in chunk]
            width = max(map(len, joint))
            logits = self._model_call(torch.tensor([row + [0] * (width - len(row)) for row in joint])).log_softmax(-1)
            for head, row, values in zip(chunk, joint, logits, strict=True):
                for i in groups[tuple(requests[head][1] + requests[head][2][:-1])]:
                    tokens = torch.tensor(requests[i][2])
                    scores[i] = float(values[len(row) - len(tokens) : len(row)].gather(1, tokens[:, None]).sum())
        return [(scores[i], False) for i in range(len(requests))]


def requests():
    """Choices of contexts of many lengths; one row made of two contexts; rows that end in zeros; some too long."""
    generator = torch.Generator().manual_seed(0)

    def some(n):
        return torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()

    asked = [(context, some(1 + i % 4)) for i in range(8) for context in [some(2 + i)] for _ in range(2)]
    asked += [([5, 6, 7, 8], [9, 10]), ([5, 6], [7, 8, 9, 10]), ([5, 6, 7, 8], [9, 11]), ([5, 6, 7, 8, 9], [12])]
    asked += [([5, 0], [0, 0, 4]), ([5], [0, 9]), ([5], [9]), (some(15), some(3)), (some(11), some(4))]
    return [(None, context, continuation) for context, continuation in asked]


def scores_by_labels(model, max_length=12):
    for _, context, continuation in requests():
        ids = torch.tensor([(context + continuation)[-(max_length + 1) :]])
        logits = labelled(model, ids, [ids.shape[1] - len(continuation)])
        chosen = logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
        yield float(chosen[-len(continuation) :].sum())


class LM(ilora.PromptScoring, Harness):
    pass


def test_a_harness_scores_under_the_gate_of_the_context():
    model = scorer()
    model.generation_config.pad_token_id = None  # nothing but the lengths tells the padding
    expected = torch.tensor(list(scores_by_labels(model)))
    for batch_size in (1, 8):
        lm = LM(model, batch_size)
        found = torch.tensor([score for score, _ in lm._loglikelihood_tokens(requests(), disable_tqdm=True)])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert lm.rows < len(requests()), "a row that several requests share is computed once"
        plain = Harness(model, batch_size)._loglikelihood_tokens(requests())
        assert (torch.tensor([score for score, _ in plain]) - expected).abs().max() > 0.1
    lm._model_call(torch.ones(2, 5, dtype=torch.long))  # as to find a batch size: none of the requests
    for network in (ilora.UniformGate(E), None):
        model = llama().eval() if network is None else injected(gate=network)
        assert LM(model, 8)._loglikelihood_tokens(requests()) == Harness(model, 8)._loglikelihood_tokens(requests())


def test_the_real_harness(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"t{i:02}": i for i in range(VOCABULARY)}, unk_token="t03")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "t00", "bos_token": "t01", "eos_token": "t02", "unk_token": "t03"}
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=words, **special)
    real = type("Real", (ilora.PromptScoring, huggingface.HFLM), {})
    model = scorer()
    model.generation_config.pad_token_id = None
    expected = torch.tensor(list(scores_by_labels(model)))
    texts = [tuple(" ".join(f"t{token:02}" for token in tokens) for tokens in request[1:]) for request in requests()]
    asked = [instance("loglikelihood", {}, (context, " " + more), i) for i, (context, more) in enumerate(texts)]
    options = {"until": ["t02"], "max_gen_toks": 4}
    prompted = [instance("generate_until", {}, (context, options), i) for i, (context, _) in enumerate(texts[:16:2])]
    settings = {"pretrained": model, "tokenizer": tokenizer, "max_length": 12, "add_bos_token": False}
    answers = []
    for batch_size in (1, 8):
        lm = real(**settings, batch_size=batch_size)
        found = torch.tensor([score for score, _ in lm.loglikelihood(asked, disable_tqdm=True)])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        answers += [
            lm.generate_until(prompted),
            huggingface.HFLM(**settings, batch_size=batch_size).generate_until(prompted),
        ]
    assert answers[0] == answers[1] == answers[2] == answers[3]
