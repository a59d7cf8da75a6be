"""``dapt report`` on run directories whose numbers are known, and on damaged and hostile ones."""

import csv
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from time import process_time

import pytest
from typer.testing import CliRunner

from dapt.cli import app
from dapt.errors import UserError
from dapt.report import write_report
from dapt.report.figures import PALETTE
from dapt.report.tables import estimate

runner = CliRunner()
CLASSES = ("cat", "dog", "bird")


def scores_of(accuracy, names=CLASSES, **more):
    """An evaluation's figures; every class is taken for the next one where it is not right."""
    wrong = round(10 * (1 - accuracy))
    size = len(names)
    labels = list(range(size))
    confusion = {
        "true": labels * 2,
        "predicted": labels + [(i + 1) % size for i in labels],
        "images": [10 - wrong] * size + [wrong] * size,
    }
    per_class = [{"class": n, "images": 10, "accuracy": accuracy} for n in names]
    return {"images": 10 * size, "accuracy": accuracy, "macro_f1": accuracy - 0.01,
            "ece": 0.1, "per_class": per_class, "confusion": confusion, **more}  # fmt: skip


def make_run(
    folder,
    accuracy,
    *,
    method="dapt",
    dataset="pets",
    shots=16,
    seed=1,
    evals=None,
    names=CLASSES,
    finished=True,
    **settings,
):
    """Write a run directory as ``dapt train`` does, without its tensors."""
    folder.mkdir(parents=True)
    given = {"dataset": dataset, "method": method, "shots": shots, "seed": seed, "epochs": 5,
             "lr": 8.0, "beta_visual": 10.0, "beta_text": 0.1, "crop_min": 0.5}  # fmt: skip
    given |= settings
    learns = method not in ("zero-shot", "linear-probe")
    move = {"before": 1.0, "after": 0.9}
    metrics = {
        "method": method, "dataset": dataset, "shots": shots, "seed": seed,
        "learned_parameters": 5120 if learns else 0, "support_images": shots * len(names),
        "dispersion": {"inter": move, "intra": move} if learns else {},
        "test": scores_of(accuracy, names),
    }  # fmt: skip
    task = {"dataset": dataset, "template": "a {}.", "class_names": list(names)}
    environment = {"python": "3.11.0", "commit": f"abc{seed}", "tuning_seconds": 2.5,
                   "versions": {"torch": "2.9"}}  # fmt: skip
    files = {"settings": given, "task": task, "environment": environment}
    if finished:
        files["metrics"] = metrics
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    for name, value in (evals or {}).items():
        (folder / f"eval-{name}.json").write_text(json.dumps(value))
    if learns:
        log = "step,epoch,lr,loss,cross_entropy,intra,accuracy\n"
        log += "".join(f"{i},{i // 2},0.1,2,{2 - i / 10},0.5,0.5\n" for i in range(6))
        (folder / "log.csv").write_text(log)
    return folder


class Page(HTMLParser):
    """Tags, links, ids, text and tables of a page."""

    def __init__(self, file):
        super().__init__()
        self.ids, self.links, self.tags, self.attributes = [], [], [], []
        self.text, self.tables = "", {}
        self._table = self._row = self._skip = None
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.tags.append(tag)
        self.attributes += named.items()
        if "id" in named:
            self.ids.append(named["id"])
            if named["id"].startswith("table-"):
                self._table = self.tables.setdefault(named["id"][6:], [])
        if tag == "a":
            self.links.append(named["href"])
        if tag == "tr" and self._table is not None:
            self._table.append([])
        if tag in ("td", "th") and self._table:
            self._table[-1].append("")
        if tag == "span" and named.get("class", "").startswith("pm"):
            self.handle_data(" ")

    def handle_endtag(self, tag):
        if tag == "table":
            self._table = None

    def handle_data(self, data):
        self.text += data
        if self._table and self._table[-1]:
            self._table[-1][-1] += data

    def cell(self, table, row, column):
        head, *rows = ([" ".join(c.split()) for c in r] for r in self.tables[table])
        place = next(i for i, h in enumerate(head) if h.startswith(column))
        return next(r[place] for r in rows if r[0] == row)


def report(runs, tmp_path, **options):
    written = write_report([runs], tmp_path / "report.html", **options)
    return written, Page(written.page)


def check_links(page, folder):
    assert len(page.ids) == len(set(page.ids))
    for link in page.links:
        if link.startswith("#"):
            assert link[1:] in page.ids, link
        else:
            assert (folder / link).is_file(), link


@pytest.fixture
def grid(tmp_path):
    """Two methods over shots and seeds, and zero-shot once."""
    runs = tmp_path / "runs"
    make_run(runs / "a", 0.6, method="zero-shot")
    for seed, (dapt, coop) in enumerate([(0.70, 0.65), (0.72, 0.66), (0.74, 0.70)], 1):
        make_run(runs / f"d{seed}", dapt, seed=seed)
        make_run(runs / f"c{seed}", coop, method="coop", seed=seed)
        make_run(runs / f"d4-{seed}", dapt - 0.1, shots=4, seed=seed)
    return runs


def test_estimate():
    found = estimate([0.70, 0.72, 0.74])
    assert found.mean == pytest.approx(0.72)
    assert found.half == pytest.approx(4.302653 * 0.02 / 3**0.5)  # t of two degrees of freedom
    assert estimate([0.5]).half is None


def test_means_intervals_and_paired_differences(grid, tmp_path):
    written, page = report(grid, tmp_path)
    assert (written.runs, written.unfinished, written.warnings) == (10, 0, ())
    assert page.cell("accuracy-pets", "DAPT", "16 shots") == "72.0 ±5.0"
    assert page.cell("accuracy-pets", "DAPT", "4 shots") == "62.0 ±5.0"
    assert page.cell("accuracy-pets", "CoOp", "16 shots") == "67.0 ±6.6"
    assert page.cell("accuracy-pets", "CoOp", "4 shots") == "–"
    # One run of zero-shot stands for every seed and number of shots.
    assert page.cell("accuracy-pets", "Zero-shot CLIP", "4 shots") == "60.0"
    assert page.cell("difference-pets", "DAPT", "16 shots") == "+12.0 ±5.0"
    check_links(page, tmp_path)


