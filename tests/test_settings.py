"""Settings: presets, overrides, and refusals that help."""

import pytest
from typer.testing import CliRunner

from dapt.cli import app
from dapt.data import open_task
from dapt.engine.fit import total_steps
from dapt.errors import UserError
from dapt.methods import METHODS, get_method
from dapt.methods.published import PUBLISHED
from dapt.settings import loss_weights, make_settings, parse_assignment, read_settings_file


@pytest.mark.parametrize("dataset", list(PUBLISHED))
def test_published_settings_are_the_default(dataset):
    settings = make_settings({"dataset": dataset})
    found = (settings.lr, settings.beta_visual, settings.beta_text)
    assert found == PUBLISHED[dataset]
    assert (settings.text_vectors, settings.visual_vectors, settings.rbf_t) == (16, 16, 2)
    assert (settings.momentum, settings.weight_decay, settings.batch_size) == (0.9, 5e-4, 32)


@pytest.mark.parametrize(("shots", "epochs"), [(1, 50), (2, 100), (4, 100), (8, 200), (16, 200)])
def test_epochs_follow_shots_except_on_imagenet(shots, epochs):
    assert make_settings({"dataset": "dtd", "shots": shots}).epochs == epochs
    assert make_settings({"dataset": "imagenet", "shots": shots}).epochs == 50


FEW = ("lr", "epochs", "text_init", "text_vectors", "visual_vectors")


def of_few(**given):
    settings = make_settings(given)
    return tuple(getattr(settings, name) for name in FEW)


def test_few_images_of_ones_own_start_from_the_templates_words():
    for shots in (1, 2):
        lr, epochs, *start = of_few(dataset="bundled", shots=shots)
        assert lr < 0.1
        assert epochs < 50
        assert start == ["a drawing of a", 4, 4]
        assert open_task("bundled").template == "a drawing of a {}."
        assert of_few(dataset="photos/mine", shots=shots)[2:] == ("a photo of a", 4, 4)
        assert of_few(dataset="bundled", shots=shots, template="{} texture.")[2:] == (None, 16, 4)
        # How many tokens the user's words are, only a tokenizer knows: there is room.
        own = of_few(dataset="bundled", shots=shots, template="a dermatoscopic image of a {}.")
        assert own[2:] == ("a dermatoscopic image of a", 16, 4)


def test_few_images_change_nothing_published_and_nothing_of_more_images():
    for dataset in PUBLISHED:
        for shots in (1, 2, 4):
            epochs = 50 if shots == 1 or dataset.startswith("imagenet") else 100
            assert of_few(dataset=dataset, shots=shots) == (
                PUBLISHED[dataset][0], epochs, None, 16, 16)  # fmt: skip
    assert of_few(dataset="bundled", shots=16) == (8, 200, None, 16, 16)


