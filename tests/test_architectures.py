"""Towers built otherwise than CLIP's: prompts by hand in their own modules, and refusals."""

import json
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from miniatures import new_parts, tiny_config
from open_clip.hf_model import HFTextEncoder, MeanPooler
from open_clip.model import CustomTextCLIP
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer
from safetensors.torch import save_file
from timm.layers import HybridEmbed
from timm.models import Eva, NaFlexVit, NaFlexVitCfg, VisionTransformer
from torch import nn
from typer.testing import CliRunner

from benchmarks import architectures
from dapt.clip.backbone import Backbone, Preprocessing
from dapt.clip.image import encode_image
from dapt.clip.inside import Inside
from dapt.clip.text import ClassTokens, TextEncoder
from dapt.engine.classifier import Classifier, inside_of
from dapt.engine.suited import suited
from dapt.errors import UserError
from dapt.methods import get_method
from dapt.methods.ivlp import DeepContext, DeepVisual
from dapt.methods.prompts import VisualPrompt
from dapt.run.load import load_classifier
from dapt.run.train import check_output, train
from dapt.settings import make_settings

SIZE, WIDTH, OUT, PATCH = 32, 48, 24, 8
NAMES = ["cat", "sea lion", "hot air balloon"]
SMALL = {"img_size": SIZE, "embed_dim": WIDTH, "num_classes": OUT}
LAYERS = {"patch_size": PATCH, "depth": 3, "num_heads": 2, "mlp_ratio": 2.0}
TURNING = {"use_rot_pos_emb": True, "ref_feat_shape": 4}


class Stem(nn.Module):
    """The convolutions of a hybrid: feature maps of half the image's side."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)

    def forward(self, x):
        return self.conv(x)


def naflex(**changes):
    """NaFlex, whose size is told apart."""
    config = NaFlexVitCfg(embed_dim=WIDTH, pos_embed_grid_size=(4, 4), **LAYERS, **changes)
    return NaFlexVit(config, num_classes=OUT, img_size=SIZE)


# What open_clip's and the hub's models of timm's trunks are, in miniature.
TRUNKS = {
    "eva02": lambda: Eva(**SMALL, **LAYERS, **TURNING, global_pool="token", qkv_fused=False,
                         swiglu_mlp=True, scale_mlp=True),
    "eva01": lambda: Eva(**SMALL, **LAYERS, global_pool="token"),
    "eva-mean": lambda: Eva(**SMALL, **LAYERS, **TURNING, global_pool="avg"),
    "pe-core": lambda: Eva(**SMALL, **LAYERS, **TURNING, global_pool="map", attn_type="rope",
                           use_pre_transformer_norm=True, use_fc_norm=False, rope_grid_offset=1.0,
                           rope_grid_indexing="xy"),
    "eva-registers": lambda: Eva(**SMALL, **LAYERS, **TURNING, global_pool="token",
                                 num_reg_tokens=2, no_embed_class=True),
    "eva-mixed": lambda: Eva(**SMALL, **LAYERS, use_rot_pos_emb=True, rope_type="mixed",
                             attn_type="rope", global_pool="avg"),
    "naflex-map": lambda: naflex(global_pool="map"),
    "naflex-registers": lambda: naflex(global_pool="avg", reg_tokens=2),
    "naflex-turning": lambda: naflex(global_pool="map", rope_type="axial", attn_type="rope"),
    "naflex-mixed": lambda: naflex(global_pool="avg", rope_type="mixed", attn_type="rope"),
    "vit-token": lambda: VisionTransformer(**SMALL, **LAYERS, pre_norm=True),
    "vit-map": lambda: VisionTransformer(**SMALL, **LAYERS, global_pool="map", class_token=False),
    "vit-mean": lambda: VisionTransformer(**SMALL, **LAYERS, global_pool="avg", class_token=False),
    "vit-registers": lambda: VisionTransformer(**SMALL, **LAYERS, reg_tokens=3,
                                               no_embed_class=True, global_pool="avg"),
    "vit-hybrid": lambda: VisionTransformer(
        **SMALL, **(LAYERS | {"patch_size": 4}),
        embed_layer=partial(HybridEmbed, backbone=Stem(), proj=True)),
}  # fmt: skip


class LetterTokenizer:
    """A token a letter, none a space. The first of a row and the last before padding are given."""

    def __init__(self, length, start=(), end=(1,), pad=1):
        self.context_length, self.start, self.end, self.pad = length, start, end, pad

    def __call__(self, texts, context_length=None):
        length = context_length or self.context_length
        ids = torch.full((len(texts), length), self.pad, dtype=torch.long)
        for row, text in zip(ids, texts, strict=True):
            letters = [3 + ord(c) % 80 for c in text if c != " "][
                : length - len(self.start) - len(self.end)
            ]
            own = torch.tensor([*self.start, *letters, *self.end], dtype=torch.long)
            row[: len(own)] = own
        return ids


def settings_for(**given):
    return make_settings({"dataset": "bundled", **given})


def backbone_of(visual=None, text=None, tokenizer=None, name="small", **model):
    """A backbone of small towers; of what is not given, CLIP's."""
    torch.manual_seed(1)
    made = CustomTextCLIP(**tiny_config(embed_dim=OUT, text_cfg__vocab_size=100), **model).eval()
    for part, tower in (("visual", visual), ("text", text)):
        if tower is not None:
            setattr(made, part, tower.eval())
    # What starts as ones and zeros would hide what is left out.
    for parameter in made.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    tokenizer = tokenizer or LetterTokenizer(77, start=(98,), end=(99,), pad=0)
    seen = Preprocessing(SIZE, (0.5,) * 3, (0.5,) * 3)
    how = {"device": torch.device("cpu"), "precision": "fp32"}
    return Backbone(made, tokenizer, seen, name=name, **how)