def test_baseline_is_paired_by_seed(grid, tmp_path):
    _, page = report(grid, tmp_path, baseline="coop")
    # 5, 6 and 4 points: far narrower than the intervals of the two means.
    assert page.cell("difference-pets", "DAPT", "16 shots") == "+5.0 ±2.5"
    assert page.cell("difference-pets", "Zero-shot CLIP", "16 shots") == "−7.0 ±6.6"
    shutil.rmtree(grid / "c3")
    _, page = report(grid, tmp_path, baseline="coop")
    assert page.cell("difference-pets", "DAPT", "16 shots") == "+5.5 ±6.4"
    with pytest.raises(UserError, match="did you mean 'coop'"):
        report(grid, tmp_path, baseline="cop")


def test_average_is_over_seeds_that_every_dataset_has(grid, tmp_path):
    for seed in (1, 2):
        make_run(grid / f"f{seed}", 0.5, dataset="flowers", seed=seed)
    _, page = report(grid, tmp_path)
    assert page.cell("accuracy-average", "DAPT", "16 shots") == "60.5 ±6.4"  # of 60 and 61
    assert "CoOp" not in [row[0].strip() for row in page.tables["accuracy-average"]]
    check_links(page, tmp_path)


def test_zero_shot_at_other_shots_is_all_there_in_the_overview(tmp_path):
    make_run(tmp_path / "runs/z", 0.6, method="zero-shot", shots=1)
    for shots in (1, 16):
        make_run(tmp_path / f"runs/d{shots}", 0.7, shots=shots)
    _, page = report(tmp_path / "runs", tmp_path)
    assert "Every method at 16 shots" in page.text  # not at those that it happened to run with
    assert page.cell("overview", "Zero-shot CLIP", "learned") == "0"
    assert page.cell("overview", "Zero-shot CLIP", "tuning") == "2.5"


def test_one_run_only(tmp_path):
    make_run(tmp_path / "runs", 0.7)
    written, page = report(tmp_path / "runs", tmp_path)
    assert page.cell("overview", "DAPT", "accuracy") == "70.0"
    assert written.warnings == ()
    assert 'href="#run-1"' in page.source
    check_links(page, tmp_path)


def test_unfinished_runs_are_listed_and_not_counted(grid, tmp_path):
    make_run(grid / "z", 0.1, seed=4, finished=False)
    written, page = report(grid, tmp_path)
    assert written.unfinished == 1
    assert "unfinished" in page.text
    assert page.cell("accuracy-pets", "DAPT", "16 shots") == "72.0 ±5.0"


def test_a_classifier_saved_in_python_is_not_tested_rather_than_unfinished(grid, tmp_path):
    make_run(grid / "z", 0.1, dataset="fitted", finished=False)
    written, page = report(grid, tmp_path)
    assert written.unfinished == 0
    assert "not tested" in page.text
    assert "unfinished" not in page.text


def test_failed_runs_say_why(grid, tmp_path):
    begun = make_run(grid / "z", 0.1, seed=4, finished=False)
    alone = grid / "few-shot/dtd/1shots-seed1"
    alone.mkdir(parents=True)
    partly = grid / "d1"  # finished, and then an evaluation elsewhere failed
    for place, why in ((begun, "the loss is no number"), (alone, "<b>dtd</b> is not there"),
                       (partly, "cars is not there")):  # fmt: skip
        (place / "failure.json").write_text(json.dumps({"error": why, "traceback": None}))
    written, page = report(grid, tmp_path)
    assert (written.runs, written.unfinished, written.failed, written.warnings) == (11, 0, 3, ())
    for place, why in ((begun, "the loss is no number"), (alone, "<b>dtd</b> is not there")):
        assert f"{place.relative_to(grid)}: {why}" in page.text
    assert "unfinished" not in page.text
    assert page.cell("accuracy-pets", "DAPT", "16 shots") == "72.0 ±5.0"
    assert re.search(r"failed\s*3", page.text)
    result = runner.invoke(app, ["report", str(alone), "-o", str(tmp_path / "report.html")])
    assert "0 runs, 1 failed" in result.output


def test_files_say_what_the_page_says(grid, tmp_path):
    written, page = report(grid, tmp_path)
    tables = [p for p in written.folder.iterdir() if p.suffix == ".csv"]
    assert {p.stem for p in tables} == set(page.tables)
    compared = 0
    for file in tables:
        head, *rows = list(csv.reader(file.open(encoding="utf-8")))
        shown = page.tables[file.stem][1:]
        assert len(rows) == len(shown)
        for row, cells in zip(rows, shown, strict=True):
            # Intervals and counts have columns of their own in the CSV.
            values = [v for v, h in zip(row, head, strict=True) if not h.endswith((" ±", " n"))]
            for value, cell in zip(values, cells, strict=True):
                number = cell.split()[0] if cell.split() else ""
                number = number.replace("−", "-").replace(",", "").lstrip("+")
                if re.fullmatch(r"-?[\d.]+", number):
                    digits = len(number.partition(".")[2])
                    assert float(number) == pytest.approx(float(value), abs=0.51 * 10**-digits)
                    compared += 1
    assert compared > 40
    markdown = (written.folder / "accuracy-pets.md").read_text(encoding="utf-8")
    assert "| DAPT | **62.0 ± 5.0** | **72.0 ± 5.0** |" in markdown
    latex = (written.folder / "accuracy-pets.tex").read_text(encoding="utf-8")
    assert r"DAPT & \textbf{62.0} $\pm$ 5.0 & \textbf{72.0} $\pm$ 5.0 \\" in latex
    assert "± half of its 95 % interval (Student's t)" in markdown  # in a paper it stands alone
    assert r"half of its 95 \% interval" in latex
    make_run(grid / "f", 0.5, dataset="flowers")
    written, _ = report(grid, tmp_path)
    latex = (written.folder / "accuracy-average.tex").read_text(encoding="utf-8")
    assert "interval" not in latex  # one seed has both datasets
    assert (
        latex.index(r"\end{tabular}")
        < latex.index("Averages are over")
        < latex.index(r"\end{table}")
    )
    for svg in written.folder.glob("*.svg"):
        assert svg.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("bits", "warned"), [(6e-9, False), (2e-3, True)])
