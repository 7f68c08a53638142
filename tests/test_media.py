"""Images, sounds and videos: each runs under the gate of the row that it belongs to, or is refused by name."""

import pytest
import torch
from models import E, gates, randomised

import ilora

hf = pytest.importorskip("transformers")

TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 8}
VISION |= {"patch_size": 4}
SIGLIP = {"model_type": "siglip_vision_model", **VISION, "vision_use_head": False}
IMAGE, VIDEO, SOUND = 60, 61, 62


def config(kind, **settings):
    return getattr(hf, kind + "Config")(**settings)


def llava():
    vision = {"model_type": "clip_vision_model", **VISION}
    return config("Llava", vision_config=vision, text_config={"model_type": "llama", **TEXT}, image_token_id=IMAGE)


def llava_next(kind="LlavaNext", **more):
    vision = SIGLIP if "Onevision" in kind else {"model_type": "clip_vision_model", **VISION}
    text = {"model_type": "qwen2" if "Onevision" in kind else "llama", **TEXT}
    settings = {"image_token_index": IMAGE, "image_grid_pinpoints": [[8, 8], [8, 16]]}
    return config(kind, vision_config=vision, text_config=text, **settings, **more)


def smolvlm(kind="SmolVLM"):
    text = {"model_type": "llama", **TEXT}
    return config(kind, vision_config=VISION, text_config=text, image_token_id=IMAGE, scale_factor=2)


def idefics2():
    perceiver = {"hidden_size": 32, "resampler_n_latents": 2, "resampler_depth": 1, "resampler_n_heads": 4}
    perceiver |= {"resampler_head_dim": 8, "num_key_value_heads": 2}
    text = {"model_type": "mistral", **TEXT}
    return config("Idefics2", vision_config=VISION, text_config=text, perceiver_config=perceiver, image_token_id=IMAGE)


def qwen2_vl(kind="Qwen2VL", **vision):
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, **vision}
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
    return config(kind, vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=VIDEO)


def qwen2_5_vl():
    vision = {"out_hidden_size": 32, "intermediate_size": 48, "window_size": 16, "fullatt_block_indexes": [0]}
    return qwen2_vl("Qwen2_5_VL", **vision)