def tower_of(trunk):
    """open_clip's image tower of a trunk."""
    tower = TimmModel("vit_tiny_patch16_224", OUT, image_size=224, pool="token", proj=None)
    tower.trunk, tower.image_size = trunk, (SIZE, SIZE)
    return tower


def by_hand(visual, images, prompts):
    """The trunk's own layers, with prompts behind its own prefix; (N, W) each, by layer.

    Behind the prefix the trunk's own attention turns nothing.
    """
    trunk, seen = visual.trunk, []
    hooks = [b.register_forward_pre_hook(lambda m, x, more: seen.append((x[0], more)),
                                         with_kwargs=True) for b in trunk.blocks]  # fmt: skip
    trunk(images)
    for hook in hooks:
        hook.remove()
    own, count = trunk.num_prefix_tokens, len(prompts[0])
    x = seen[0][0]
    for block, (_, more), prompt in zip(trunk.blocks, seen, [*prompts, None, None], strict=False):
        before, after = x[:, :own], x[:, own + (count if block is not trunk.blocks[0] else 0) :]
        if prompt is not None:
            x = torch.cat([before, prompt.expand(len(x), -1, -1), after], 1)
        block.attn.num_prefix_tokens = own + count
        x = block(x, **more)
        block.attn.num_prefix_tokens = own
    x = torch.cat([x[:, :own], x[:, own + count :]], 1)
    return visual.head(trunk.forward_head(trunk.norm(x)))