def test_a_repeat_with_other_threads_is_no_other_result(tmp_path, bits, warned):
    make_run(tmp_path / "runs" / "a", 0.5)
    file = make_run(tmp_path / "runs" / "b", 0.5) / "metrics.json"
    metrics = json.loads(file.read_text())
    metrics["test"]["ece"] += bits
    file.write_text(json.dumps(metrics))
    _, page = report(tmp_path / "runs", tmp_path)
    assert ("with another result" in page.text) == warned


def test_domains_and_cross_dataset(tmp_path):
    for seed, gain in ((1, 0.0), (2, 0.02)):
        evals = {
            # Without the fields that name domain and classes, and with them.
            "sketch": {"dataset": "pets:sketch", "test": scores_of(0.5 + gain)},
            "clay": {"dataset": "pets:clay", "domain": "clay", "classes": "all",
                     "test": scores_of(0.3 + gain)},
            # The source itself, named: no target.
            "pets": {"dataset": "pets", "domain": "wool", "classes": "all",
                     "test": scores_of(0.9)},
            "cars": {"dataset": "cars", "test": scores_of(0.2 + gain)},
        }  # fmt: skip
        make_run(tmp_path / f"runs/{seed}", 0.7, seed=seed, evals=evals)
    _, page = report(tmp_path / "runs", tmp_path)
    cell = page.cell
    assert cell("domains-pets-16-shots", "DAPT", "source: pets") == "70.0 ±0.0"
    assert cell("domains-pets-16-shots", "DAPT", "sketch") == "51.0 ±12.7"
    assert cell("domains-pets-16-shots", "DAPT", "average") == "41.0 ±12.7"
    assert cell("cross-dataset-pets-16-shots", "DAPT", "cars") == "21.0 ±12.7"


def test_cross_dataset_from_base_classes_to_new_ones(tmp_path):
    """As the bundled suite has it: other styles of one dataset, and other classes too."""

    def targets(gain):
        return {
            f"bundled-{style}-new": {"dataset": f"bundled:{style}", "domain": style,
                                     "classes": "new", "test": scores_of(accuracy + gain)}
            for style, accuracy in (("clay", 0.3), ("ink", 0.5))
        }  # fmt: skip

    source = {"dataset": "bundled", "classes": "base"}
    make_run(tmp_path / "runs/z", 0.6, method="zero-shot", evals=targets(0.0), **source)
    for seed, gain in ((1, 0.1), (2, 0.2), (3, 0.3)):
        make_run(tmp_path / f"runs/{seed}", 0.7, seed=seed, evals=targets(gain), **source)
    _, page = report(tmp_path / "runs", tmp_path)
    table = "cross-dataset-bundled-base-16-shots"
    assert page.cell(table, "DAPT", "source: bundled (base)") == "70.0 ±0.0"
    assert page.cell(table, "DAPT", "clay (new)") == "50.0 ±24.8"
    assert page.cell(table, "DAPT", "average") == "60.0 ±24.8"
    # One run of zero-shot is paired with every seed.
    assert page.cell(table, "DAPT", "difference") == "+20.0 ±24.8"
    assert page.cell(table, "Zero-shot CLIP", "average") == "40.0"
    assert not any(name.startswith(("domains", "base-to-new")) for name in page.tables)
    check_links(page, tmp_path)


def test_domains_of_base_classes(tmp_path):
    evals = {"clay": {"dataset": "bundled:clay", "classes": "base", "test": scores_of(0.4)}}
    make_run(tmp_path / "runs", 0.7, dataset="bundled", classes="base", evals=evals)
    _, page = report(tmp_path / "runs", tmp_path)
    assert page.cell("domains-bundled-base-16-shots", "DAPT", "clay (base)") == "40.0"
    assert not any(name.startswith("cross") for name in page.tables)


def test_differences_to_another_baseline_on_targets_and_new_classes(tmp_path):
    for method, gain in (("coop", 0.0), ("dapt", 0.1)):
        for seed in (1, 2):
            away = {"cars": {"dataset": "cars", "test": scores_of(0.2 + gain)},
                    "clay": {"dataset": "pets:clay",
                             "test": scores_of(0.3 + 2 * gain)}}  # fmt: skip
            new = {"new": {"dataset": "pets", "classes": "new", "test": scores_of(0.5 + gain)}}
            make_run(tmp_path / f"runs/{method}{seed}", 0.5, method=method, seed=seed, evals=away)
            make_run(tmp_path / f"runs/{method}{seed}b", 0.5 + gain, method=method, seed=seed,
                     classes="base", evals=new)  # fmt: skip
    _, page = report(tmp_path / "runs", tmp_path, baseline="coop")
    for table, difference in (
        ("domains-pets-16-shots", "+20.0 ±0.0"),
        ("cross-dataset-pets-16-shots", "+10.0 ±0.0"),
        ("base-to-new-pets-16-shots", "+10.0 ±0.0"),
    ):
        assert page.cell(table, "DAPT", "difference") == difference
        assert page.cell(table, "CoOp", "difference") == "–"


