"""The towers give what open_clip's own forward gives, with prompts put in by hand."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from miniatures import new_parts, tiny_config
from open_clip.model import CustomTextCLIP

from benchmarks.plain import image_plain, text_plain
from dapt.clip.backbone import Backbone, Preprocessing
from dapt.clip.image import encode_image
from dapt.clip.inside import Inside
from dapt.clip.sources import load_backbone
from dapt.clip.text import ClassTokens, TextEncoder, _bytes_per_token
from dapt.engine.classifier import Classifier
from dapt.errors import UserError

WORDS = ["cat", "dog", "hot_air_balloon", "sea lion", "zebra", "a very long name of a rare flower"]


@pytest.fixture(scope="module")
def backbone(tiny_weights):
    return load_backbone(str(tiny_weights))


@pytest.fixture(scope="module", params=["tiny", "bundled"])
def either_backbone(request, backbone):
    """The tiny one has a single head in each tower, the bundled one several."""
    return backbone if request.param == "tiny" else load_backbone()


def plain_text(backbone, names, context):
    """The plain way: stand-in words, whose embeddings the context replaces, and all 77 tokens."""
    sentences = [" ".join(["X"] * len(context) + [n.replace("_", " ") + "."]) for n in names]
    return text_plain(backbone.text, backbone.tokenizer(sentences), context)


@settings(max_examples=15)
@given(
    names=st.lists(st.sampled_from(WORDS), min_size=1, max_size=6, unique=True),
    vectors=st.sampled_from([1, 4, 16]),
    seed=st.integers(0, 100),
)
@example(names=["cat"], vectors=16, seed=0)
def test_shared_prefix_is_exact(either_backbone, names, vectors, seed):
    torch.manual_seed(seed)
    backbone = either_backbone
    context = torch.nn.Parameter(torch.randn(vectors, backbone.text_width) * 0.02)
    expected = plain_text(backbone, names, context)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    gradient, context.grad = context.grad.clone(), None

    encoder = TextEncoder(backbone, ClassTokens.for_context(backbone, names, vectors))
    assert encoder.shares_prefix
    found = encoder(Inside(context))
    (found * weights).sum().backward()
    torch.testing.assert_close(
        F.normalize(found, dim=-1), F.normalize(expected, dim=-1), atol=1e-5, rtol=0
    )
    assert (context.grad - gradient).norm() <= 1e-4 * gradient.norm()


@settings(max_examples=10)
@given(
    names=st.lists(st.sampled_from(WORDS), min_size=1, max_size=6, unique=True),
    tokens=st.integers(1, 30),
)
def test_chunks_change_nothing(backbone, names, tokens):
    context = torch.nn.Parameter(torch.randn(4, 64) * 0.02)
    weights = torch.randn(len(names), 32)
    found = []
    for budget in (2**40, tokens * _bytes_per_token(backbone.text, torch.float32)):
        split = ClassTokens.for_context(backbone, names, 4)
        encoder = TextEncoder(backbone, split, budget)
        features = encoder(Inside(context))
        (features * weights).sum().backward()
        found.append((features.detach(), context.grad, len(encoder.chunks)))
        context.grad = None
    (whole, gradient, one), (chunked, other, many) = found
    assert one == 1
    assert many <= len(names)
    assert many > 1 or sum(map(len, encoder.tokens.own)) <= 2 * tokens or len(names) == 1
    torch.testing.assert_close(chunked, whole, atol=1e-5, rtol=1e-4)
    assert (other - gradient).norm() <= 1e-4 * gradient.norm()


@settings(max_examples=8)
@given(vectors=st.sampled_from([1, 4, 16]), images=st.integers(1, 3), seed=st.integers(0, 100))
@example(vectors=16, images=1, seed=0)
def test_class_token_only_last_layer_is_exact(either_backbone, vectors, images, seed):
    torch.manual_seed(seed)
    backbone = either_backbone
    size = backbone.preprocessing.size
    prompt = torch.nn.Parameter(torch.randn(vectors, backbone.vision_width))
    pixels = torch.randn(images, 3, size, size)
    expected = image_plain(backbone.visual, pixels, prompt)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    gradient, prompt.grad = prompt.grad.clone(), None
    found = encode_image(backbone.visual, pixels, Inside(prompt))
    (found * weights).sum().backward()
    torch.testing.assert_close(
        F.normalize(found, dim=-1), F.normalize(expected, dim=-1), atol=1e-5, rtol=0
    )
    assert (prompt.grad - gradient).norm() <= 1e-4 * gradient.norm()


@pytest.mark.parametrize("budget", [2**40, 1])
def test_classes_may_have_contexts_of_their_own(backbone, budget):
    contexts = torch.nn.Parameter(0.02 * torch.randn(len(WORDS), 4, 64))
    tokens = ClassTokens.for_context(backbone, WORDS, 4)
    encoder = TextEncoder(backbone, tokens, budget, class_contexts=True)
    assert not encoder.shares_prefix
    found = encoder(Inside(contexts))
    expected = torch.cat(
        [TextEncoder(backbone, ClassTokens.for_context(backbone, [name], 4))(Inside(context))
         for name, context in zip(WORDS, contexts, strict=True)]
    )  # fmt: skip
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    weights = torch.randn_like(found)
    gradients = [torch.autograd.grad((f * weights).sum(), contexts)[0] for f in (found, expected)]
    assert (gradients[0] - gradients[1]).norm() <= 1e-4 * gradients[1].norm()


@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("budget", [2**40, 1])
def test_a_context_may_stand_about_the_class_name(backbone, ahead, own, budget):
    shape = (len(WORDS), 5, 64) if own else (5, 64)
    contexts = torch.nn.Parameter(0.02 * torch.randn(*shape))
    tokens = ClassTokens.for_context(backbone, WORDS, 5, ahead=ahead)
    found = TextEncoder(backbone, tokens, budget, class_contexts=own)(Inside(contexts))
    expected = []
    for name, context in zip(WORDS, contexts.expand(len(WORDS), -1, -1), strict=True):
        words = backbone.embed_words(name)
        whole = torch.cat([context[:ahead], words, context[ahead:]])
        sentence = " ".join(["X"] * len(whole)) + "."
        expected.append(text_plain(backbone.text, backbone.tokenizer([sentence]), whole))
    expected = torch.cat(expected)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    weights = torch.randn_like(found)
    gradients = [torch.autograd.grad((f * weights).sum(), contexts)[0] for f in (found, expected)]
    assert (gradients[0] - gradients[1]).norm() <= 1e-4 * gradients[1].norm()


def test_without_prompts_both_towers_are_open_clips(backbone):
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(
        encode_image(backbone.visual, images), backbone.visual(images), atol=1e-5, rtol=1e-4
    )
    sentences = [f"a photo of a {n.replace('_', ' ')}." for n in WORDS]
    encoder = TextEncoder(backbone, ClassTokens.for_template(backbone, WORDS, "a photo of a {}."))
    assert len(encoder.tokens.shared) >= 4  # start and the template's first words
    torch.testing.assert_close(
        encoder(), backbone.text(backbone.tokenizer(sentences)), atol=1e-5, rtol=1e-4
    )


class LetterTokenizer:
    """Stands in for SigLIP's tokenizer, whose files only the hub has: a token a letter."""

    context_length = 24

    def __call__(self, texts, context_length=24):
        ids = torch.ones(len(texts), context_length, dtype=torch.long)
        for i, text in enumerate(texts):
            row = [2 + ord(c) % 90 for c in text][: context_length - 1]
            ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        return ids