def assert_equal(found, expected, learned):
    """Values to 1e-5 and gradients to 1e-4 of what is learned."""
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad((found * weights).sum(), learned),
        torch.autograd.grad((expected * weights).sum(), learned),
        strict=True,
    ):
        assert theirs.norm() > 1e-6
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm()


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("name", TRUNKS)
def test_visual_prompts_are_as_by_hand_in_a_trunk_of_timms(name, depth):
    torch.manual_seed(4)
    backbone = backbone_of(tower_of(TRUNKS[name]()))
    assert (backbone.vision_width, backbone.vision_layers) == (WIDTH, 3)
    assert backbone.patch_size == PATCH
    visual, images = backbone.visual, torch.randn(2, 3, SIZE, SIZE)
    part = DeepVisual.create(backbone, settings_for(visual_vectors=2, visual_depth=depth))
    learned = list(part.parameters())
    for vectors in learned:
        vectors.data = torch.randn(vectors.shape)
    found = encode_image(visual, images, inside_of([part], "image"))
    first = visual.trunk.norm_pre(learned[0])
    expected = by_hand(visual, images, [first, *learned[1:]])
    assert_equal(found, expected, learned)
    assert (found - visual(images)).abs().max() > 1e-3
    none = encode_image(visual, images, Inside(torch.zeros(0, WIDTH)))
    torch.testing.assert_close(none, visual(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["fastvit_t8", "convnext_atto", "resnet10t"])
def test_convolutions_take_text_prompts_and_heads(kind):
    trunk = timm.create_model(kind, num_classes=OUT)
    backbone = backbone_of(tower_of(trunk), name="convolutions")
    said = f"'convolutions' is a {type(trunk).__name__} of timm's, which takes no visual prompt"
    for part in (VisualPrompt, DeepVisual):
        with pytest.raises(UserError, match=f"{said}; use .*dapt-text, coop, auto"):
            part.create(backbone, settings_for())
    for hook in ("layers", "linears"):  # nothing that a method asks for is left out in silence
        with pytest.raises(UserError, match=type(trunk).__name__):
            encode_image(
                backbone.visual,
                torch.zeros(1, 3, SIZE, SIZE),
                type("Asks", (Inside,), {hook: True})(),
            )
    classifier = Classifier(backbone, NAMES, new_parts(backbone, "coop", text_vectors=4))
    classifier(torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8)).sum().backward()
    assert next(iter(classifier.learned().values())).grad.norm() > 0


def bidirectional(pool, length, eos=1, pad_mask=False):
    """SigLIP's and its like: every token sees all others, the padding too."""
    return TextTransformer(
        context_length=length, vocab_size=100, width=WIDTH, heads=2, layers=2, output_dim=OUT,
        no_causal_mask=True, pool_type=pool, eos_id=eos, proj_bias=True, use_pad_mask=pad_mask,
        pad_id=0,
    )  # fmt: skip


TEXTS = {
    "siglip": (partial(bidirectional, "last", 64), LetterTokenizer(64)),
    "siglip-end": (partial(bidirectional, "eos", 32, 99), LetterTokenizer(32, (), (99,), 0)),
    "without-end": (partial(bidirectional, "last", 32), LetterTokenizer(32, (98,), (), 0)),
    "largest": (partial(bidirectional, "argmax", 40), LetterTokenizer(40, (98,), (99,), 0)),
    "first": (partial(bidirectional, "first", 40), LetterTokenizer(40, (98,), (99,), 0)),
    "masked": (
        partial(bidirectional, "eos", 40, 99, True),
        LetterTokenizer(40, (98,), (99,), 0),
    ),
}


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("name", TEXTS)
def test_text_prompts_are_as_by_hand_where_every_token_sees_all(name, depth):
    torch.manual_seed(5)
    build, tokenizer = TEXTS[name]
    backbone = backbone_of(text=build(), tokenizer=tokenizer)
    text, start = backbone.text, len(tokenizer.start)
    part = DeepContext.create(backbone, settings_for(text_vectors=3, text_depth=depth))
    learned = list(part.parameters())
    tokens = ClassTokens.for_context(backbone, NAMES, 3)
    found = TextEncoder(backbone, tokens)(inside_of([part], "text"))

    ids = tokenizer([f"XYZ{name}." for name in NAMES])  # a stand-in for each vector
    x = text.token_embedding(ids)
    x = torch.cat([x[:, :start], learned[0].expand(3, -1, -1), x[:, start + 3 :]], 1)
    x = x + text.positional_embedding
    mask = None
    if text.use_pad_mask:
        mask = torch.zeros(3, 1, *ids.shape[1:]).masked_fill((ids == 0)[:, None], float("-inf"))
        mask = mask.expand(-1, ids.shape[1], -1).repeat_interleave(2, 0)
    for layer, block in enumerate(text.transformer.resblocks):
        if 0 < layer < depth:
            deep = learned[layer].expand(3, -1, -1)
            x = torch.cat([x[:, :start], deep, x[:, start + 3 :]], 1)
        x = block(x, attn_mask=mask)
    x = text.ln_final(x)
    places = {
        "last": torch.full((3,), ids.shape[1] - 1),
        "first": torch.zeros(3, dtype=torch.long),
        "argmax": ids.argmax(-1),
        "eos": (ids == 99).int().argmax(-1),
    }
    expected = text.text_projection(x[torch.arange(3), places[text.pool_type]])
    assert_equal(found, expected, learned)