def test_datasets_of_one_name_keep_their_own_evaluations(tmp_path):
    for place, names, new in (("a", CLASSES, 0.4), ("b", ("x", "y"), 0.9)):
        test = scores_of(new)
        evals = {"new": {"dataset": "pets", "classes": "new", "test": test},
                 "clay": {"dataset": "pets:clay", "classes": "base", "test": test}}  # fmt: skip
        make_run(tmp_path / "runs" / place, 0.8, names=names, evals=evals, classes="base")
    _, page = report(tmp_path / "runs", tmp_path)
    assert page.cell("base-to-new-pets-16-shots", "DAPT", "new") == "40.0"
    assert page.cell("base-to-new-pets-2-16-shots", "DAPT", "new") == "90.0"
    assert page.cell("domains-pets-2-base-16-shots", "DAPT", "clay") == "90.0"


def test_base_to_new(tmp_path):
    for seed, new in ((1, 0.4), (2, 0.6)):
        evals = {"new": {"dataset": "pets", "classes": "new", "test": scores_of(new)}}
        make_run(tmp_path / f"runs/{seed}", 0.8, seed=seed, evals=evals, classes="base")
    _, page = report(tmp_path / "runs", tmp_path)
    assert page.cell("base-to-new-pets-16-shots", "DAPT", "base") == "80.0 ±0.0"
    assert page.cell("base-to-new-pets-16-shots", "DAPT", "new") == "50.0 ±127.1"
    # Of 53.3 and 68.6.
    assert page.cell("base-to-new-pets-16-shots", "DAPT", "harmonic").startswith("61.0")
    # All else is shown too, and said to be of the base classes, another, easier task.
    assert page.cell("dispersion-pets", "DAPT", "intra after").startswith("0.900")
    assert page.cell("ece-pets", "DAPT", "16 shots") == "10.0 ±0.0"
    assert any(Path(link).name.startswith("curve-cross-entropy") for link in page.links)
    assert page.text.count("pets (base classes)") > 5
    check_links(page, tmp_path)
    # Where whole datasets are compared they stay out of it.
    make_run(tmp_path / "runs/3", 0.5)
    _, page = report(tmp_path / "runs", tmp_path)
    assert page.cell("accuracy-pets", "DAPT", "16 shots") == "50.0"
    assert page.cell("base-to-new-pets-16-shots", "DAPT", "base") == "80.0 ±0.0"
    assert "(base classes)" not in page.text


def test_base_classes_evaluated_among_all(tmp_path):
    every = {"all": {"dataset": "pets", "classes": "all", "test": scores_of(0.7)}}
    make_run(tmp_path / "runs/1", 0.8, evals=every, classes="base")
    _, page = report(tmp_path / "runs", tmp_path)
    assert page.cell("base-to-new-pets-16-shots", "DAPT", "base") == "80.0"
    assert page.cell("base-to-new-pets-16-shots", "DAPT", "all classes") == "70.0"
    new = {"new": {"dataset": "pets", "classes": "new", "test": scores_of(0.4)}}
    make_run(tmp_path / "runs/2", 0.9, method="coop", evals={**every, **new}, classes="base")
    _, page = report(tmp_path / "runs", tmp_path)
    assert page.cell("base-to-new-pets-16-shots", "DAPT", "all classes") == "70.0"
    assert page.cell("base-to-new-pets-16-shots", "DAPT", "new") == "–"
    assert page.cell("base-to-new-pets-16-shots", "CoOp", "new") == "40.0"


def test_ablations_name_what_differs_and_stay_out_of_the_comparison(grid, tmp_path):
    for seed in (1, 2):
        make_run(grid / f"m{seed}", 0.5, seed=seed, text_vectors=4, checkpoint_every=7)
    written, page = report(grid, tmp_path)
    assert page.cell("accuracy-pets", "DAPT", "16 shots") == "72.0 ±5.0"
    table = "ablation-dapt-text-vectors-16-shots"
    assert page.cell(table, "text_vectors = 4", "pets") == "50.0 ±0.0"
    assert page.cell(table, "text_vectors = 16 (main)", "pets") == "72.0 ±5.0"
    assert page.cell(table, "text_vectors = 4", "difference") == "−21.0 ±12.7"
    assert written.warnings == ()


def test_a_sweep_at_the_published_value_is_the_main_runs(tmp_path):
    """A suite does them once: 0.01 is the default of dtd, 10 of eurosat."""
    defaults = {"dtd": 0.01, "eurosat": 10.0}
    accuracies = {("dtd", 0.01): 0.6, ("dtd", 10.0): 0.5, ("eurosat", 0.01): 0.7,
                  ("eurosat", 10.0): 0.9}  # fmt: skip
    for (dataset, beta), accuracy in accuracies.items():
        make_run(tmp_path / f"runs/{dataset}/{beta}", accuracy, dataset=dataset, beta_text=beta,
                 lr=20.0, beta_visual=100.0)  # fmt: skip
        # One more of its main runs, so that the defaults are the most frequent.
        make_run(tmp_path / f"runs/{dataset}/{beta}-2", accuracy, dataset=dataset, seed=2,
                 beta_text=defaults[dataset], lr=20.0, beta_visual=100.0)  # fmt: skip
    shutil.rmtree(tmp_path / "runs/eurosat/0.01-2")
    shutil.rmtree(tmp_path / "runs/dtd/10.0-2")
    _, page = report(tmp_path / "runs", tmp_path)
    table = "ablation-dapt-beta-text-16-shots"
    assert page.cell(table, "beta_text by default (main)", "average") == "75.0 ±0.0"
    assert page.cell(table, "beta_text = 0.01", "dtd") == "60.0 ±0.0"
    assert page.cell(table, "beta_text = 0.01", "eurosat") == "70.0"
    assert page.cell(table, "beta_text = 0.01", "average") == "65.0"
    assert page.cell(table, "beta_text = 10", "average") == "70.0"
    assert page.cell(table, "beta_text = 10", "difference") == "−5.0"


