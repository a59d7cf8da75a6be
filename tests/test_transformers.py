"""Backbones give what transformers makes of the same files; skipped where it is not installed.

Models, vocabularies and preprocessing are random or tiny, and saved by transformers itself.
"""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from miniatures import new_parts, tiny_config
from open_clip import SimpleTokenizer
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CustomTextCLIP
from PIL import Image
from theirs import KINDS, TEXT, VISION, LetterTokenizer, alike, features, make_folder
from torch import nn
from torch.func import functional_call

from benchmarks import architectures
from dapt.clip.asking import maps_of
from dapt.clip.backbone import Backbone, Preprocessing
from dapt.clip.hub_format import FAMILIES
from dapt.clip.hub_vision import FAMILIES as IMAGE_FAMILIES
from dapt.clip.image import encode_image
from dapt.clip.sources import load_backbone
from dapt.clip.text import ClassTokens, TextEncoder
from dapt.data.views import centre_view
from dapt.engine.classifier import inside_of

transformers = pytest.importorskip("transformers")

NAMES = ["cat", "sea lion", "Hot Air Balloon"]
SENTENCES = [f"a photo of a {name}." for name in NAMES]
LENGTH = 48


def clips_vocabulary(folder):
    usual = SimpleTokenizer()
    ends = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    words = {ends.get(word, word): number for word, number in usual.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(words))
    lines = ["#version: 0.2", *map(" ".join, usual.bpe_ranks)]
    (folder / "merges.txt").write_text("\n".join(lines))
    return transformers.CLIPTokenizer.from_pretrained(str(folder))


def sentence_pieces(folder, name, **ids):
    """A vocabulary of letters and some words, as sentencepiece learns it."""
    sentencepiece = pytest.importorskip("sentencepiece")
    texts = [f"{s.lower()} {s[::-1].lower()}" for s in SENTENCES] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(folder / name), vocab_size=60,
        hard_vocab_limit=False, minloglevel=2, **ids,
    )  # fmt: skip
    (folder / f"{name}.vocab").unlink()
    return str(folder / f"{name}.model")


def siglips_vocabulary(folder):
    file = sentence_pieces(folder, "spiece", unk_id=2, bos_id=-1, eos_id=1, pad_id=0)
    return transformers.SiglipTokenizer(file, model_max_length=LENGTH)


def metaclips_vocabulary(folder):
    sentence_pieces(folder, "sentencepiece.bpe", unk_id=0, bos_id=1, eos_id=2, pad_id=-1)
    return transformers.XLMRobertaTokenizer.from_pretrained(str(folder))


def berts_vocabulary(folder):
    letters = sorted(set("".join(SENTENCES).lower()) - {" "})
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "photo", *letters]
    (folder / "vocab.txt").write_text("\n".join([*words, *(f"##{x}" for x in letters)]) + "\n")
    return transformers.BertTokenizer.from_pretrained(str(folder))


def image_processor(kind, **given):
    """transformers' own, by Pillow, which is what ours computes with."""
    name = f"{kind}ImageProcessor"
    return getattr(transformers, f"{name}Pil", getattr(transformers, name))(**given)


CROPPED = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
SQUASHED = {"size": {"height": 32, "width": 32}}
GELU = {"hidden_act": "gelu"}
# Class, vocabulary, class and settings of preprocessing, changes of both towers and of the text's.
MODELS = {
    "clip": ("CLIP", clips_vocabulary, "CLIP", CROPPED, {}, {}),
    "clip gelu": ("CLIP", clips_vocabulary, "CLIP", CROPPED | {"resample": 2}, GELU, {}),
    "siglip": ("Siglip", siglips_vocabulary, "Siglip", SQUASHED, {},
               {"hidden_size": 39, "num_attention_heads": 3}),
    "metaclip_2": ("MetaClip2", metaclips_vocabulary, "CLIP", CROPPED, {}, {"eos_token_id": 2}),
    "chinese_clip": ("ChineseCLIP", berts_vocabulary, "ChineseCLIP",
                     SQUASHED | {"do_center_crop": False}, {}, {}),
}  # fmt: skip


def saved(folder, kind, **how):
    """A random model of a kind, its tokenizer and preprocessing, all saved into a folder."""
    kind, vocabulary, seen, preprocessing, both, words = MODELS[kind]
    if not hasattr(transformers, f"{kind}Model"):
        pytest.skip(f"this transformers knows no {kind}")
    tokenizer, images = vocabulary(folder), image_processor(seen, **preprocessing)
    text = {
        **TEXT,
        **both,
        **words,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": LENGTH,
    }
    config = getattr(transformers, f"{kind}Config")(
        text_config=text, vision_config={**VISION, **both},
        **({} if kind == "Siglip" else {"projection_dim": 24}),
    )  # fmt: skip
    torch.manual_seed(2)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    with torch.no_grad():  # what starts as ones and zeros would hide what is left out
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter) * bool(parameter.ndim)
    for part in (model, tokenizer, images):
        part.save_pretrained(folder, **(how if part is model else {}))
    return model, tokenizer, images