class Encoder(nn.Module):
    """What transformers' encoders do: embeddings times a scale, positions, masked attention."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(100, WIDTH), nn.Embedding(64, WIDTH)
        layer = partial(nn.TransformerEncoderLayer, WIDTH, 2, 64, dropout=0.0, batch_first=True)
        self.layers = nn.ModuleList([layer(), layer()])

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
        x = self.words(input_ids) if inputs_embeds is None else inputs_embeds
        x = x + self.places(torch.arange(x.shape[1]))
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=attention_mask == 0)
        return SimpleNamespace(last_hidden_state=x)


def transformers_text():
    """open_clip's text tower of such an encoder; transformers itself need not be installed."""
    text = HFTextEncoder.__new__(HFTextEncoder)
    nn.Module.__init__(text)
    text.config, text.output_tokens = SimpleNamespace(pad_token_id=2), False
    text.vocab_size, text.context_length = 100, 514
    text.transformer, text.pooler = Encoder(), MeanPooler()
    text.proj = nn.Linear(WIDTH, OUT, bias=False)
    return text


def test_text_towers_of_transformers_take_templates_and_a_prompt_of_embeddings():
    torch.manual_seed(6)
    tokenizer = LetterTokenizer(40, (0,), (1,), 2)
    backbone = backbone_of(text=transformers_text(), tokenizer=tokenizer, name="foreign")
    assert (backbone.context_length, backbone.text_width) == (40, WIDTH)
    template = ClassTokens.for_template(backbone, NAMES, "a photo of a {}.")
    sentences = tokenizer([f"a photo of a {name}." for name in NAMES])
    expected = backbone.text(sentences)
    torch.testing.assert_close(TextEncoder(backbone, template)(), expected, atol=1e-5, rtol=1e-5)
    text = backbone.text
    text.output_tokens = True  # as CoCa has it
    torch.testing.assert_close(TextEncoder(backbone, template)(), expected, atol=1e-5, rtol=1e-5)
    words = new_parts(backbone, "coop", text_vectors=3, text_init="a b")[0].text_prompt
    torch.testing.assert_close(words[1].detach(), text.transformer.words.weight[3 + ord("a") % 80])