def test_losses_and_prompts_on_and_off(tmp_path):
    for seed in (1, 2):
        for name, accuracy, settings in (
            ("vlpt", 0.5, {"method": "vlpt"}),
            ("inter", 0.6, {"beta_visual": 0}),
            ("intra", 0.7, {"beta_text": 0.0}),
            ("dapt", 0.8, {}),
            ("text", 0.4, {"method": "dapt-text"}),
        ):
            make_run(tmp_path / f"runs/{name}{seed}", accuracy, seed=seed, **settings)
    _, page = report(tmp_path / "runs", tmp_path)
    losses = "ablation-losses-16-shots"
    assert [row[0].strip() for row in page.tables[losses][1:]] == [
        "none (VLPT)", "inter-dispersion only", "intra-dispersion only", "both (DAPT)"]  # fmt: skip
    assert page.cell(losses, "inter-dispersion only", "difference") == "+10.0 ±0.0"
    assert page.cell(losses, "both (DAPT)", "difference") == "+30.0 ±0.0"
    prompts = "ablation-prompts-16-shots"
    row = "text prompt only, inter-dispersion"
    assert page.cell(prompts, row, "pets") == "40.0 ±0.0"
    assert page.cell(prompts, row, "difference") == "−40.0 ±0.0"
    assert list(page.tables).index(losses) < list(page.tables).index(
        "ablation-dapt-beta-text-16-shots"
    )
    for kind in "vlpt", "dapt":  # the two ends alone are in the comparison of methods already
        for seed in (1, 2):
            shutil.move(tmp_path / f"runs/{kind}{seed}", tmp_path / f"ends/{kind}{seed}")
    _, page = report(tmp_path / "ends", tmp_path)
    assert not any(name.startswith("ablation") for name in page.tables)


def test_settings_that_do_not_touch_a_method_tell_no_runs_of_it_apart(tmp_path):
    """Suites of different length share zero-shot, and CoOp has no loss weights."""
    for seed in (1, 2):
        for epochs in (5, 6):
            place = tmp_path / f"runs/{seed}-{epochs}"
            make_run(place / "dapt", 0.1 * epochs, seed=seed, epochs=epochs)
            make_run(place / "zero", 0.4, method="zero-shot", epochs=epochs)
            make_run(place / "coop", 0.5, method="coop", seed=seed, beta_text=epochs)
            # Shorter runs on base classes are another experiment, with main ones of its own.
            make_run(place / "base", 0.8, seed=seed, epochs=2, classes="base")
        make_run(tmp_path / f"runs/{seed + 2}", 0.6, seed=seed + 2, epochs=6)
    written, page = report(tmp_path / "runs", tmp_path)
    assert page.cell("accuracy-pets", "Zero-shot CLIP", "16 shots") == "40.0"
    assert page.cell("accuracy-pets", "CoOp", "16 shots") == "50.0 ±0.0"
    assert page.cell("accuracy-pets", "DAPT", "16 shots") == "60.0 ±0.0"
    found = [name for name in page.tables if name.startswith("ablation")]
    assert found == ["ablation-dapt-epochs-16-shots"]
    assert [row[0].strip() for row in page.tables[found[0]][1:]] == [
        "epochs = 5", "epochs = 6 (main)"]  # fmt: skip
    assert written.warnings == ()


def test_settings_searched_for_each_seed_are_no_ablation(tmp_path):
    for seed in (1, 2, 3):
        make_run(tmp_path / f"runs/{seed}", 0.7, seed=seed, lr=float(seed))
    _, page = report(tmp_path / "runs", tmp_path)
    assert page.cell("accuracy-pets", "DAPT", "16 shots") == "70.0 ±0.0"
    assert not any(name.startswith("ablation") for name in page.tables)


def test_a_repeated_run_counts_once(grid, tmp_path):
    shutil.copytree(grid / "d3", grid / "e3")
    written, page = report(grid, tmp_path)
    assert page.cell("accuracy-pets", "DAPT", "16 shots") == "72.0 ±5.0"
    assert not written.warnings
    edit(grid / "e3" / "metrics.json", test=scores_of(0.5))
    written, page = report(grid, tmp_path)
    assert page.cell("accuracy-pets", "DAPT", "16 shots") == "72.0 ±5.0"
    assert len(written.warnings) == 1
    assert str(grid / "e3") in written.warnings[0]


def test_evaluations_of_a_run_that_suites_share(tmp_path):
    """Each suite's copy was evaluated elsewhere: all count, with the copy's own number."""
    for suite, target, accuracy in (("a", "dtd", 0.4), ("b", "eurosat", 0.3)):
        test = {"dataset": target, "classes": "all", "test": scores_of(accuracy)}
        for seed in (1, 2):
            make_run(tmp_path / f"runs/{suite}/{seed}", 0.7, seed=seed, evals={target: test})
    written, page = report(tmp_path / "runs", tmp_path)
    assert not written.warnings
    name = next(n for n in page.tables if n.startswith("cross"))
    header, row = ([cell.strip() for cell in line] for line in page.tables[name])
    cells = dict(zip(header, row, strict=True))
    assert (cells["dtd"], cells["eurosat"]) == ("40.0 ±0.0", "30.0 ±0.0")


def edit(file, **changes):
    value = json.loads(file.read_text())
    file.write_text(json.dumps({**value, **changes}))


