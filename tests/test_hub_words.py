"""How images and words are made ready, as a folder of transformers' says."""

import json

import pytest
from open_clip import SimpleTokenizer
from open_clip.constants import OPENAI_DATASET_MEAN
from theirs import KINDS, TEXT, Plain, alike, features, make_folder, vocabulary

from dapt.clip.hub_format import translate
from dapt.clip.sources import load_backbone, taken_for_granted
from dapt.errors import UserError


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_images_are_made_ready_as_the_folder_says(tmp_path, name):
    make_folder(tmp_path)
    assert "no preprocessor_config.json or tokenizer.json" in taken_for_granted(str(tmp_path))
    said = {"size": {"height": 32, "width": 32}, "image_mean": [0.1, 0.2, 0.3], "resample": 2,
            "image_std": [0.5] * 3, "do_normalize": True, "rescale_factor": 1 / 255}  # fmt: skip
    nested = {"image_processor": said, "processor_class": "CLIPProcessor"}
    (tmp_path / name).write_text(json.dumps(nested if name.startswith("proc") else said))
    seen = load_backbone(str(tmp_path)).preprocessing
    assert (seen.mean, seen.std) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    assert (seen.size, seen.resize_mode, seen.interpolation) == (32, "squash", "bilinear")
    assert "no tokenizer.json:" in taken_for_granted(str(tmp_path))


@pytest.mark.parametrize(
    ("said", "mode", "interpolation"),
    [
        ({"size": 32, "crop_size": 32, "resample": 3}, "shortest", "bicubic"),
        ({"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}, "shortest",
         "bicubic"),
        ({"size": {"height": 32, "width": 32}, "resample": 1}, "squash", "lanczos"),
        ({"size": [32, 32], "resample": 0}, "squash", "nearest"),
        # What is told of a crop that is not made does not count.
        ({"size": {"height": 32, "width": 32}, "crop_size": 24, "do_center_crop": False}, "squash",
         "bicubic"),
        ({"size": 32, "crop_size": {"height": 24, "width": 24}, "do_center_crop": None}, "shortest",
         "bicubic"),
        ({"size": 32, "crop_size": 32, "use_square_size": True}, "squash", "bicubic"),
        ({"size": None, "crop_size": None, "image_mean": None, "resample": None}, "shortest",
         "bicubic"),
    ],
)  # fmt: skip
def test_sizes_and_filters_in_the_forms_of_all_versions(tmp_path, said, mode, interpolation):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", **KINDS["clip"]}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    seen = translate(tmp_path).preprocessing
    assert (seen["resize_mode"], seen["interpolation"]) == (mode, interpolation)
    assert seen["mean"] == OPENAI_DATASET_MEAN  # where none is told


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"size": {"shortest_edge": 36}, "crop_size": 32}, r"cropped to \[32, 36\]"),
        ({"do_rescale": False}, "here they are resized to the tower's 32 px, from 0 to 1"),
        ({"rescale_factor": 1 / 127.5}, "from 0 to 1"),
        ({"image_mean": [0.5]}, "says of images what cannot be"),
        ({"resample": 9}, r"resampling 9, .* known are 0 to 3 \(nearest, lanczos"),
        ({"resample": -1}, "asks for the resampling -1"),
        ({"do_resize": False}, "that are not resized; here they are, to 32 px"),
        ({"size": [32]}, "no transformers model that can be read"),
        ({"size": "large"}, "no transformers model that can be read|asks for images"),
    ],
)
def test_other_preprocessing_is_refused(tmp_path, changes, said):
    make_folder(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(changes))
    with pytest.raises(UserError, match=said):
        load_backbone(str(tmp_path))


@pytest.mark.parametrize("form", ["two files", "one file", "one file of pairs"])
def test_a_vocabulary_of_its_own(tmp_path, form):
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o")]
    words = vocabulary(merges)
    text = {**TEXT, "vocab_size": len(words), "eos_token_id": len(words) - 1}
    make_folder(tmp_path, text_config=text)
    with pytest.raises(UserError, match="holds no vocabulary"):
        load_backbone(str(tmp_path))
    if form == "two files":
        (tmp_path / "vocab.json").write_text(json.dumps(words))
        lines = ["#version: 0.2", *map(" ".join, merges)]
        (tmp_path / "merges.txt").write_text("\n".join(lines) + "\n")
    else:
        pairs = merges if form.endswith("pairs") else [" ".join(m) for m in merges]
        model = {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": words, "merges": pairs}
        (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    backbone = load_backbone(str(tmp_path))
    start, end = words["<|startoftext|>"], words["<|endoftext|>"]
    assert backbone.tokenize(["Cat"]) == [[start, words["cat</w>"], end]]
    assert backbone.tokenize(["dog"]) == [[start, words["do"], words["g</w>"], end]]


def test_clips_own_vocabulary_is_the_same_from_files(tmp_path):
    """What open_clip would make of the weights is found again, by its fingerprint."""
    make_folder(tmp_path)
    bare, usual = load_backbone(str(tmp_path)), SimpleTokenizer()
    merges = list(usual.bpe_ranks)
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary(merges)))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]))
    words = json.loads((tmp_path / "vocab.json").read_text())
    assert words.items() - usual.encoder.items() == {("<|startoftext|>", 49406),
                                                     ("<|endoftext|>", 49407)}  # fmt: skip
    assert load_backbone(str(tmp_path)).fingerprint == bare.fingerprint


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"a": None}, "lacks 'a'"),
        ({"<|endoftext|>": 3}, "texts end with token 3"),
        ({"<|startoftext|>": None}, "cannot be used"),
        ({"a": "x"}, "cannot be used"),
    ],
)
def test_a_vocabulary_that_does_not_fit(tmp_path, change, said):
    words = {k: v for k, v in {**vocabulary([]), **change}.items() if v is not None}
    make_folder(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UserError, match=said):
        load_backbone(str(tmp_path))


def test_an_end_that_is_not_the_greatest_token(tmp_path):
    """A fine-tuned model with tokens added after the end: the end is still what is read."""
    text = {**TEXT, "vocab_size": 49410, "eos_token_id": 49407}
    config, state = make_folder(tmp_path, text_config=text)
    words = vocabulary(list(SimpleTokenizer().bpe_ranks)) | {"<new>": 49408, "<newer>": 49409}
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    lines = ["#version: 0.2", *map(" ".join, SimpleTokenizer().bpe_ranks)]
    (tmp_path / "merges.txt").write_text("\n".join(lines))
    backbone = load_backbone(str(tmp_path))
    assert backbone.text.pool_type == "eos"
    _, ids, _, text_features = features(backbone)
    alike(text_features, Plain(state, config).words(ids))


def test_nothing_beside_a_vocabulary_is_run(tmp_path, letters):
    make_folder(tmp_path, "siglip")
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    load_backbone(str(tmp_path))
    assert letters.given["trust_remote_code"] is False
    assert letters.given["local_files_only"] is True