def qwen2_audio():
    audio = {"num_mel_bins": 8, "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4}
    audio |= {"encoder_ffn_dim": 48, "max_source_positions": 16}
    return config(
        "Qwen2Audio", audio_token_index=SOUND, text_config={"model_type": "qwen2", **TEXT}, audio_config=audio
    )


def gemma3():
    text = {"model_type": "gemma3_text", **TEXT, "head_dim": 8}
    return config("Gemma3", text_config=text, vision_config=SIGLIP, mm_tokens_per_image=4, image_token_index=IMAGE)


def internvl():
    vision = {**VISION, "image_size": (8, 8), "patch_size": (4, 4)}
    text = {"model_type": "qwen2", **TEXT}
    return config("InternVL", vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=1)


MODELS = {
    "llava": llava,
    "llava_next": llava_next,
    "llava_next_video": lambda: llava_next("LlavaNextVideo", video_token_index=VIDEO),
    "llava_onevision": lambda: llava_next("LlavaOnevision", video_token_index=VIDEO),
    "smolvlm": smolvlm,
    "idefics3": lambda: smolvlm("Idefics3"),
    "idefics2": idefics2,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen2_audio": qwen2_audio,
    "gemma3": gemma3,
    "internvl": internvl,
}


def make(name, **options):
    torch.manual_seed(0)
    settings = MODELS[name]()
    kind = type(settings).__name__.removesuffix("Config") + "ForConditionalGeneration"
    model = getattr(hf, kind)(settings).eval()
    if name == "gemma3":  # zero in a new model
        model.model.multi_modal_projector.mm_input_projection_weight.data.normal_()
    return randomised(ilora.inject(model, ilora.ILoRAConfig(r=8, num_experts=E, **options)))


def media(name, units, video=False):
    """(arguments, placeholders of each) for this many images, sounds or videos; Qwen's are of different sizes."""
    noise = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=noise)

    if name == "qwen2_audio":
        return {"input_features": normal(units, 8, 32), "feature_attention_mask": torch.ones(units, 32)}, [8] * units
    if name.startswith("qwen2"):
        grid = torch.tensor([[2 if video else 1, 2, 4 + 2 * (j % 2)] for j in range(units)])
        pixels = normal(int(grid.prod(-1).sum()), 3 * 2 * 16)
        names = ("pixel_values_videos", "video_grid_thw") if video else ("pixel_values", "image_grid_thw")
        return dict(zip(names, (pixels, grid), strict=True)), (grid.prod(-1) // 4).tolist()
    if video:
        return {"pixel_values_videos": normal(units, 2, 3, 8, 8)}, [{"llava_onevision": 3}.get(name, 2)] * units
    if name in ("llava_next", "llava_next_video", "llava_onevision"):
        return {"pixel_values": normal(units, 3, 3, 8, 8), "image_sizes": torch.tensor([[8, 16]] * units)}, [14] * units
    if name == "internvl":
        return {"pixel_values": normal(units, 3, 8, 8)}, [1] * units
    return {"pixel_values": normal(units, 3, 8, 8)}, [{"idefics2": 2, "smolvlm": 1, "idefics3": 1}.get(name, 4)] * units


def batch(name, owners, rows, video=False, sizes=None):
    """(input_ids and the like of the whole batch, the same of each row alone)."""
    given, tokens = media(name, len(owners), video)
    tokens = sizes or tokens
    token = SOUND if name == "qwen2_audio" else VIDEO if video else IMAGE
    words = torch.randint(3, 58, (rows, 80), generator=torch.Generator().manual_seed(5))
    filled = [1] * rows
    for owner, n in zip(owners, tokens, strict=True):  # with a word after each
        words[owner, filled[owner] : filled[owner] + n] = token
        filled[owner] += n + 1
    ids = words[:, : max(filled) + 3]
    per_row = name in ("smolvlm", "idefics2", "idefics3")
    most = max(owners.count(row) for row in range(rows))

    def of(which):
        units = [j for j, owner in enumerate(owners) if owner in which]
        cut = {
            key: value[units] for key, value in given.items() if not name.startswith("qwen2_") or name == "qwen2_audio"
        }
        if name.startswith("qwen2_") and name != "qwen2_audio":
            pixels, grid = given.values()
            parts = pixels.split(grid.prod(-1).tolist())
            cut = dict(zip(given, (torch.cat([parts[j] for j in units]), grid[units]), strict=True)) if units else {}
        if per_row and units:
            padded = torch.zeros(len(which), most, 3, 8, 8)
            for i, row in enumerate(which):
                own = given["pixel_values"][[j for j in units if owners[j] == row]]
                padded[i, : len(own)] = own
            cut = {"pixel_values": padded}
        kinds = (ids == token).long() * (2 if video else 1)
        more = {"token_type_ids": kinds[which]} if name == "gemma3" else {}
        more |= {"mm_token_type_ids": kinds[which]} if name in ("qwen2_vl", "qwen2_5_vl") else {}
        return {
            "input_ids": ids[which],
            "attention_mask": torch.ones_like(ids[which]),
            **more,
            **(cut if units else {}),
        }

    return of(list(range(rows))), [of([row]) for row in range(rows)]


@torch.no_grad()
def assert_each_row_is_as_if_alone(model, whole, alone, **more):
    gate = gates(len(alone))
    logits = model(**whole, ilora_gate=gate, **more).logits
    others = model(**whole, ilora_gate=gate.roll(1, 0), **more).logits
    for row, own in enumerate(alone):
        expected = model(**own, ilora_gate=gate[row : row + 1]).logits[0]
        torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)
        assert (others[row] - expected).abs().max() > 1e-2


CASES = [(name, False) for name in MODELS] + [
    (name, True) for name in ("llava_next_video", "llava_onevision", "qwen2_vl", "qwen2_5_vl")
]
LAYOUTS = {
    "one each": [0, 1],
    "two each": [0, 0, 1, 1],
    "both in the first": [0, 0],
    "uneven": [0, 0, 1],
    "late": [1, 2, 2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "video"), CASES)
def test_each_row_is_as_if_alone(name, video, layout):
    owners = LAYOUTS[layout]
    assert_each_row_is_as_if_alone(make(name), *batch(name, owners, max(owners[-1] + 1, 2), video))