@pytest.mark.parametrize("how", [{}, {"max_shard_size": "100KB"}], ids=["whole", "shards"])
@pytest.mark.parametrize("kind", MODELS)
def test_photos_and_names_get_the_logits_that_transformers_gives(tmp_path, kind, how):
    model, tokenizer, images = saved(tmp_path, kind, **how)
    backbone = load_backbone(str(tmp_path))
    generator = np.random.default_rng(0)
    shapes = ((50, 70, 3), (32, 32, 3), (90, 40, 3))
    photos = [Image.fromarray(generator.integers(0, 256, s, dtype=np.uint8)) for s in shapes]
    given = {"pixel_values": torch.as_tensor(np.asarray(images(photos)["pixel_values"]))}
    views = [centre_view(p, **backbone.preprocessing.of_views()) for p in photos]
    views = torch.stack([torch.from_numpy(np.array(v)).permute(2, 0, 1) for v in views])
    pixels = backbone.normalize(views)
    torch.testing.assert_close(pixels, given["pixel_values"], atol=1e-5, rtol=0)
    how = {"padding": "max_length", "max_length": LENGTH, "truncation": True}
    words = tokenizer(SENTENCES, return_tensors="pt", **how)
    for row, ids in zip(backbone.tokenize(SENTENCES), words.input_ids.tolist(), strict=True):
        assert row == ids[: len(row)]
        assert set(ids[len(row) :]) <= {tokenizer.pad_token_id}
    if kind != "siglip":
        given["attention_mask"] = words.attention_mask
    tokens = ClassTokens.for_template(backbone, NAMES, "a photo of a {}.")
    with torch.no_grad():
        theirs = model(input_ids=words.input_ids, **given)
        image, text = encode_image(backbone.visual, pixels), TextEncoder(backbone, tokens)()
    alike(image, theirs.image_embeds)
    alike(text, theirs.text_embeds)
    logits = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    logits = backbone.logit_scale * logits + backbone.logit_bias
    torch.testing.assert_close(logits, theirs.logits_per_image, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_towers_give_what_transformers_gives(tmp_path, kind, letters):
    if kind.split()[0] not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers knows no {kind}")
    make_folder(tmp_path, kind)
    if not kind.startswith("clip"):
        (tmp_path / "tokenizer.json").write_text("{}")
    pixels, ids, image, text = features(load_backbone(str(tmp_path)))
    model = transformers.AutoModel.from_pretrained(str(tmp_path)).eval()
    given = {"pixel_values": pixels}
    if kind == "siglip2":
        patches = pixels.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1)
        given = {"pixel_values": patches.flatten(3).flatten(1, 2),
                 "pixel_attention_mask": torch.ones(3, 16, dtype=torch.long),
                 "spatial_shapes": torch.tensor([[4, 4]] * 3)}  # fmt: skip
    with torch.no_grad():
        theirs = model(input_ids=ids, **given)
    alike(image, theirs.image_embeds)
    alike(text, theirs.text_embeds)


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_a_configuration_leaves_out_is_as_it_is_there(kind):
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers knows no {kind}")
    theirs = transformers.CONFIG_MAPPING[kind]()
    for tower in ("vision", "text"):
        usual = getattr(FAMILIES[kind], tower)
        part = getattr(theirs, f"{tower}_config")
        told = {key: getattr(part, key) for key in usual if hasattr(part, key)}
        assert told
        assert told.items() - {("projection_size", part.hidden_size)} <= usual.items()