WARM = {"optimizer": "sgd", "schedule": "warm-cosine", "weight_decay": 5e-4, "logit_scale": None}
STEPS = {"optimizer": "adamw", "schedule": "cosine", "weight_decay": 0.01, "batch_size": 32}
WORDS = {"text_init": "a photo of a"}
# As the field's code has them, with 4 images a class (PromptSRC: of few shots; MMRL too).
OF_THE_FIELD = {
    "coop": {**WARM, "lr": 0.002, "batch_size": 32, "epochs": 100, "text_vectors": 16},
    "cocoop": {**WARM, **WORDS, "lr": 0.002, "batch_size": 1, "epochs": 10, "text_vectors": 4,
               "shift_start": 1.0},
    "kgcoop": {**WARM, **WORDS, "lr": 0.002, "batch_size": 128, "epochs": 100, "text_vectors": 4,
               "kg_weight": 8.0},
    "vpt-deep": {**WARM, "lr": 0.0025, "batch_size": 4, "epochs": 5, "visual_vectors": 8,
                 "visual_depth": 12, "template": "a photo of a {}."},
    "ivlp": {**WARM, **WORDS, "lr": 0.0035, "batch_size": 4, "epochs": 5, "text_vectors": 2,
             "visual_vectors": 2, "text_depth": 12, "visual_depth": 12},
    "maple": {**WARM, **WORDS, "lr": 0.0035, "batch_size": 4, "epochs": 5, "text_vectors": 2,
              "prompt_depth": 9},
    "promptsrc": {**WARM, **WORDS, "lr": 0.0025, "batch_size": 4, "epochs": 50, "near_text": 25.0,
                  "near_image": 10.0, "near_logits": 1.0, "text_vectors": 4, "visual_vectors": 4,
                  "text_depth": 9, "visual_depth": 9},
    "mmrl": {**WARM, "lr": 0.001, "batch_size": 32, "epochs": 50, "optimizer": "adamw",
             "logit_scale": 100.0, "rep_alpha": 0.7, "rep_tokens": 5, "rep_width": 512,
             "rep_from": 6},
    "clip-lora": {**STEPS, "lr": 2e-4, "steps": 2000, "logit_scale": 100.0, "lora_rank": 2,
                  "lora_alpha": 1.0, "lora_dropout": 0.25, "lora_maps": ("q", "k", "v")},
    "2sfs": {**STEPS, "lr": 2e-4, "steps": 720, "classifier_steps": 480, "classifier_lr": 2e-4,
             "classifier_batch": 32, "logit_scale": None},
    "clip-svd": {**STEPS, "lr": 5e-4, "steps": 800, "logit_scale": 100.0},
    "tip-adapter-f": {"tip_views": 10, "tip_lr": 0.001, "tip_batch": 256, "tip_epochs": 20},
    "gda": {"gda_views": 10},
    "clap": {"clap_views": 20, "clap_lr": 0.1, "clap_batch": 256, "clap_epochs": 300},
    "lp++": {"lp_plus_epochs": 300},
    "prolip": {"prolip_steps": 300, "prolip_views": 300, "prolip_lr": 1e-5, "prolip_lambda": None},
}  # fmt: skip


@pytest.mark.parametrize("method", list(OF_THE_FIELD))
def test_methods_of_the_field_are_as_published_on_benchmarks(method):
    settings, wanted = (
        make_settings({"dataset": "sun397", "shots": 4, "method": method}), OF_THE_FIELD[method],
    )  # fmt: skip
    assert {name: getattr(settings, name) for name in wanted} == wanted


@pytest.mark.parametrize("shots", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.learns])
def test_own_data_is_seen_no_more_often_than_by_dapt(method, shots):
    images = 34 * shots

    def passes(name):
        own = make_settings({"dataset": "photos/mine", "shots": shots, "method": name})
        assert own.logit_scale is None  # the backbone's
        return total_steps(own, images) * min(own.batch_size, images) / images

    assert passes(method) <= passes("dapt")


def test_ivlp_is_slower_with_few_images_of_ones_own_alone():
    def rate(dataset, shots, **given):
        return make_settings({"dataset": dataset, "shots": shots, "method": "ivlp", **given}).lr

    assert rate("photos/mine", 2) < rate("photos/mine", 4) == rate("dtd", 1) == 0.0035
    assert rate("photos/mine", 1, lr=0.5) == 0.5


def test_deep_vpt_has_one_sentence_on_benchmarks_unless_others_are_given():
    def templates(dataset, **given):
        found = make_settings({"dataset": dataset, "method": "vpt-deep", **given})
        return found.template, found.templates

    assert templates("dtd") == ("a photo of a {}.", None)
    assert templates("photos/mine") == (None, None)
    assert templates("dtd", templates=["a {}.", "the {}."]) == (None, ["a {}.", "the {}."])