GENERATED = {
    "qwen2_audio": [[0, 1], [0, 0, 1], [0, 0]],  # without the two beams of several sounds in a row, which no one maps
    "smolvlm": [[0, 1], [0, 0, 1]],
    "llava_onevision": [[0, 1], [0, 0, 1]],
    "qwen2_vl": [[0, 1], [0, 1, 1]],
    "llava": [[0, 0, 1, 1], [1, 1, 1]],
}


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize(("name", "owners"), [(name, owners) for name, each in GENERATED.items() for owners in each])
def test_generation_is_as_if_alone(name, owners, beams):
    model, gate = make(name), gates(2)
    whole, alone = batch(name, owners, 2)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": beams}
    if name == "qwen2_audio" and beams == 2 and len(owners) != 2:
        pytest.skip("transformers repeats each sound by itself, so that the rows find others' sounds")
    both = model.generate(**whole, ilora_gate=gate, **settings)
    for row in range(2):
        own = model.generate(**alone[row], ilora_gate=gate[row : row + 1], **settings)[0]
        assert torch.equal(both[row], own)
    assert not torch.equal(both, model.generate(**whole, ilora_gate=gate.flip(0), **settings))


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen2_audio", "llava"])
def test_generate_takes_the_rows_from_its_caller(name):
    model, gate, settings = make(name), gates(2), {"max_new_tokens": 3, "do_sample": False, "num_beams": 2}
    whole, _ = batch(name, [0, 1], 2)
    expected = model.generate(**whole, ilora_gate=gate, **settings)
    assert torch.equal(model.generate(**whole, ilora_gate=gate, ilora_media_rows=[0, 1], **settings), expected)
    with pytest.raises(ValueError, match="rows of the batch"):
        model.generate(**whole, ilora_gate=gate, ilora_media_rows=[0, 2], **settings)


@torch.no_grad()
def test_sounds_of_different_lengths():
    model, gate = make("qwen2_audio"), gates(2)
    sounds = torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([32, 16, 32])
    mask = (torch.arange(32) < lengths[:, None]).float()

    def text(*counts):
        ids = torch.randint(3, 58, (len(counts), 20), generator=torch.Generator().manual_seed(2))
        for row, count in zip(ids, counts, strict=True):
            row[1 : 1 + count] = SOUND
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    one_each = {"input_features": sounds[:2], "feature_attention_mask": mask[:2]}
    words = text(8, 4)
    logits = model(**words, **one_each, ilora_gate=gate).logits
    for row in range(2):
        cut = {key: value[row : row + 1] for key, value in {**words, **one_each}.items()}
        alone = model(**cut, ilora_gate=gate[row : row + 1]).logits
        torch.testing.assert_close(logits[row : row + 1], alone, rtol=1e-4, atol=1e-4)
    three = {"input_features": sounds, "feature_attention_mask": mask}
    with pytest.raises(ValueError, match=r"model\.audio_tower\.\S+: nothing tells.*input_features.*ilora_media_rows"):
        model(**text(12, 8), **three, ilora_gate=gate)
    told = model(**text(12, 8), **three, ilora_gate=gate, ilora_media_rows=[0, 0, 1]).logits
    words = text(12, 8)
    for row, units in enumerate(([0, 1], [2])):
        cut = {key: value[units] for key, value in three.items()}
        own = {key: value[row : row + 1] for key, value in words.items()}
        alone = model(**own, **cut, ilora_gate=gate[row : row + 1]).logits
        torch.testing.assert_close(told[row : row + 1], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "smolvlm", "qwen2_vl", "qwen2_audio", "gemma3"])
def test_whoever_gives_embeddings_says_the_rows(name):
    model, owners, gate = make(name), [0, 0, 1], gates(2)
    whole, _ = batch(name, owners, 2)
    expected = model(**whole, ilora_gate=gate).logits
    ids = whole.pop("input_ids")
    if name == "qwen2_audio":  # which reads its sounds where it finds ids alone
        whole["input_ids"] = ids
        model(**whole, ilora_gate=gate, ilora_media_rows=torch.tensor(owners))
        return
    whole["inputs_embeds"] = model.get_input_embeddings()(ids)
    if name == "qwen2_vl":
        whole["position_ids"] = torch.arange(ids.shape[1]).expand(3, 2, -1)
        expected = model(
            input_ids=ids, **{k: v for k, v in whole.items() if k != "inputs_embeds"}, ilora_gate=gate
        ).logits
    with pytest.raises(ValueError, match=r"there are no input_ids.*ilora_media_rows.*exclude_modules=r'(.*)'"):
        model(**whole, ilora_gate=gate)
    found = model(**whole, ilora_gate=gate, ilora_media_rows=owners).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    wrong = model(**whole, ilora_gate=gate, ilora_media_rows={"pixel_values": [0, 1, 1]}).logits
    assert (wrong - expected).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("name", ["smolvlm", "qwen2_vl", "qwen2_audio", "llava_onevision"])
