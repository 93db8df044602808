"""The report: what it shows of real runs and rows, and how it looks in a real browser."""

import json
import pathlib
import re
import shutil
import subprocess

import pytest

from experiments.common import provenance
from experiments.reporting.record import load_results
from tests.experiments.programs import call
from tests.training.tiny import tiny_config
from tree_ffn.training.loop import train

ROOT = pathlib.Path(__file__).parent.parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian package chromium)")


@pytest.fixture(scope="module")
def runs(texts, tmp_path_factory):
    """A directory with runs of a path layer, a leaf layer and a dense one, and a directory that is no run."""
    directory = tmp_path_factory.mktemp("runs")
    for name, changes in {
        "hard": {"kind": "tree", "train__probe": True}, "leaf": {"kind": "leaf"},
        "narrow": {"kind": "narrow"},
    }.items():  # fmt: skip
        config = tiny_config(texts, **changes)
        train(config, str(directory / name), log=lambda _: None, bar=False, origin=provenance.origin)
    (directory / "empty").mkdir()
    return directory


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    """A report of everything: the runs, and all rows of this repository."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    outcome = call(
        "report", f"--workdir={runs}/*", f"--results={ROOT}/results/*.jsonl", "--details=3", f"--to={path}"
    )
    assert outcome.code == 0, outcome.err
    return path


def test_one_run(runs, tmp_path):
    path = tmp_path / "hard.html"
    assert call("report", f"--workdir={runs}/hard", f"--to={path}").code == 0
    text = path.read_text()
    for said in (
        "routing hard", "sha256", "Leaves that move", "Dead leaves", "Leaf entropy", "Right share", "Skew",
        "Gradient by side", "Working units", "Visits of leaves, layer 0", "Visits of leaves, layer 1",
        "validation loss", "from step 0, commit ", "python -m experiments.", "jax ",
    ):  # fmt: skip
        assert said in text, said
    assert str(runs) not in text and "<script" not in text
    assert len(text.encode()) < 200_000


def test_experts_and_layers_that_do_not_route(runs, tmp_path):
    for name, routes in (("leaf", True), ("narrow", False)):
        path = tmp_path / f"{name}.html"
        assert call("report", f"--workdir={runs}/{name}", f"--to={path}").code == 0
        text = path.read_text()
        for said in ("router tree, 3 of 8 experts of 2 units", "Dead leaves", "each of 8 leaves"):
            assert (said in text) == routes
        assert "Leaves that move" not in text and "Working units" not in text and "Loss over steps" in text


@pytest.mark.slow
def test_everything_together(page):
    text = page.read_text()
    for name in ("hard", "leaf", "narrow"):
        assert f"<b>{name}</b>" in text
    assert "<b>empty</b>" not in text
    assert text.count("<table>") >= 8 and "Pareto front" in text
    assert not re.findall(r'(?:href|src)="(?!data:|#)', text), "nothing comes from elsewhere"
    assert len(text.encode()) < 2_000_000


def test_an_older_report_is_replaced_and_nothing_else(runs, tmp_path):
    path = tmp_path / "report.html"
    arguments = [f"--workdir={runs}/narrow", f"--to={path}"]
    assert call("report", *arguments).code == 0 and call("report", *arguments).code == 0
    path.write_text("my notes")
    outcome = call("report", *arguments)
    assert outcome.code == 2 and "is no report" in outcome.err and path.read_text() == "my notes"


def test_what_is_refused(runs, tmp_path):
    to = f"--to={tmp_path}/x.html"
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    rows = load_results(str(ROOT / "results/t4_cpu.jsonl"))
    rows[-1]["config"]["train"]["batch_size"] += 1
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("\n".join(map(json.dumps, rows)))
    for arguments, said in (
        ([to], "--workdir is missing"),
        ([f"--workdir={runs}/hard"], "--to is missing"),
        ([f"--workdir={runs}/nowhere", to], "is no directory"),
        ([f"--workdir={runs}/empty", to], "cannot be read"),
        ([f"--workdir={runs}/hard", "--details=-1", to], "--details"),
        ([f"--results={empty}", to], "holds no rows"),
        ([f"--results={mixed}", to], "train.batch_size"),
    ):
        outcome = call("report", *arguments)
        assert outcome.code == 2 and said in outcome.err, (arguments, outcome.err)
        assert len(outcome.err.strip().splitlines()) == 1
    assert not (tmp_path / "x.html").exists()


@pytest.mark.parametrize(
    "key,value",
    [
        ("train.steps", 12),
        *(
            pytest.param(*other, marks=pytest.mark.slow)
            for other in (("model.max_seq_len", 24), ("data.sha256", "0" * 64))
        ),
    ],
)
def test_runs_that_cannot_be_compared_are_refused_unless_asked(runs, tmp_path, key, value):
    section, name = key.split(".")
    shutil.copytree(runs / "narrow", tmp_path / "other", ignore=shutil.ignore_patterns("checkpoints"))
    file = tmp_path / "other" / ("data.json" if section == "data" else "config.json")
    facts = json.loads(file.read_text())
    (facts if section == "data" else facts[section])[name] = value
    file.write_text(json.dumps(facts))
    page = tmp_path / "page.html"
    assert call("report", f"--workdir={runs}/narrow", f"--to={page}").code == 0
    before = page.read_text()
    arguments = [f"--workdir={runs}/narrow,{tmp_path}/other", f"--to={page}"]
    refused = call("report", *arguments)
    assert refused.code == 2 and page.read_text() == before
    assert (
        f"--workdir: {key} is both" in refused.err and f"and {value!r}; only runs of one text" in refused.err
    )
    assert len(refused.err.strip().splitlines()) == 1
    assert call("report", *arguments, "--mixed").code == 0
    assert f"MIXED: the runs differ in {key} and cannot be compared." in page.read_text()


def test_points_of_other_data_stay_apart_where_they_are_asked_for(tmp_path):
    rows = load_results(str(ROOT / "results/t1_cpu.jsonl"))
    other = [json.loads(json.dumps(row)) for row in rows if row["row"] == "narrow_A16"]
    for row in other:
        row["config"]["data"]["sha256"] = "f" * 64
    mixed, page = tmp_path / "mixed.jsonl", tmp_path / "page.html"
    mixed.write_text("\n".join(map(json.dumps, rows + other)))
    arguments = [f"--results={mixed}", f"--to={page}"]
    refused = call("report", *arguments)
    assert refused.code == 2 and "data.sha256 is both" in refused.err and not page.exists()
    assert call("report", *arguments, "--mixed").code == 0
    text = page.read_text()
    assert "MIXED: points differ in data.sha256" in text and ">narrow_A16@ffffffff <" in text


PROBE = """<script>addEventListener("load", () => {
  const linear = v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(v => linear(v / 255));
    return .2126 * r + .7152 * g + .0722 * b };
  const ground = light(getComputedStyle(document.body).backgroundColor);
  const texts = [...document.querySelectorAll("h1,h2,p,b,li,li span,figcaption,td,th,pre,svg text")];
  const contrast = texts.map(e => {
    const s = getComputedStyle(e), l = light(e.namespaceURI.endsWith("svg") ? s.fill : s.color);
    return (Math.max(l, ground) + .05) / (Math.min(l, ground) + .05) });
  const figures = [...document.querySelectorAll("figure svg")];
  const cut = figures.filter(s => [...s.querySelectorAll("text")].some(t => {
    const a = t.getBoundingClientRect(), b = s.getBoundingClientRect();
    return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1 }))
    .map(s => s.querySelector("title").textContent);
  const covered = figures.filter(s => { const boxes = [...s.querySelectorAll("text")]
    .map(t => t.getBoundingClientRect()); return boxes.some((a, i) => boxes.slice(i + 1).some(b =>
    a.left + 1 < b.right && b.left + 1 < a.right && a.top + 3 < b.bottom && b.top + 3 < a.bottom)) })
    .map(s => s.querySelector("title").textContent);
  document.title = JSON.stringify({ground, contrast: Math.min(...contrast), texts: contrast.length,
    cut, covered, figures: figures.filter(s => s.getBoundingClientRect().height > 100).length,
    overflow: document.documentElement.scrollWidth - innerWidth,
    requests: performance.getEntriesByType("resource").filter(r => !r.name.startsWith("data:")).length});
})</script>"""


def look(page, tmp_path, *options):
    """What a browser says of the page, after it has laid it out."""
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text().replace("</head>", PROBE + "</head>"))
    command = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        *options,
    ]
    done = subprocess.run(
        [*command, f"--user-data-dir={tmp_path}/profile", "--dump-dom", probed.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    return json.loads(re.search(r"<title>(\{.*?\})</title>", done.stdout)[1].replace("&quot;", '"'))


@browser
@pytest.mark.parametrize(
    "width, dark",  # Chromium makes no narrower window than 500
    [
        (1280, False),
        (500, True),
        pytest.param(1280, True, marks=pytest.mark.slow),
        pytest.param(500, False, marks=pytest.mark.slow),
    ],
)
def test_in_a_browser(page, tmp_path, dark, width):
    options = [f"--window-size={width},900"]
    seen = look(page, tmp_path, *options, *(["--blink-settings=preferredColorScheme=0"] if dark else []))
    assert (seen["ground"] < 0.05) if dark else (seen["ground"] > 0.95)
    assert seen["contrast"] >= 4.5 and seen["texts"] > 500
    assert seen["figures"] == page.read_text().count("<figure>") > 30
    assert seen["overflow"] <= 0 and seen["requests"] == 0
    assert seen["cut"] == [] and seen["covered"] == []


@browser
def test_in_print(page, tmp_path):
    pdf = tmp_path / "report.pdf"
    command = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}/profile",
    ]
    subprocess.run(
        [*command, f"--print-to-pdf={pdf}", page.as_uri()], check=True, capture_output=True, timeout=120
    )
    content = pdf.read_bytes()
    assert content.startswith(b"%PDF") and 3 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 60