@pytest.mark.parametrize("depth", [1, 2])
def test_text_towers_of_transformers_take_prompts_in_their_layers_too(depth):
    torch.manual_seed(6)
    tokenizer = LetterTokenizer(40, (0,), (1,), 2)
    backbone = backbone_of(text=transformers_text(), tokenizer=tokenizer, name="foreign")
    assert backbone.text_layers == 2
    part = DeepContext.create(backbone, settings_for(text_vectors=4, text_depth=depth))
    learned = list(part.parameters())
    assert len(learned) == depth
    encoder = TextEncoder(backbone, ClassTokens.for_context(backbone, NAMES, 4))
    found = encoder(inside_of([part], "text"))
    text, ids = backbone.text, tokenizer([f"WXYZ{name}." for name in NAMES])

    def put(x, vectors):
        return torch.cat([x[:, :1], vectors.expand(3, -1, -1), x[:, 5:]], 1)

    x = put(text.transformer.words(ids), learned[0])
    x = x + text.transformer.places.weight[: x.shape[1]]
    for i, layer in enumerate(text.transformer.layers):
        x = put(x, learned[i]) if 0 < i < depth else x
        x = layer(x, src_key_padding_mask=ids == 2)
    x = torch.stack([row[own != 2].mean(0) for row, own in zip(x, ids, strict=True)])
    assert_equal(found, text.proj(x), learned)
    # Nothing of it stays behind in the tower.
    sentences = tokenizer([f"a {name}." for name in NAMES])
    alone = ClassTokens.for_template(backbone, NAMES, "a {}.")
    torch.testing.assert_close(
        TextEncoder(backbone, alone)(), text(sentences), atol=1e-5, rtol=1e-5
    )
    changes = type("Changes", (Inside,), {"norms": True})(learned[0])
    with pytest.raises(UserError, match="HFTextEncoder, whose norms stay as they are; use"):
        encoder(changes)


def test_more_layers_than_a_tower_has_are_told_where_they_were_asked_for():
    backbone, told = backbone_of(), []
    there = backbone.vision_layers
    for depth in (there, there + 5):
        asked = settings_for(method="vpt-deep", visual_depth=depth)
        assert suited(asked, NAMES, backbone, told.append) == asked
    (said,) = told
    assert said.startswith(f"visual_depth={there + 5}, and the image tower of")
    assert f"has {there} layers: each has a prompt" in said
    suited(settings_for(method="vpt-deep"), NAMES, backbone, told.append)
    assert len(told) == 1


def test_the_default_method_gives_way_to_one_that_both_towers_take():
    told = []
    backbone = backbone_of(tower_of(timm.create_model("resnet10t", num_classes=OUT)), name="conv")
    found = suited(settings_for(text_vectors=4, lr=0.5), NAMES, backbone, told.append)
    assert (found.method, found.lr) == ("dapt-text", 0.5)
    assert told == [
        "the image tower of 'conv' is a ResNet of timm's, which takes no visual prompt: dapt-text "
        "in place of dapt"
    ]
    assert suited(found, NAMES, backbone, told.append) == found
    asked = settings_for(method="dapt")
    assert suited(asked, NAMES, backbone, told.append) == asked  # and is refused by its parts
    assert len(told) == 1

    strange = nn.Module()
    strange.vocab_size = 100
    for visual, method in ((None, "dapt-visual"), (backbone.visual, "auto")):
        other = backbone_of(visual, strange)
        assert suited(settings_for(), NAMES, other).method == method
    assert suited(settings_for(), NAMES, backbone_of()).method == "dapt"


@pytest.mark.parametrize(
    ("method", "given", "vectors", "words"),
    [
        ("coop", {}, 15, None),
        ("dapt", {"text_vectors": 15}, 15, None),
        ("coop", {"text_vectors": 20, "text_init": "a b"}, 15, "a b"),
        ("coop", {"text_vectors": 16, "text_init": "w" * 16}, 15, None),
        ("ivlp", {"text_vectors": 16, "text_init": "a b"}, 15, "a b"),
        ("ivlp", {"text_vectors": 2, "text_init": " ".join("w" * 16)}, 2, None),
        ("linear-probe", {}, 16, None),
    ],
)
def test_a_text_prompt_shrinks_to_what_the_longest_class_name_leaves(method, given, vectors, words):
    build, tokenizer = bidirectional("last", 30), LetterTokenizer(30)
    backbone, told = backbone_of(text=build, tokenizer=tokenizer, name="short"), []
    settings = settings_for(method=method, **given)
    found = suited(settings, NAMES, backbone, told.append)
    assert (found.text_vectors, found.text_init) == (vectors, words)
    assert len(told) == (found != settings)
    if told:
        assert "'short' reads 30 tokens: with class name 'hot air balloon'" in told[0]
        assert ("no start from" in told[0]) == (words != given.get("text_init"))
    assert suited(found, NAMES, backbone, told.append) == found
    parts = [part.create(backbone, found) for part in get_method(method).parts]
    assert Classifier(backbone, NAMES, parts).text_features().shape == (3, OUT)


