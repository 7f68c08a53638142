"""Inside generate each row runs under its own prompt's gate, also where the batch shrinks, or generate refuses."""

from types import SimpleNamespace

import pytest
import torch
from models import E, bart, gates, injected, llama, prompts, randomised, t5

import ilora

hf = pytest.importorskip("transformers")


WINDOW = 100  # frames that are transcribed at once, 3,000 in real models


class Words(hf.LogitsProcessor):
    """A timestamp, then words: what a trained Whisper says."""

    def __call__(self, ids, scores):
        out = torch.full_like(scores, -torch.inf)
        said = (ids >= 91).any(1)
        out[said, 4:90] = scores[said, 4:90]
        out[~said, 91] = 0
        return out


def whisper(gate=None):
    torch.manual_seed(0)
    sizes = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("layers", 1), ("ffn_dim", 48))}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_target_positions": 40, "d_model": 32}
    sizes |= {"max_source_positions": WINDOW // 2}
    tokens = {"decoder_start_token_id": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    tokens |= {"suppress_tokens": None, "begin_suppress_tokens": None}
    config = hf.WhisperConfig(vocab_size=1600, num_mel_bins=8, **sizes, **tokens)
    model = hf.WhisperForConditionalGeneration(config).eval()
    for key, value in {
        "no_timestamps_token_id": 90,
        "is_multilingual": False,
        "lang_to_id": {},
        "task_to_id": {},
    }.items():
        setattr(model.generation_config, key, value)
    model.generation_config.prev_sot_token_id = 3
    model.model.decoder.embed_tokens.weight.data.mul_(20)
    return randomised(ilora.inject(model, ilora.ILoRAConfig(r=8, num_experts=E), gate=gate))


def transcribe(model, sounds, windows, gate, **more):
    """The tokens of each recording, by window."""
    sounds = sounds[..., : WINDOW * max(windows)]
    mask = (torch.arange(sounds.shape[-1]) < WINDOW * torch.tensor(windows)[:, None]).long()
    settings = {"return_timestamps": True, "return_segments": True, "max_new_tokens": 3, "do_sample": False}
    settings |= {"logits_processor": hf.LogitsProcessorList([Words()]), **more}
    segments = model.generate(sounds, attention_mask=mask, ilora_gate=gate, **settings)["segments"]
    return [[segment["tokens"].tolist() for segment in each] for each in segments]


LENGTHS = {"the last ends first": (2, 1), "the first ends first": (1, 2), "three": (1, 3, 2), "one is left": (3, 1, 1)}
WAYS = {
    "one beam": {},
    "two beams": {"num_beams": 2},
    "no speech": {"num_beams": 2, "temperature": 0.0, "no_speech_threshold": 0.6, "logprob_threshold": -100.0},
    "as many beams as rows": {"num_beams": 3},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("lengths", "way"),
    [
        *(("the last ends first", way) for way in WAYS),
        ("the first ends first", "one beam"),
        ("the first ends first", "two beams"),
        ("three", "one beam"),
        ("three", "as many beams as rows"),
        ("one is left", "two beams"),
    ],
)
def test_long_recordings_are_as_if_alone(lengths, way):
    windows, model = LENGTHS[lengths], whisper()
    sounds = torch.randn(len(windows), 8, WINDOW * max(windows), generator=torch.Generator().manual_seed(1))
    gate = torch.eye(E)[: len(windows)]
    found = transcribe(model, sounds, windows, gate, **WAYS[way])
    assert [len(each) for each in found] == list(windows)
    for i in range(len(windows)):
        alone = transcribe(model, sounds[i : i + 1], windows[i : i + 1], gate[i : i + 1], **WAYS[way])
        assert found[i] == alone[0]
    assert found != transcribe(model, sounds, windows, gate.roll(1, 0), **WAYS[way])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("doubtful", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_doubtful_recordings_are_tried_again_under_their_own_gate(doubtful, monkeypatch):
    model, gate = whisper(), torch.eye(E)[:3]
    sounds = torch.randn(3, 8, 2 * WINDOW, generator=torch.Generator().manual_seed(1))
    used, tries = [], []

    def need(self, sequence, outputs, index, *args):
        first = len(tries) < 3
        tries.append(index)
        return first and index in doubtful, False

    monkeypatch.setattr(hf.WhisperForConditionalGeneration, "_need_fallback", need)
    model.model.encoder.register_forward_pre_hook(lambda *_: used.append(model.ilora.state.current.gate))
    temperatures = {"temperature": (0.0, 0.0), "logprob_threshold": 0.0}
    transcribe(model, sounds, (2, 1, 1), gate, **temperatures)
    assert [each.argmax(-1).tolist() for each in used][-3:] == [[0, 1, 2], list(doubtful), [0]]
    assert model.ilora.state.current == ilora.current_gate.CurrentGate()


@pytest.mark.filterwarnings("ignore")
def test_return_sequences_and_a_gate_for_everybody():
    model, gate = whisper(), torch.eye(E)[:2]
    sounds = torch.randn(2, 8, 2 * WINDOW, generator=torch.Generator().manual_seed(1))
    used = []
    model.model.encoder.register_forward_pre_hook(lambda *_: used.append(model.ilora.state.current.gate))
    transcribe(model, sounds, (2, 1), gate, num_return_sequences=2, num_beams=2)
    assert [each.argmax(-1).tolist() for each in used][-2:] == [[0, 0, 1, 1], [0, 0]]
    one = transcribe(model, sounds, (2, 1), gate[:1])
    assert one[1] == transcribe(model, sounds[1:], (1,), gate[:1])[0]
    short = model.generate(sounds[..., :WINDOW], ilora_gate=gate, max_new_tokens=3)
    for i in range(2):
        alone = model.generate(sounds[i : i + 1, :, :WINDOW], ilora_gate=gate[i : i + 1], max_new_tokens=3)
        assert torch.equal(short[i], alone[0])


class Shrinking(hf.LogitsProcessor):
    """As models do that go on with some of their rows alone."""

    def __init__(self, model, rows):
        self.model, self.rows = model, rows

    def __call__(self, input_ids, scores):
        self.model(input_ids[: self.rows], use_cache=False)
        return scores


@pytest.mark.parametrize(("beams", "rows"), [(1, 1), (1, 2), (2, 2), (2, 4), (4, 4)])
def test_a_batch_that_shrinks_otherwise_is_refused(beams, rows):
    model, (ids, mask) = injected(llama), prompts((5, 5, 5, 5))
    processors = hf.LogitsProcessorList([Shrinking(model, rows)])
    settings = {"max_new_tokens": 3, "do_sample": False, "num_beams": beams, "attention_mask": mask}
    with pytest.raises(ValueError, match=rf"generate runs {rows} rows for 4 prompts.*expected {4 * beams}"):
        model.generate(ids, ilora_gate=gates(4), logits_processor=processors, **settings)
    assert model.ilora.state.current == ilora.current_gate.CurrentGate()
    model.generate(ids, ilora_gate=gates(1), logits_processor=processors, **settings)


@pytest.mark.parametrize("make", [t5, bart])
@pytest.mark.parametrize("change", [lambda x: x.repeat(3, 1), lambda x: x[:2], lambda x: x[:1]])
def test_an_encoder_that_generate_calls_by_itself_finds_the_prompts(make, change):
    model, (ids, mask) = injected(make), prompts((5, 5, 5, 5), left=False)
    settings = {"max_new_tokens": 2, "attention_mask": mask, "do_sample": False}
    model.generate(ids, ilora_gate=gates(4), num_beams=2, **settings)
    encoder = model.get_encoder()
    forward = encoder.forward

    def changed(input_ids, attention_mask=None, **kwargs):
        return forward(input_ids=change(input_ids), attention_mask=change(attention_mask), **kwargs)

    encoder.forward = changed
    with pytest.raises(ValueError, match="is not the batch of 4 sequences"):
        model.generate(ids, ilora_gate=gates(4), **settings)


def test_a_language_model_within_finds_copies():
    """BLIP-2 and others let a model within generate, which copies the prompts for its beams by itself."""
    model, (ids, mask) = injected(llama), prompts((5, 5))
    gate, layer = gates(2), model.model.layers[0].mlp.up_proj
    x, seen = torch.randn(2, 3, 32), []

    def within(self, input_ids, **kwargs):
        for copies in (1, 2):
            seen.append(layer(x.repeat_interleave(copies, 0)))
        with pytest.raises(ValueError, match="is not the batch of 2 sequences"):
            layer(x.repeat_interleave(3, 0))
        return SimpleNamespace(sequences=input_ids)

    original = type(model).ilora_base.generate
    try:
        type(model).ilora_base.generate = within
        model.generate(ids, attention_mask=mask, ilora_gate=gate, num_beams=2)
    finally:
        type(model).ilora_base.generate = original
    torch.testing.assert_close(seen[1], seen[0].repeat_interleave(2, 0))
    assert not torch.equal(seen[0], layer(x, gate=gate.flip(0)))
