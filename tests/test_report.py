import copy

import pytest

from helpers.files import save_json
from helpers.run import report


def ev(activation, residual):
    return {
        space: [value, value - 0.01, value + 0.01]
        for space, value in (("activation", activation), ("residual", residual))
    }


METRICS = {
    "00": {"aims": {"all": {"measured": [0.9625, 0.94, 0.98], "aim": 0.75, "met": True}}},
    "01": {"slowdown": 1.0071},
    "02": {
        "pairs": ["t 9 → 5", "t 5 → 1"],
        "ev": {
            "identity": [[0.5, 0.4, 0.6], [0.7, 0.6, 0.8]],
            "ridge": [[0.8, 0.7, 0.9], [0.95, 0.9, 1.0]],
        },
        "round_trip_relative_error": 3.8e-8,
    },
    "04": {
        "ev": {
            "residual concat": ev(0.79, 0.56),
            "raw concat": ev(0.91, 0.38),
            "PCA raw": ev(0, 0),
        },
        "numbers_per_trajectory": {"residual concat": 19.5, "raw concat": 19.9, "PCA raw": 20},
        "alive": {"residual concat": 1.0, "raw concat": 0.86, "PCA raw": None},
        "image_effect": {
            "recorded": {"rmse": [0.01, 0.0, 0.02], "objects kept": [1.0, 0.9, 1.0]},
            "residual concat": {"rmse": [0.05, 0.04, 0.06], "objects kept": [0.9, 0.8, 1.0]},
        },
    },
    "05": {
        "mean_auroc": {
            "residual SAE": {"all labels": [0.64, 0.63, 0.65], "colour": [0.7, 0.6, 0.8]},
            "raw SAE": {"all labels": [0.8, 0.79, 0.81], "colour": [0.9, 0.8, 1.0]},
        },
        "mean_auroc_arbitrary": {"raw SAE": {"all labels": [0.5, 0.4, 0.6], "colour": [0.4] * 3}},
    },
    "06": {
        "chosen": {
            "colour=red | residual latent": {
                **{"strength": 8.0, "success": [0.75, 0.5, 0.9], "kept": [0.6, 0.5, 0.7]},
            },
            "colour=red | random": {
                **{"strength": 0.5, "success": [0.0, 0.0, 0.3], "kept": [1.0, 0.8, 1.0]},
            },
        },
        "paired": {"colour=red | random": [0.4, 0.2, 0.6]},
        "removal": {"class means, ×1": {"still there": [0.25, 0.1, 0.5]}},
        "verdicts": {"random": {"ahead": 1, "behind": 0, "of": 1, "difference": [0.4, 0.2, 0.6]}},
    },
}


def cells(text):
    """The rows of Markdown tables, as lists of their cells."""
    return [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()]


def test_an_estimate_of_nothing_is_a_dash():
    assert cells(report.table([{"": "a", "x": [None, None, None]}]))[-1][-1] == "–"


def test_a_table_is_markdown_with_estimates_and_their_intervals():
    measured = [{"": "raw", "EV": [0.5, 0.25, 1.0]}, {"": "no", "EV": ""}]
    header, rule, *rows = cells(report.table(measured))
    assert header == ["", "EV"] and all(set(cell) <= set("-:") for cell in rule)
    assert rows == [["raw", "0.500 [0.250, 1.000]"], ["no", ""]]


def test_tables_hold_the_metrics():
    rows = cells(report.tables(METRICS))
    for row in (
        ["all", "0.963 [0.940, 0.980]", "≥ 0.75", "met"],
        ["ridge", "0.800 [0.700, 0.900]", "0.950 [0.900, 1.000]"],
        ["raw concat", "0.910 [0.900, 0.920]", "0.380 [0.370, 0.390]", "19.9", "86%"],
        ["PCA raw", "0.000 [-0.010, 0.010]", "0.000 [-0.010, 0.010]", "20.0", ""],
        ["residual concat", "0.050 [0.040, 0.060]", "0.900 [0.800, 1.000]"],
        ["raw SAE", "0.800 [0.790, 0.810]", "0.900 [0.800, 1.000]"],
        ["arbitrary, raw SAE", "0.500 [0.400, 0.600]", "0.400 [0.400, 0.400]"],
        ["colour=red", "residual latent", "×8", "0.750 [0.500, 0.900]", "0.600 [0.500, 0.700]", ""],
        [
            *("colour=red", "random", "×0.5", "0.000 [0.000, 0.300]", "1.000 [0.800, 1.000]"),
            "0.400 [0.200, 0.600]",
        ],
        ["class means, ×1", "0.250 [0.100, 0.500]"],
        ["time with recording / plain pipeline", "1.007"],
    ):
        assert row in rows