def text_towers():
    small = {"vocab_size": 100, "hidden_size": 48, "num_hidden_layers": 2, "pad_token_id": 1,
             "num_attention_heads": 4, "intermediate_size": 64}  # fmt: skip
    return {
        # Chinese-CLIP's
        "bert": (transformers.BertConfig(**small), "cls_last_hidden_state_pooler"),
        "roberta": (transformers.RobertaConfig(**small), "mean_pooler"),
        "xlm-roberta": (transformers.XLMRobertaConfig(**small), "mean_pooler"),
        "mt5": (transformers.MT5Config(vocab_size=100, d_model=48, d_kv=12, d_ff=64, num_layers=2,
                                       num_heads=4), "mean_pooler"),
        "nllb": (transformers.M2M100Config(
            vocab_size=100, d_model=48, encoder_layers=2, encoder_attention_heads=4,
            encoder_ffn_dim=64, decoder_layers=1, decoder_ffn_dim=8, pad_token_id=1),
            "cls_pooler"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta", "mt5", "nllb"])
def test_nothing_fails_with_text_towers_of_transformers(kind, monkeypatch):
    """Those of open_clip's architectures and Chinese-CLIP, small: zero-shot, prompts, heads."""
    config, pooler = text_towers()[kind]
    torch.manual_seed(4)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *_, **__: config)
    text = HFTextEncoder("", 24, pooler_type=pooler, proj_type="linear", pretrained=False)
    model = nn.Module()
    model.visual = CustomTextCLIP(**tiny_config(embed_dim=24)).visual.eval()
    model.text, model.logit_scale = text.eval(), nn.Parameter(torch.tensor(1.5))
    seen = Preprocessing(32, (0.5,) * 3, (0.5,) * 3)
    how = {"name": kind, "device": torch.device("cpu"), "precision": "fp32"}
    backbone = Backbone(model, architectures.Letters(24, config.pad_token_id), seen, **how)
    monkeypatch.setattr(architectures, "load", lambda _: backbone)
    monkeypatch.delitem(architectures.CHECKS, "ONNX")  # which has no text tower in it
    found = architectures.asked(kind)
    expected = dict.fromkeys(("loads", *architectures.CHECKS), "works")
    assert {k: v for k, (v, _) in found.items()} == expected
    own = copy.deepcopy(backbone.text)
    part = new_parts(backbone, "clip-lora", lora_dropout=0.0)[0]
    with torch.no_grad():
        for parameter in part.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        weights = {
            f"{path}.weight": own.get_submodule(path).weight + part.change(layer, name)
            for layer, places in enumerate(maps_of(own))
            for (name,), path in places.items()
            if name in "qkv"
        }
        assert len(weights) == 6
        encoder = TextEncoder(backbone, ClassTokens.for_template(backbone, ["cat", "dog"], "a {}."))
        ids = backbone.tokenizer(["a cat.", "a dog."], context_length=24)
        expected = functional_call(own, weights, (ids,))
        assert (expected - own(ids)).norm() > 1e-2 * expected.norm()
        found = encoder(inside_of([part], "text"))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_random_weights_are_random_in_text_towers_of_transformers_too(monkeypatch):
    """Nothing is fetched for them but a configuration; open_clip's own way fetches the tower."""
    config, _ = text_towers()["roberta"]
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *_, **__: config)
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", lambda *_, **__: 1 / 0)
    monkeypatch.setattr("open_clip.get_tokenizer", lambda *_, **__: LetterTokenizer())
    assert load_backbone("roberta-ViT-B-32", "random").text_width == config.hidden_size


IMAGES = {
    "vit": ("ViTForImageClassification", "ViT", {"intermediate_size": 50}),
    "vit without biases": ("ViTModel", "ViT", {"intermediate_size": 50, "qkv_bias": False}),
    "dinov2": ("Dinov2Model", "Bit", {}),
    "dinov2 giant": ("Dinov2ForImageClassification", "Bit", {"use_swiglu_ffn": True}),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", "Bit", {"num_register_tokens": 3}),
    "dinov3": ("DINOv3ViTModel", "ViT", {"intermediate_size": 50, "num_register_tokens": 4}),
    "dinov3 plus": ("DINOv3ViTModel", "ViT", {
        "intermediate_size": 50, "num_register_tokens": 4, "use_gated_mlp": True,
        "hidden_act": "silu", "query_bias": False, "value_bias": False}),
}  # fmt: skip


@pytest.mark.parametrize("side", [32, 24])
@pytest.mark.parametrize("kind", IMAGES)
def test_models_of_images_alone_give_what_transformers_gives(tmp_path, kind, side):
    """At the size of its positions and at another one, to which they are fitted."""
    name, seen, more = IMAGES[kind]
    if not hasattr(transformers, name):
        pytest.skip(f"this transformers knows no {name}")
    model = getattr(transformers, name)
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8}
    torch.manual_seed(2)
    model = model(model.config_class(**sizes, image_size=32, **more)).eval()
    with torch.no_grad():  # what starts as ones and zeros would hide what is left out
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    crop = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    square = {"size": {"height": side, "width": side}, "do_center_crop": False}
    images = image_processor(seen, **(crop if seen == "Bit" else square))
    images.save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path))
    generator = np.random.default_rng(0)
    photos = [Image.fromarray(generator.integers(0, 256, s, dtype=np.uint8))
              for s in ((50, 70, 3), (90, 40, 3))]  # fmt: skip
    given = torch.as_tensor(np.asarray(images(photos)["pixel_values"]))
    views = [centre_view(p, **backbone.preprocessing.of_views()) for p in photos]
    pixels = backbone.normalize(torch.stack(
        [torch.from_numpy(np.array(v)).permute(2, 0, 1) for v in views]))  # fmt: skip
    torch.testing.assert_close(pixels, given, atol=1e-5, rtol=0)
    how = {"interpolate_pos_encoding": True} if name.startswith("ViT") else {}
    with torch.no_grad():
        theirs = model.base_model if "Classification" in name else model
        expected = theirs(given, **how).last_hidden_state[:, 0]
        found = encode_image(backbone.visual, pixels)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_what_a_configuration_of_images_alone_leaves_out_is_as_it_is_there():
    for kind, family in IMAGE_FAMILIES.items():
        if kind in transformers.CONFIG_MAPPING:
            theirs = transformers.CONFIG_MAPPING[kind]()
            told = {key: getattr(theirs, key, value) for key, value in family.usual.items()}
            assert told == family.usual