DAMAGE = {
    "half a file": lambda run: (run / "metrics.json").write_text('{"test": {"accu'),
    "nothing": lambda run: (run / "metrics.json").write_text(""),
    "bytes": lambda run: (run / "settings.json").write_bytes(b"\xff\xfe\x00"),
    "deep": lambda run: (run / "metrics.json").write_text("[" * 100_000),
    "a list": lambda run: (run / "settings.json").write_text("[1, 2]"),
    "no settings": lambda run: (run / "settings.json").unlink(),
    "nan": lambda run: edit(run / "metrics.json", test=scores_of(0.5, ece=float("nan"))),
    "above one": lambda run: edit(run / "metrics.json", test=scores_of(0.5, ece=7)),
    "a word": lambda run: edit(run / "metrics.json", test={**scores_of(0.5), "accuracy": "0.9"}),
    "true": lambda run: edit(run / "settings.json", shots=True),
    "huge": lambda run: edit(run / "settings.json", seed=10**400),
    "no name": lambda run: edit(run / "settings.json", method={"$gt": ""}),
    "names": lambda run: edit(run / "task.json", class_names=[1, None]),
    "other run": lambda run: edit(run / "metrics.json", method="coop"),
    "dispersion": lambda run: edit(run / "metrics.json", dispersion={"inter": [1]}),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_run_is_named_and_the_rest_goes_on(damage, grid, tmp_path):
    bad = make_run(grid / "bad-run", 0.1, seed=9)
    damage(bad)
    result = runner.invoke(app, ["report", str(grid), "--out", str(tmp_path / "report.html")])
    assert result.exit_code == 0, result.output
    assert str(bad) in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    page = Page(tmp_path / "report.html")
    assert str(bad) in page.text
    assert page.cell("accuracy-pets", "DAPT", "16 shots") == "72.0 ±5.0"


@pytest.mark.parametrize(
    ("file", "content", "kept"),
    [
        ("environment.json", "[", "shown without it"),
        ("eval-x.json", '{"dataset": 1}', "this evaluation is left out"),
        ("log.csv", "step,epoch,cross_entropy\n0,0,nan\n", "its curves are left out"),
        ("log.csv", "step,epoch,cross_entropy\n0,0\n", "its curves are left out"),
        ("metrics.json", None, "its mistakes are left out"),
    ],
)
def test_a_damaged_part_costs_only_that_part(file, content, kept, tmp_path):
    run = make_run(tmp_path / "runs", 0.7)
    if content is None:
        edit(run / file, test=scores_of(0.7, confusion=[[1, 2], [3]]))
    else:
        (run / file).write_text(content)
    written, page = report(run, tmp_path)
    assert [kept in w and str(run) in w for w in written.warnings] == [True]
    assert page.cell("overview", "DAPT", "accuracy") == "70.0"


HOSTILE = "</script><script>alert(1)</script>"
QUOTED = '\ufffe"><img src=x onerror=alert(1)> $x^ {{7*7}} | `=` \x1b[31m\u202etxt'


def test_names_are_text_wherever_they_stand(tmp_path):
    names = (HOSTILE, QUOTED, "=HYPERLINK('x')")
    evals = {"x": {"dataset": HOSTILE, "test": scores_of(0.4, names)}}
    for seed in (1, 2):
        make_run(tmp_path / f"runs/{seed}", 0.4, seed=seed, dataset=QUOTED, names=names,
                 evals=evals, template=HOSTILE)  # fmt: skip
    make_run(tmp_path / "runs/m", 0.5, method=HOSTILE, dataset=QUOTED, names=names)
    make_run(tmp_path / "runs/<i>", 0.5, dataset=QUOTED, names=names, seed=3, text_init=QUOTED)
    written, page = report(tmp_path / "runs", tmp_path)
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert "i" not in page.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert "49" not in re.findall(r"\$x\^ (\S+)", page.text)
    assert HOSTILE in page.text
    assert "\x1b" not in page.source
    assert "\u202e" not in page.source
    check_links(page, tmp_path)
    for file in written.folder.iterdir():
        assert re.fullmatch(r"[a-z0-9-]+\.(png|svg|md|csv|tex|json)", file.name)
        if file.suffix == ".csv":
            for row in csv.reader(file.open(encoding="utf-8")):
                assert not any(cell[:1] in ("=", "+", "@") for cell in row)
        if file.suffix == ".md":
            assert "<img" not in file.read_text(encoding="utf-8")


def test_no_two_colours_are_one_in_a_figure():
    """The page tells by the light colour which variable a mark of a figure has."""
    light = [colours[0] for colours in PALETTE.values()]
    assert len(set(light)) == len(light)


def test_page_needs_nothing_else(grid, tmp_path):
    _, page = report(grid, tmp_path)
    loads = [v for k, v in page.attributes if k in ("src", "xlink:href", "data", "poster") and v]
    assert all(v.startswith(("#", "data:image/")) for v in loads)
    assert "link" not in page.tags
    assert not re.search(r"url\((?!#)|@import", page.source)


def test_same_runs_give_the_same_bytes(grid, tmp_path):
    def contents():
        written, _ = report(grid, tmp_path)
        files = [written.page, *sorted(written.folder.iterdir())]
        return {file.name: file.read_bytes() for file in files}

    assert contents() == contents()


def test_an_earlier_report_is_replaced_and_nothing_else(grid, tmp_path):
    make_run(grid / "f", 0.5, dataset="flowers")
    written, _ = report(grid, tmp_path)
    assert (written.folder / "accuracy-flowers.csv").exists()
    (written.folder / "mine.txt").write_text("kept")
    shutil.rmtree(grid / "f")
    report(grid, tmp_path)
    assert not (written.folder / "accuracy-flowers.csv").exists()
    assert (written.folder / "mine.txt").exists()
    # Neither what a link leads to nor a page of someone's own.
    (mine := tmp_path / "mine").mkdir()
    (mine / "thesis.csv").write_text("kept")
    (mine / "contents.json").write_text('{"thesis.csv": "chapter 1"}')
    (tmp_path / "linked-files").symlink_to(mine)
    with pytest.raises(UserError, match="is a link"):
        write_report([grid], tmp_path / "linked.html")
    assert sorted(file.name for file in mine.iterdir()) == ["contents.json", "thesis.csv"]
    (tmp_path / "mine.html").write_text("<h1>My own report</h1>")
    with pytest.raises(UserError, match="not a report"):
        write_report([grid], tmp_path / "mine.html")
    assert not (tmp_path / "mine-files").exists()
    (tmp_path / "other-files").mkdir()
    (tmp_path / "other-files" / "thesis.tex").write_text("kept")
    with pytest.raises(UserError, match="not from a report"):
        write_report([grid], tmp_path / "other.html")


def test_what_cannot_be_reported_is_said_in_one_sentence(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "settings.json").write_text('{"editor": 1}')  # of another program
    for arguments, sentence in (
        ([empty], "no run directory is in"),
        ([tmp_path / "none"], "is no folder"),
        ([empty, "--out", tmp_path / "x.pdf"], "ends in .html"),
        ([empty, "--out", tmp_path / "no" / "x.html"], "its folder does not exist"),
    ):
        result = runner.invoke(app, ["report", *map(str, arguments)])
        assert result.exit_code == 2
        assert sentence in " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def tuned(photo_folder, tiny_weights, tmp_path_factory):
    """A real run, whose backbone and images are there; and a copy of its images."""
    root = tmp_path_factory.mktemp("tuned")
    photos = root / "photos"
    shutil.copytree(photo_folder, photos)
    options = [photos, "--backbone", tiny_weights, "--device", "cpu", "--method", "dapt",
               "--shots", 2, "--epochs", 1, "--lr", 0.1, "--set", "text_vectors=2",
               "--set", "visual_vectors=2"]  # fmt: skip
    result = runner.invoke(app, ["train", *map(str, options), "-o", str(root / "run")])
    assert result.exit_code == 0, result.output
    return root / "run", photos


def test_methods_compared_on_unlike_terms_are_named(tmp_path):
    """Not what no method compared has learned by, nor what goes by shots."""
    make_run(tmp_path / "runs/a", 0.5, method="zero-shot", epochs=7, support_set="x.json")
    make_run(tmp_path / "runs/b", 0.6, method="linear-probe", epochs=9)
    make_run(tmp_path / "runs/c", 0.6)
    make_run(tmp_path / "runs/d", 0.6, shots=1, epochs=2)
    make_run(tmp_path / "runs/e", 0.6, shots=1, epochs=2, method="coop")
    written, _ = report(tmp_path / "runs", tmp_path)
    assert written.warnings == ()
    make_run(tmp_path / "runs/f", 0.7, method="coop", epochs=6)
    make_run(tmp_path / "runs/g", 0.8, method="vpt", backbone="ViT-B-16")
    written, page = report(tmp_path / "runs", tmp_path)
    assert [w.split(" (")[0] for w in sorted(written.warnings)] == [
        "pets: methods differ in backbone",
        "pets: methods differ in epochs",
    ]
    assert "VPT ViT-B-16" in page.text
    # Where one method is swept over backbones, those that tables show are still compared.
    make_run(tmp_path / "runs/h", 0.7, backbone="ViT-B-16")
    written, page = report(tmp_path / "runs", tmp_path)
    assert any("methods differ in backbone" in warning for warning in written.warnings)
    (swept := tmp_path / "swept").mkdir()
    for method in ("dapt", "coop"):
        for backbone in ("bundled", "ViT-B-16"):
            make_run(swept / f"{method}-{backbone}", 0.6, method=method, backbone=backbone)
    written, _ = report(swept, tmp_path)
    assert written.warnings == ()


def test_features(tuned, tmp_path, monkeypatch):
    run, photos = tuned
    written, page = report(run, tmp_path, features=True)
    assert written.warnings == ()
    names = {Path(link).stem for link in page.links}
    for kind in ("map-text", "map-image"):
        for time in ("before", "after"):
            assert f"{kind}-photos-dapt-1-{time}" in names
    assert "reliability-photos-dapt-1" in names
    accuracy = json.loads((run / "metrics.json").read_text())["test"]["accuracy"]
    assert accuracy < 1
    images = [v for k, v in page.attributes if k == "src"]
    assert images
    assert all(v.startswith("data:image/webp;base64,") for v in images)
    check_links(page, tmp_path)

    # Of a sample of the images, hardest classes and their figures are those of them all.
    monkeypatch.setattr("dapt.report.inside.MOST_IMAGES", 2)
    monkeypatch.setattr("dapt.report.inside.CLASS_IMAGES", 1)
    _, page = report(run, tmp_path, features=True)
    count = json.loads((run / "metrics.json").read_text())["test"]["images"]
    assert re.search(rf"DAPT, [12] of {count} images", page.text)
    table = [row[:2] for row in page.tables["hardest-photos"][1:7]]
    shown = re.findall(r"<strong>(.+?)</strong> <a [^>]*>(\d+) % right", page.source)
    assert [(n.strip(), f"{float(share):.0f}") for n, share in table] == shown
    monkeypatch.undo()

    # Other images than those it was tuned on are none that a run may choose to show.
    item = json.loads((run / "support_set.json").read_text())["train"][0]
    image = next(p for p in (photos / item["path"], photos / "train" / item["path"]) if p.exists())
    content = image.read_bytes()
    image.write_bytes(content + b"more")
    _, page = report(run, tmp_path, features=True)
    assert "none of them is shown" in " ".join(page.text.split())
    assert "img" not in page.tags
    image.write_bytes(content)
    shutil.copytree(photos, tmp_path / "elsewhere")
    for image in (photos / "test").rglob("*.png"):
        image.unlink()
        image.symlink_to(tmp_path / "elsewhere" / image.relative_to(photos))
    _, page = report(run, tmp_path, features=True)
    assert "img" not in page.tags

    # Without the images: what needs them is left out and named, the text features are there.
    photos.rename(photos.with_name("gone"))
    _, page = report(run, tmp_path, features=True)
    assert "no images to look at" in page.text
    assert "map-text-photos-dapt-1-after" in {Path(link).stem for link in page.links}
    assert "img" not in page.tags
    edit(run / "environment.json", backbone_sha256="other")
    _, page = report(run, tmp_path, features=True)
    assert "its prompts only fit the original ones" in page.text
    _, page = report(run, tmp_path)
    assert "add --features" in " ".join(page.text.split())


@pytest.fixture(scope="module")
def hundred(tmp_path_factory):
    """The report of a hundred runs on five datasets, and how it compares to that on one of them.

    As a multiple of the seconds of computing, which are other ones on another machine.
    """
    folder = tmp_path_factory.mktemp("hundred")
    names = tuple(f"class {i}" for i in range(100))
    away = {
        name: {"dataset": name, "test": scores_of(0.3, names)}
        for name in ("a-target-of-some-length", "another-of-such", "data-0:clay", "data-0:ink")
    }
    for dataset in (f"data-{i}" for i in range(5)):
        for number, method in enumerate(("zero-shot", "coop", "vlpt", "dapt")):
            for shots in (1, 16):
                for seed in (1, 2, 3) if number else (1,):
                    make_run(folder / f"runs/{dataset}/{method}/{shots}-{seed}", 0.4 + number / 10,
                             method=method, dataset=dataset, shots=shots, seed=seed, names=names,
                             evals=away if shots == 16 else {})  # fmt: skip
    (folder / "part").mkdir()
    before = process_time()
    written, page = report(folder / "runs", folder)
    between = process_time()
    report(folder / "runs" / "data-0", folder / "part")
    return written, page, (between - before) / (process_time() - between)


def test_five_times_the_runs_take_about_five_times_as_long(hundred):
    written, page, times = hundred
    assert written.runs == 100
    assert page.cell("accuracy-average", "DAPT", "16 shots") == "70.0 ±0.0"
    assert times < 15


# Elements that reach out of the page, other than in what scrolls by itself.
OUTSIDE = """[...document.querySelectorAll('main *')].filter((e) => !e.closest('.scroll, .drawing')
    && e.getBoundingClientRect().right > innerWidth + 1).length"""


def test_the_page_fits_its_screen_in_light_and_dark(browser, hundred):
    def brightness(selector, what):
        style = f"getComputedStyle(document.querySelector('{selector}')).{what}"
        return sum(map(int, re.findall(r"\d+", browser.evaluate(style))[:3]))

    for width in (380, 1280):
        for scheme in ("light", "dark"):
            browser.look(width, scheme=scheme)
            browser.open(hundred[0].page.as_uri())
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            assert browser.evaluate(OUTSIDE) == 0
            paper = brightness("body", "backgroundColor")
            assert (paper > 380) is (scheme == "light")
            # Text stands out, that of drawings too.
            for selector, what in (("p.lead", "color"), ("td.num a", "color"),
                                   ("figure svg text", "fill")):  # fmt: skip
                assert abs(brightness(selector, what) - paper) > 300
    assert browser.complaints() == []


MANY = ("zero-shot", "coop", "vpt", "dapt", "maple", "clip-lora", "clip-svd", "gda", "clap", "auto")


def test_methods_are_chosen_on_the_page_and_the_rest_is_greyed(browser, tmp_path):
    for number, method in enumerate(MANY):
        for shots in (1, 4):
            accuracy = 0.4 + number / 40 + shots / 50
            make_run(tmp_path / f"runs/{method}-{shots}", accuracy, method=method, shots=shots)
    written, page = report(tmp_path / "runs", tmp_path)
    names = [row[0].strip() for row in page.tables["overview"][1:]]
    assert names == [
        "others", "Zero-shot CLIP", "prompts", "CoOp", "VPT", "DAPT", "MaPLe",
        "weights", "CLIP-LoRA", "CLIP-SVD", "heads", "GDA", "CLAP", "Automatic",
    ]  # fmt: skip
    browser.look(1280)
    browser.open(written.page.as_uri())
    count = "document.querySelectorAll(`{}`).length".format
    assert browser.evaluate(count("#choice label[data-row] input:checked")) == len(MANY)
    # By the keyboard: the box of all heads, then that of one method.
    browser.evaluate("document.querySelectorAll('#choice [data-group]')[3].focus()")
    for kind in ("keyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, key=" ", code="Space", text=" ",
                     windowsVirtualKeyCode=32)  # fmt: skip
    assert browser.evaluate(count("#choice label[data-row] input:checked")) == len(MANY) - 3
    assert browser.evaluate(count("tr[data-row='GDA']:not([hidden])")) == 0
    assert browser.evaluate(count("svg .off[data-row='GDA']")) > 0
    assert browser.evaluate(count("svg .off[data-row='MaPLe']")) == 0
    heading = "[...document.querySelectorAll('tr.group')].filter((r) => !r.hidden).at(-1).innerText"
    assert browser.evaluate(heading).strip() == "weights"
    browser.evaluate("document.querySelector('.key li[data-row=\"MaPLe\"]').dispatchEvent("
                     "new MouseEvent('mouseover', {bubbles: true}))")  # fmt: skip
    assert browser.evaluate(count("svg .dim[data-row='CoOp']")) > 0
    assert browser.evaluate(count("svg .dim[data-row='MaPLe']")) == 0
    browser.open(written.page.as_uri())  # nothing is remembered
    assert browser.evaluate(count("#choice label[data-row] input:checked")) == len(MANY)
    assert browser.complaints() == []


def test_what_a_run_cost_is_shown(tmp_path):
    make_run(tmp_path / "runs", 0.5)
    cost = {"step_seconds": 0.25, "predict_seconds": 0.004, "peak_bytes": 2 * 10**9}
    edit(tmp_path / "runs" / "environment.json", **cost)
    _, page = report(tmp_path / "runs", tmp_path)
    for column, value in (("a step", "250.0"), ("an image", "4.00"), ("peak memory", "2.00")):
        assert page.cell("overview", "DAPT", column) == value