def test_what_is_given_wins_with_few_images_too():
    few = {"dataset": "bundled", "shots": 1}
    given = {"lr": 3, "epochs": 7, "text_init": "one of", "text_vectors": 5, "visual_vectors": 2}
    assert of_few(**few, **given) == (3, 7, "one of", 5, 2)
    assert of_few(**few, text_vectors=2)[2:] == (None, 2, 4)  # fewer than the template's words
    assert of_few(**few, text_init="of")[2:] == ("of", 16, 4)


def test_what_is_given_wins():
    settings = make_settings({"dataset": "dtd", "lr": 3, "epochs": 7})
    assert (settings.lr, settings.epochs, settings.beta_visual) == (3, 7, 100)
    assert loss_weights(settings) == {"intra": 100, "inter": 0.01}
    assert loss_weights(make_settings({"dataset": "dtd", "method": "vlpt"})) == {}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"beta_tex": 1}, r"unknown setting 'beta_tex' \(did you mean 'beta_text'\?\)"),
        ({"lr": -1}, "setting lr=-1: input should be greater than 0"),
        ({"lr": "fast"}, "setting lr='fast'"),
        ({"lr": float("nan")}, "setting lr=nan"),
        ({"shots": 0}, "setting shots=0"),
        ({"shots": True}, "setting shots=True: input should not be true"),
        ({"lr": 1e39}, "setting lr=1e.39: input should be less than"),
        ({"weight_decay": 1e300}, "setting weight_decay=1e.300: input should be less than"),
        ({"loss_weights": {"gamma": 1e39}}, "setting loss_weights.gamma=1e.39"),
        ({"precision": "fp8"}, "setting precision='fp8'"),
        ({"method": "coup"}, r"unknown method 'coup' \(did you mean 'coop'\?\)"),
        ({"template": "a photo"}, "must hold {} once"),
    ],
)
def test_bad_settings_are_named(given, sentence):
    with pytest.raises(UserError, match=sentence):
        make_settings({"dataset": "bundled", **given})


def test_settings_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("method: coop\nlr: 0.002\nloss_weights: {gamma: 1}\n")
    assert read_settings_file(file) == {"method": "coop", "lr": 0.002, "loss_weights": {"gamma": 1}}
    for text in ("[1, 2]", "a: [", "!!python/object/apply:os.system ['true']", "1: 2"):
        file.write_text(text)
        with pytest.raises(UserError, match=r"mine\.yaml"):
            read_settings_file(file)
    with pytest.raises(UserError, match="does not exist"):
        read_settings_file(tmp_path / "none.yaml")


def test_assignments():
    assert parse_assignment("lr=0.5") == ("lr", 0.5)
    assert parse_assignment("text-init=a photo of a") == ("text_init", "a photo of a")
    for text in ("lr", "=1", "lr=["):
        with pytest.raises(UserError, match="--set"):
            parse_assignment(text)


def test_the_table_matches_the_paper():
    rows = {name: get_method(name) for name in ("coop", "vpt", "vlpt", "dapt")}
    parts = [(r.changes("text"), r.changes("image")) for r in rows.values()]
    terms = [sorted(term.name for term in r.losses) for r in rows.values()]
    assert [(*part, term) for part, term in zip(parts, terms, strict=True)] == [
        (True, False, []),
        (False, True, []),
        (True, True, []),
        (True, True, ["inter", "intra"]),
    ]


def test_methods_tells_how_many_numbers_a_backbone_has_of_each(tiny_weights):
    result = CliRunner().invoke(app, ["methods", "-b", str(tiny_weights)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    rows = {line.split("│")[1].strip(): line for line in result.output.splitlines() if "│" in line}
    assert rows["dapt"].rstrip("│ ").endswith(" 2,048")  # two prompts of 16 vectors, 64 wide
    assert rows["gda"].rstrip("│ ").endswith(" 0")
    assert [rows[name].split("│")[3].strip() for name in ("maple", "2sfs", "gda", "zero-shot")] == [
        "prompts", "weights", "heads", "nothing",
    ]  # fmt: skip