def test_the_advice_that_a_refusal_gives_is_right(name):
    """The modules that it names leave every layer out that sees media: text and media then are as if alone."""
    model, owners = make(name), [0, 0, 1]
    whole, alone = batch(name, owners, 2)
    ids, arguments = whole["input_ids"], {"inputs_embeds": model.get_input_embeddings()(whole["input_ids"]), **whole}
    del arguments["input_ids"]
    if name == "qwen2_audio":
        text = {**whole, "input_ids": torch.where(ids == SOUND, 5, ids)}
    else:
        text = {**arguments, "position_ids": torch.arange(ids.shape[1]).expand(2, -1)}
    with pytest.raises(ValueError, match="exclude_modules=r'.*'") as refusal:
        model(**text, ilora_gate=gates(2))
    advice = str(refusal.value).split("exclude_modules=r'")[1].split("'")[0]
    words_alone = make(name, exclude_modules=advice)
    assert words_alone.ilora.adapter.layers
    assert all("language_model" in path or "text_model" in path for path in words_alone.ilora.adapter.layers)
    assert_each_row_is_as_if_alone(words_alone, whole, alone)


REFUSED = {
    "no media": ({}, [0, 1], ValueError, "has media in no argument; leave it out"),
    "too high": ({"pixel_values": 2}, [0, 2], ValueError, "rows of the batch, 0 to 1, got"),
    "floats": ({"pixel_values": 2}, [0.0, 1.0], TypeError, "one integer for each medium"),
    "another name": ({"pixel_values": 2}, {"pixel_values_videos": [0, 1]}, ValueError, "only in .'pixel_values'"),
    "too many": ({"pixel_values": 2}, [0, 1, 1], ValueError, "vision_tower.*nothing tells"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rows_that_are_no_rows(case):
    given, rows, error, words = REFUSED[case]
    whole, _ = batch("llava", [0, 1], 2)
    if not given:
        del whole["pixel_values"]
    with pytest.raises(error, match=words):
        make("llava")(**whole, ilora_gate=gates(2), ilora_media_rows=rows)


@torch.no_grad()
def test_images_and_videos_in_one_call():
    """One row has the images, the other the videos: each kind by its own placeholders."""
    model, gate = make("qwen2_vl"), gates(2)
    images, (first, _) = batch("qwen2_vl", [0, 0], 2)
    videos, (_, last) = batch("qwen2_vl", [1], 2, video=True)
    length = max(images["input_ids"].shape[1], videos["input_ids"].shape[1])

    def row(own):
        padded = {key: own[key] for key in ("input_ids", "attention_mask", "mm_token_type_ids")}
        return {key: torch.nn.functional.pad(value, (0, length - value.shape[1])) for key, value in padded.items()}

    text = {key: torch.cat([row(first)[key], row(last)[key]]) for key in row(first)}
    pixels = {key: own[key] for own in (first, last) for key in own if key not in text}
    logits = model(**text, **pixels, ilora_gate=gate).logits
    for i, own in enumerate((first, last)):
        n = own["input_ids"].shape[1]
        alone = model(**own, ilora_gate=gate[i : i + 1]).logits
        torch.testing.assert_close(logits[i : i + 1, :n], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_under_checkpointing(reentrant):
    whole, alone = batch("smolvlm", [0, 0, 1], 2)
    model, leaf = make("smolvlm").train(), gates(2).requires_grad_()
    sums = [model(**own, ilora_gate=leaf[i : i + 1]).logits.square().sum() for i, own in enumerate(alone)]
    wanted = torch.autograd.grad(sum(sums), [leaf, *(p for p in model.parameters() if p.requires_grad)])
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    loss = model(**whole, ilora_gate=leaf).logits.square().sum()
    loss.backward()
    found = [leaf.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


def test_text_pays_nothing():
    """A call without media asks neither the configuration nor the modules."""
    model = make("llava")
    model.ilora.state.text_modules = None
    ids = torch.randint(3, 58, (2, 6))
    model(input_ids=ids, ilora_gate=gates(2))
    assert model.ilora.state.current.media is None
    assert model.ilora.state.text_modules is None