def siglip():
    """A SigLIP in miniature: timm tower with attention pooling, text without a causal mask."""
    torch.manual_seed(3)
    model = CustomTextCLIP(
        embed_dim=192,
        vision_cfg={
            "image_size": 32,
            "timm_model_name": "vit_tiny_patch16_224",
            "timm_pool": "map",
            "timm_proj": "none",
        },
        text_cfg={
            "context_length": 24, "vocab_size": 100, "width": 48, "heads": 2, "layers": 2,
            "no_causal_mask": True, "proj_bias": True, "pool_type": "last",
            "norm_kwargs": {"eps": 1e-6},
        },
    )  # fmt: skip
    model.visual.set_input_size(32)
    seen = Preprocessing(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), resize_mode="squash")
    return Backbone(
        model, LetterTokenizer(), seen, name="siglip", device=torch.device("cpu"), precision="fp32"
    )


def test_siglip_takes_both_prompts():
    backbone = siglip()
    assert (backbone.vision_width, backbone.patch_size, backbone.start_tokens) == (192, 16, [])
    ids = backbone.tokenizer(["a cat.", "a dog."])
    encoder = TextEncoder(backbone, ClassTokens.for_template(backbone, ["cat", "dog"], "a {}."))
    assert not encoder.shares_prefix
    torch.testing.assert_close(encoder(), backbone.text(ids), atol=1e-5, rtol=1e-4)

    # A context made of the words' own embeddings is the sentence itself.
    words = backbone.text.token_embedding(backbone.tokenizer(["a "])[0, :2])
    learned = TextEncoder(backbone, ClassTokens.for_context(backbone, ["cat", "dog"], 2))
    torch.testing.assert_close(learned(Inside(words)), backbone.text(ids), atol=1e-5, rtol=1e-4)

    context, visual = parts = new_parts(backbone, text_vectors=4, visual_vectors=3)
    classifier = Classifier(backbone, ["cat", "dog"], parts)
    images = torch.randn(2, 3, 32, 32)
    classifier(images).sum().backward()
    assert context.text_prompt.grad.norm() > 0
    assert visual.visual_prompt.grad.norm() > 0
    empty = encode_image(backbone.visual, images, Inside(torch.zeros(0, 192)))
    torch.testing.assert_close(empty, backbone.visual(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"vision_cfg__pool_type": "avg"},
        {"vision_cfg__attentional_pool": True, "vision_cfg__attn_pooler_heads": 2},
        {"vision_cfg__qk_norm": True, "text_cfg__qk_norm": True},
        {"vision_cfg__no_ln_pre": True, "vision_cfg__ls_init_value": 0.1},
        {"text_cfg__embed_cls": True, "text_cfg__context_length": 30},
        {"text_cfg__no_causal_mask": True},  # as MobileCLIP's: the end token sees the padding
        {"text_cfg__proj_bias": True, "text_cfg__pool_type": "eos", "text_cfg__eos_id": 49407},
    ],
)
def test_other_towers_of_open_clip(changes):
    torch.manual_seed(5)
    model = CustomTextCLIP(**tiny_config(**changes)).eval()
    from open_clip import SimpleTokenizer

    tokenizer = SimpleTokenizer(context_length=model.text.context_length)
    ids, images = tokenizer(["a cat.", "a sea lion."]), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        text, image = model.text(ids), model.visual(images)
    seen = Preprocessing(32, (0.5,) * 3, (0.5,) * 3)
    backbone = Backbone(
        model, tokenizer, seen, name="odd", device=torch.device("cpu"), precision="fp32"
    )
    tokens = ClassTokens.for_context(backbone, ["cat", "sea lion"], 1)
    word = backbone.text.token_embedding(tokenizer("a")[0, 1:2]).detach()
    found = TextEncoder(backbone, tokens)(Inside(word))
    torch.testing.assert_close(found, text, atol=1e-5, rtol=1e-4)
    # A class's feature depends on no other class, and not on the chunk it is in.
    single = ClassTokens.for_context(backbone, ["cat"], 1)
    torch.testing.assert_close(TextEncoder(backbone, single)(Inside(word)), found[:1])
    chunked = TextEncoder(backbone, tokens, memory_budget=1)
    assert len(chunked.chunks) == 2
    torch.testing.assert_close(chunked(Inside(word)), found)
    none = encode_image(backbone.visual, images, Inside(torch.zeros(0, 64)))
    torch.testing.assert_close(none, image, atol=1e-5, rtol=1e-4)
    prompt = torch.nn.Parameter(torch.randn(2, 64))
    encode_image(backbone.visual, images, Inside(prompt)).sum().backward()
    assert prompt.grad.norm() > 0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_is_near_and_prompts_stay_fp32(tiny_weights, backbone, precision):
    low = load_backbone(str(tiny_weights), precision=precision)
    views = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    parts = new_parts(backbone, text_vectors=4, visual_vectors=4)
    found, expected = (Classifier(model, WORDS, parts) for model in (low, backbone))
    with torch.no_grad():
        cosine = (found.image_features(views) * expected.image_features(views)).sum(-1)
    assert cosine.min() > 0.99
    found(views).sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in found.learned().values())
    assert found.text_features().dtype == torch.float32


