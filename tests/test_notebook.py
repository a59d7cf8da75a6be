"""A classifier in a notebook: figures, a report, photos, bars, and no warning."""

import subprocess
import sys

import pytest
from patience import LONG
from rich.console import Console

from dapt import progress
from dapt.estimator import PromptClassifier
from dapt.run.directory import RunDirectory


@pytest.fixture(scope="module")
def photos(photo_folder):
    paths = sorted((photo_folder / "train").rglob("*.png"))
    return paths, [path.parent.name.replace("green thing", "<b>_green") for path in paths]


def fit(photos, weights, **how):
    return PromptClassifier(str(weights), **how).fit(*photos)


@pytest.fixture(scope="module")
def head(photos, tiny_weights):
    return fit(photos, tiny_weights, method="auto")


@pytest.fixture(scope="module")
def prompts(photos, tiny_weights):
    return fit(photos, tiny_weights, method="coop", shots=2, epochs=1, text_vectors=2)


def test_a_fitted_classifier_shows_its_figures(head, tmp_path):
    html = head._repr_mimebundle_()["text/html"]
    assert head._repr_html_() == html
    assert "Automatic" in html
    assert "18 images" in html
    assert f"{100 * head.forecast_['accuracy']:.0f} % right" in html
    assert "&lt;b&gt; green" in html
    assert "<b>" not in html
    again = PromptClassifier.load(head.save(tmp_path / "run"))
    assert again.forecast_["accuracy"] == head.forecast_["accuracy"]
    assert RunDirectory(tmp_path / "run").read_metrics().test is None  # no image was kept back
    assert "tuned on" in again._repr_html_()
    assert "tuned on" not in PromptClassifier()._repr_mimebundle_()["text/html"]


def test_a_report_is_shown_inline(head, prompts):
    told = prompts.report()
    assert "nearest words" in told._repr_html_()
    assert "cross-entropy" in repr(told) or "ce" in repr(told)
    assert "images tuned on" in head.report()._repr_html_()
    assert "nearest words" not in head.report()._repr_html_()


def test_photos_are_shown_with_their_classes(head, photos):
    page = head.show(photos[0][:2], top=2)
    assert page._repr_html_().count("data:image/webp;base64,") == 2
    best = head.predict(photos[0][:2])[0].replace("_", " ")
    assert repr(page).startswith(f"0: {best} ")
    assert "<b>" not in page._repr_html_()


def test_a_notebook_has_bars(monkeypatch, capsys):
    monkeypatch.setattr(progress, "errors", Console(force_jupyter=True))
    with progress.RichReporter().stage("tuning", 4) as advance:
        advance(2, "loss 1.2")
        advance(2)
    assert "tuning:" in capsys.readouterr().err


NOTEBOOK = """
import sys, types, warnings
shell = types.SimpleNamespace(config={"IPKernelApp": {}})
sys.modules["IPython"] = types.SimpleNamespace(get_ipython=lambda: shell)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    from dapt import PromptClassifier
    PromptClassifier()
said = [str(one.message) for one in told if "IProgress" in str(one.message)]
assert not said, said
"""


def test_an_import_in_a_notebook_without_widgets_warns_of_nothing():
    made = subprocess.run(
        [sys.executable, "-c", NOTEBOOK], capture_output=True, text=True, timeout=LONG
    )
    assert made.returncode == 0, made.stderr