def test_a_class_name_that_leaves_no_prompt_is_named():
    text, tokenizer = bidirectional("last", 16), LetterTokenizer(16)
    backbone = backbone_of(text=text, tokenizer=tokenizer, name="short")
    found = suited(settings_for(method="coop"), NAMES[:2], backbone)
    assert found.text_vectors == 7
    found = suited(settings_for(method="coop"), ["abcdefghijklmn"], backbone)
    with pytest.raises(UserError, match="takes 16 of the 16 tokens .* leaves none to a text"):
        ClassTokens.for_context(backbone, ["abcdefghijklmn"], found.text_vectors)


def test_logits_are_the_models_own_where_it_has_a_bias():
    model = {"init_logit_scale": 2.3, "init_logit_bias": -10.0}
    text, tokenizer = bidirectional("last", 32), LetterTokenizer(32)
    backbone = backbone_of(text=text, tokenizer=tokenizer, **model)
    assert backbone.logit_bias == pytest.approx(-10, abs=0.3)
    views = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
    classifier = Classifier(backbone, NAMES, template="a {}.", multilabel=True)
    image = F.normalize(backbone.visual(backbone.normalize(views)), dim=-1)
    words = F.normalize(backbone.text(tokenizer([f"a {name}." for name in NAMES])), dim=-1)
    expected = backbone.logit_scale * image @ words.T + backbone.logit_bias
    with torch.no_grad():
        found = classifier(views)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    # Each class by itself is as probable as the model says; of one alone, the bias says nothing.
    torch.testing.assert_close(classifier.probabilities(found), expected.sigmoid())
    assert backbone_of().logit_bias == 0


def make_folder(path):
    """A folder of a backbone: convolutions, and texts of at most 18 tokens."""
    torch.manual_seed(8)
    vision = {"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear"}
    config = tiny_config(text_cfg__context_length=18)
    config["vision_cfg"] = vision | {"image_size": SIZE}
    path.mkdir()
    save_file(CustomTextCLIP(**config).state_dict(), path / "open_clip_model.safetensors")
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    return path