def test_what_does_not_fit_is_named(backbone):
    with pytest.raises(UserError, match="class name 'la la.*leave room for"):
        ClassTokens.for_context(backbone, ["cat", "la " * 65], 16)
    with pytest.raises(UserError, match="longer than the 77 tokens"):
        ClassTokens.for_context(backbone, ["la " * 90], 16)
    with pytest.raises(UserError, match="text prompt of 76 vectors"):
        ClassTokens.for_context(backbone, ["cat"], 76)


def test_resnet_takes_text_prompts_only():
    backbone = load_backbone("RN50", "random")
    with pytest.raises(UserError, match="takes no visual prompt"):
        new_parts(backbone, "vpt", visual_vectors=4)
    classifier = Classifier(backbone, ["cat", "dog"], new_parts(backbone, "coop", text_vectors=4))
    assert classifier(torch.zeros(1, 3, 224, 224, dtype=torch.uint8)).shape == (1, 2)


def test_prompt_initialisation(backbone):
    context, visual = new_parts(backbone, text_vectors=400, visual_vectors=400)
    bound = (6 / (3 * 8**2 + 64)) ** 0.5
    assert context.text_prompt.std().item() == pytest.approx(0.02, rel=0.05)
    assert visual.visual_prompt.abs().max() <= bound
    assert visual.visual_prompt.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    (words,) = new_parts(backbone, "coop", text_vectors=6, text_init="a photo of a")
    ids = torch.tensor(backbone.tokenize(["a photo of a"])[0][1:-1])
    torch.testing.assert_close(words.text_prompt[2:].detach(), backbone.text.token_embedding(ids))
    with pytest.raises(UserError, match="use fewer words or more vectors"):
        new_parts(backbone, "coop", text_vectors=2, text_init="a photo of a")
    assert Classifier(backbone, ["cat"]).learned_parameters == 0