def test_findings_are_five_sentences_whose_words_the_figures_choose():
    text = report.findings(METRICS)
    assert [line[:2] for line in text.splitlines()] == ["1.", "2.", "3.", "4.", "5."]
    for words in (
        "meets 1 of 1 aims, set",
        "0.80 to 0.95",
        "no change 0.50 to 0.70",
        "0.800 [0.790, 0.810] (raw SAE)",
        "each space is led",
    ):
        assert words in text
    assert text.index("(raw SAE)") < text.index("(residual SAE)")  # the best comes first
    other = copy.deepcopy(METRICS)
    other["04"]["ev"]["residual concat"]["activation"][0] = 0.95
    other["00"]["aims"]["colour at its place"] = {"met": False}
    text = report.findings(other)
    assert "not each space is led" in text and "1 of 2 aims and misses colour at its place" in text


STUDY = {
    "auroc | a=1": [-0.1, -0.12, -0.08],
    "probe 20 | a=1": [-0.06, -0.07, -0.05],
    "ev | a=1": [-0.15, -0.16, -0.14],
    "ev, residual space | a=1": [0.3, 0.2, 0.4],
    "peak share, trained less untrained | open a=1": [0.02, 0.01, 0.03],
    "when | open sae a=1": [0.2, 0.1, 0.3],
    "when | open untrained a=1": [0.0, -0.1, 0.1],
}


def test_what_residualizing_does_is_told_by_the_figures():
    text = report.residualizing(STUDY)
    assert [line[:2] for line in text.splitlines()] == ["1.", "2.", "3."]
    for words in (
        "-0.150 [-0.160, -0.140]",
        "It splits features",
        "It buys",
        "evidence tells when",
    ):
        assert words in text
    other = STUDY | {
        "auroc | a=1": [-0.1, -0.22, 0.02],
        "peak share, trained less untrained | open a=1": [0.02, -0.01, 0.03],
        "when | open untrained a=1": [0.25, 0.1, 0.4],
    }
    text = report.residualizing(other)
    for words in ("does not split features", "does not buy", "evidence does not tell when"):
        assert words in text
    del other["ev | a=1"]
    assert report.residualizing(other).startswith("Not measured yet")


PAGE = "before\n<!-- results: begin -->\nold\n<!-- results: end -->\nafter\n"


def test_only_what_stands_between_the_markers_is_replaced(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    report.put_between(page, "results", "new")
    assert page.read_text() == PAGE.replace("old", "new")
    for broken in ("nothing", PAGE.replace("<!-- results: end -->", "")):
        page.write_text(broken)
        with pytest.raises(ValueError, match="page.md has no markers"):
            report.put_between(page, "results", "new")
        assert page.read_text() == broken


def test_figures_in_a_text_are_those_of_their_metrics(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "| EV <!--04: ev / raw concat / activation-->old<!----> and "
        "<!--02: ev / ridge / 1 / 0-->?<!----> | <!-- a remark --> |"
    )
    report.renew(page, METRICS)
    assert page.read_text() == (
        "| EV <!--04: ev / raw concat / activation-->0.91 [0.90, 0.92]<!----> and "
        "<!--02: ev / ridge / 1 / 0-->0.95<!----> | <!-- a remark --> |"
    )
    for wrong in ("04: ev / raw", "09: ev", "02: ev / ridge / 7"):
        page.write_text(f"<!--{wrong}-->1<!---->")
        with pytest.raises(ValueError, match="a figure in page.md"):
            report.renew(page, METRICS)


def test_both_pages_are_written_from_the_metrics_folders(tmp_path):
    (tmp_path / "figures").mkdir()
    for page in (tmp_path / "README.md", tmp_path / "figures" / "README.md"):
        page.write_text(PAGE + PAGE.replace("results", "residualizing"))
    (tmp_path / "REPRODUCE.md").write_text("<!--01: slowdown-->1<!---->")
    figures, model_figures = tmp_path / "figures" / "demo", tmp_path / "figures" / "demo_model"
    for name, m in METRICS.items():
        folder = model_figures if name == "00" else figures
        save_json(folder / "metrics" / f"{name}_notebook.json", {"metrics": m}, sort_keys=False)
    save_json(figures / "metrics" / "07_x.json", {"metrics": {"differences": STUDY}})
    report.write(tmp_path, figures, model_figures)
    written = (tmp_path / "README.md").read_text()
    assert ">1.01<" in (tmp_path / "REPRODUCE.md").read_text()
    assert report.findings(METRICS) in written and report.residualizing(STUDY) in written
    assert report.tables(METRICS) in (tmp_path / "figures" / "README.md").read_text()
    (figures / "metrics" / "05_notebook.json").unlink()
    with pytest.raises(FileNotFoundError, match="05"):
        report.write(tmp_path, figures, model_figures)