def test_a_run_keeps_what_its_backbone_took_and_resumes(photo_folder, tmp_path):
    given = {"dataset": str(photo_folder), "shots": 3, "epochs": 1, "batch_size": 5, "lr": 0.01}
    given |= {"backbone": str(make_folder(tmp_path / "backbone")), "device": "cpu"}
    settings = make_settings(given | {"text_vectors": 16})
    run = train(settings, tmp_path / "run")
    kept = run.read_settings()
    assert (kept.method, kept.text_vectors) == ("dapt-text", 13)  # start, "red thing .", end
    assert run.read_environment().asked == {"method": "dapt", "text_vectors": 16}
    assert load_classifier(run)(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 3)
    # What was asked for and what came of it are the same run.
    for again in (settings, kept):
        check_output(run, again, resume=True)
        assert train(again, run.path, resume=True).finished
    with pytest.raises(UserError, match="text_vectors=8: it was started with text_vectors=13"):
        check_output(run, make_settings(given | {"text_vectors": 8, "method": "dapt-text"}),
                     resume=True)  # fmt: skip
    run.metrics_file.unlink()  # as if killed
    assert train(settings, run.path, resume=True).finished
    refused = make_settings(given | {"method": "dapt"})
    with pytest.raises(UserError, match="is a ResNet of timm's, which takes no visual prompt"):
        train(refused, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


@pytest.fixture
def small_ones(monkeypatch):
    """Two architectures alone, which are small."""
    made = {
        "turning": backbone_of(tower_of(TRUNKS["pe-core"]()), name="turning/random"),
        "conv": backbone_of(
            tower_of(timm.create_model("resnet10t", num_classes=OUT)), name="conv/random"
        ),
    }
    monkeypatch.setattr(architectures, "load", made.__getitem__)
    monkeypatch.setattr(architectures, "parameters", {"turning": 2.0, "conv": 1.0}.__getitem__)
    monkeypatch.setattr(architectures.open_clip, "list_models", lambda: list(made))
    monkeypatch.setattr(architectures.families, "TRANSFORMERS", {})


def test_the_table_tells_what_works_from_what_is_refused_and_what_fails(small_ones):
    found = {name: architectures.asked(name) for name in ("turning", "conv", "missing")}
    entries = {name: {k: v for k, (v, _) in row.items()} for name, row in found.items()}
    kinds = ("text prompt", "visual prompt", "deep visual", "deep in both", "LoRA", "head", "ONNX")
    for name, refused in (("turning", ()), ("conv", kinds[1:5])):
        works = {k for k, v in entries[name].items() if v == "works"}
        assert works >= {"loads", "zero-shot", "projection", *kinds} - {*refused}
        assert all(entries[name][k] == "refused" and found[name][k][1] for k in refused)
    assert found["missing"]["loads"] == ("FAILS", "KeyError: 'missing'")
    assert {entry for k, entry in entries["missing"].items() if k != "loads"} == {""}


def ask(*arguments):
    """The command, in this process; what it said, and its exit code."""
    result = CliRunner().invoke(architectures.app, [str(one) for one in arguments])
    return result.output, result.exit_code


def test_the_table_goes_on_where_it_stopped_and_asks_some_columns_anew(
    small_ones, monkeypatch, tmp_path
):
    calls = []

    def check(backbone):
        calls.append(backbone.name)
        if "conv" in backbone.name:
            raise UserError(f"'{backbone.name}' has none")

    kept, page = tmp_path / "all.json", tmp_path / "page.md"
    monkeypatch.setattr(architectures, "CHECKS", {"LoRA": architectures.Column("rank", check)})
    monkeypatch.setattr(architectures, "COLUMNS", ("loads", "LoRA"))
    assert ask("--json", kept)[1] == 0
    assert calls == ["conv/random", "turning/random"]  # the smallest first
    assert ask("--json", kept, "--markdown", page)[1] == 0
    assert len(calls) == 2
    text = page.read_text("utf-8")
    assert "| `conv` | yes | (1) |" in text
    assert "1. '…' has none" in text
    assert ask("turning", "--json", kept, "--only", "lora")[1] == 0
    assert calls[2:] == ["turning/random"]
    said, code = ask("--only", "rank")
    assert code == 2
    assert "there is no column 'rank'; use one of LoRA" in said
    monkeypatch.setattr(
        architectures, "CHECKS", {"LoRA": architectures.Column("rank", lambda _: 1 / 0)}
    )
    said, code = ask("--json", kept, "--only", "LoRA", "--markdown", page)
    assert (code, "ZeroDivisionError" in said) == (1, True)
    assert "| `conv`, `turning` | yes | FAILS (1) |" in page.read_text("utf-8")


def test_prompts_are_timed_beside_the_towers_own_pass(monkeypatch, tmp_path):
    families = architectures.families
    monkeypatch.setattr(families, "DEPTH", 2)
    rows = families.timed(lambda _: None, rounds=2)
    assert {row["tower"] for row in rows} == {"image", "text"}
    assert {row["family"] for row in rows} == {*families.IMAGE_TOWERS, *families.TEXT_TOWERS} - (
        set() if find_spec("transformers") else {"transformers' XLM-R"}
    )
    for row in rows:
        assert 0 < row["low"] <= row["time"] <= row["high"]
        assert 1 <= row["tokens"] < 1.2
