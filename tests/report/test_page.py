"""The page: whole in itself, exact in what it says, and right in a browser."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import groupby

import msgspec
import pytest

from mobile_export.parity import Depth
from mobile_export.report.data import gather
from mobile_export.report.figures import Bar, Series, bars, lines, treemap
from mobile_export.report.page import _errors, render, short
from mobile_export.report.sizes import Part

CLAIM = "Verified against the documented semantics of the program, not on the device."


@pytest.fixture
def with_bench(whole, folders, bench_file):
    def add(not_speed=""):
        benches = gather([folders["android"]], bench=[bench_file(not_speed)]).benches
        return msgspec.structs.replace(whole, benches=benches)

    return add


class Elements(HTMLParser):
    """Every element with its attributes, and the text outside style sheets."""

    def __init__(self, page):
        super().__init__()
        self.found, self.text, self.open = [], "", []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def test_it_is_whole_in_itself(with_bench):
    page = render(with_bench())
    elements = Elements(page)
    tags = {tag for tag, _ in elements.found}
    assert {"svg", "table", "style"} <= tags
    assert not tags & {"script", "link", "img", "iframe", "object", "embed"}
    assert not {name for _, attrs in elements.found for name in attrs} & {"src", "href", "onload", "onclick"}
    assert "url(" not in page and "@import" not in page
    assert len(page) < 300_000


def test_the_same_report_gives_the_same_page(whole):
    assert render(whole) == render(whole)


def test_every_section_is_there(with_bench):
    elements = Elements(render(with_bench()))
    sections = [attrs["id"] for tag, attrs in elements.found if tag == "section"]
    assert sections == ["artefacts", "sizes", "parity", "position", "errors", "fp16", "speed", "provenance"]


def test_nothing_given_is_said(folders):
    elements = Elements(render(gather([folders["android"]])))
    assert "No parity report was given" in elements.text
    assert "No bench report was given" in elements.text
    assert CLAIM not in elements.text
    assert "artifact, short prompts" in elements.text


def test_core_ml_is_never_said_to_have_run(whole):
    assert Elements(render(whole)).text.count(CLAIM) >= 3  # beside its figures, its parity and its ranges


def test_what_is_no_speed_is_not_shown_as_one(with_bench):
    text = Elements(render(with_bench())).text
    assert "ios on host: not a speed (evaluated, not run)" in text
    assert "prefill 32, 2 threads: android" in text and ": ios" not in text
    text = Elements(render(with_bench("emulated by qemu"))).text
    assert "Nothing measured here is a speed." in text
    assert "tokens/s" not in text and "Prefill" not in text
    assert "android on qemu-arm64: not a speed (emulated by qemu)" in text


def test_errors_by_layer_are_those_blame_found(whole):
    chart = _errors(whole.blames[0].report)
    taps = whole.blames[0].report.taps
    assert chart.svg.count("<polyline") == 3
    layers = [layer for layer, _ in groupby(tap.layer for tap in taps)]
    assert layers == [None, 0, 1, None] and chart.svg.count("<circle") == 3 * len(layers)
    text = Elements(render(whole)).text
    assert "quantized -> artifact: no op of any layer errs more than its arithmetic explains" in text


def test_a_failed_stage_is_seen(whole):
    (found,) = whole.parity
    failed = msgspec.structs.replace(found.report.stages[0], passed=False)
    report = msgspec.structs.replace(found.report, stages=(failed,))
    text = Elements(render(changed(whole, parity=(msgspec.structs.replace(found, report=report),)))).text
    assert "FAIL" in text
    assert "FAIL" not in Elements(render(whole)).text


def test_parity_on_a_device_stands_beside_parity_here(whole):
    (found,) = whole.parity
    there = msgspec.structs.replace(found.report, device="qemu-arm64")
    both = (found, msgspec.structs.replace(found, report=there))
    elements = Elements(render(changed(whole, parity=both)))
    assert "ios on qemu-arm64 ok" in elements.text and "ios ok" in elements.text
    assert "artifact fp16 on qemu-arm64" in elements.text


def test_a_stage_that_is_not_finite_is_drawn_without_a_number(whole):
    (found,) = whole.parity
    first = found.report.stages[0]
    metrics = msgspec.structs.replace(first.metrics, kl_mean=None, perplexity_ratio=None)
    depths = (Depth(first=0, last=0, positions=1, kl_mean=None),)
    stage = msgspec.structs.replace(first, metrics=metrics, by_position=depths, passed=False)
    report = msgspec.structs.replace(found.report, stages=(stage, *found.report.stages[1:]))
    page = render(changed(whole, parity=(msgspec.structs.replace(found, report=report),)))
    assert not re.search(r"\b(nan|inf)\b", Elements(page).text, re.IGNORECASE)


def test_what_a_manifest_says_is_only_text(whole):
    first = whole.bundles[0]
    model = msgspec.structs.replace(first.manifest.model, spec="<script>alert(1)</script>")
    made = msgspec.structs.replace(first.manifest, model=model)
    page = render(changed(whole, model="<b>x", bundles=(msgspec.structs.replace(first, manifest=made),)))
    tags = {tag for tag, _ in Elements(page).found}
    assert "script" not in tags and "b" not in tags


def changed(report, **fields):
    return msgspec.structs.replace(report, **fields)


def test_areas_of_a_treemap_are_in_proportion():
    sizes = {"q_proj": 300, "up_proj": 500, "scales": 200}
    groups = dict(zip(sizes, ("attention", "mlp", "overhead"), strict=True))
    svg = treemap([Part(group=groups[name], name=name, bytes=size) for name, size in sizes.items()])
    cells = re.findall(r'class="cell (\w+)".*?width="([\d.]+)" height="([\d.]+)"', svg)
    areas = {group: float(width) * float(height) for group, width, height in cells}
    assert sum(areas.values()) == pytest.approx(320 * 200, rel=1e-3)
    for name, size in sizes.items():
        assert areas[groups[name]] / (320 * 200) == pytest.approx(size / 1000, rel=1e-3)


def test_bars_are_as_long_as_their_values():
    svg = bars([Bar("a", 50.0, "50"), Bar("b", 100.0, "100", kind="peer")])
    assert [float(width) for width in re.findall(r'class="bar \w+".*?width="([\d.]+)"', svg)] == [160, 320]
    svg = bars([Bar("a", 1e-4, ""), Bar("b", 1e-2, ""), Bar("c", 0.0, "")], floor=1e-6)
    assert [float(width) for width in re.findall(r'class="bar \w+".*?width="([\d.]+)"', svg)] == [160, 320, 0]


def test_a_line_leaves_out_what_a_logarithm_cannot_show():
    svg = lines([Series("a", [1e-3, None, 0.0, 1e-2])], ["0", "1", "2", "3"], limit=1.0)
    assert svg.count("<circle") == 2
    heights = [float(y) for y in re.findall(r'cy="([\d.]+)"', svg)]
    limit = float(re.search(r'class="limit".*?y1="([\d.]+)"', svg).group(1))
    assert heights[0] > heights[1] > limit  # y grows downwards


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0.00123456, "0.00123"), (1234, "1,234"), ("x", "x")]
)
def test_figures_are_short(value, text):
    assert short(value) == text


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = """<body style="margin:0"><iframe src="{page}" style="border:0;width:{width}px;height:900px"></iframe>
<script>onload = () => {{
  const inner = document.querySelector("iframe").contentDocument, root = inner.documentElement
  const past = [...inner.querySelectorAll("svg text")].filter(one => {{
    const box = one.getBBox(), view = one.ownerSVGElement.viewBox.baseVal
    return box.x < -1 || box.x + box.width > view.width + 1
  }})
  document.body.textContent = JSON.stringify({{
    wide: root.scrollWidth, back: inner.defaultView.getComputedStyle(inner.body).backgroundColor,
    drawn: [...inner.querySelectorAll("svg")].every(one => one.getBoundingClientRect().height > 20),
    past: past.map(one => one.textContent),
  }})
}}</script>"""


@pytest.fixture
def browse(tmp_path):
    """Show a page in Chromium: what a probe measured there, and what came up on the console."""

    def show(text, width, dark=False):
        page, probe = tmp_path / "page.html", tmp_path / "probe.html"
        page.write_text(text, "utf-8")
        probe.write_text(PROBE.format(page=page.as_uri(), width=width), "utf-8")
        command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        command += [
            "--allow-file-access-from-files",
            "--enable-logging=stderr",
            f"--user-data-dir={tmp_path}/home",
        ]
        command += ["--blink-settings=preferredColorScheme=0"] * dark
        done = subprocess.run([*command, probe.as_uri()], capture_output=True, text=True, timeout=120)
        measured = re.search(r"<body[^>]*>(\{.*\})</body>", done.stdout, re.DOTALL)
        assert measured, done.stderr
        return json.loads(measured.group(1)), [one for one in done.stderr.splitlines() if "CONSOLE" in one]

    return show


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")
def test_it_fits_a_phone_and_a_desk_in_light_and_dark(with_bench, browse):
    page, backs = render(with_bench()), {}
    for width in (360, 390, 1280):
        for dark in (False, True):
            measured, said = browse(page, width, dark)
            assert said == []
            assert measured["wide"] <= width and measured["drawn"], (width, measured)
            assert measured["past"] == []
            backs.setdefault(dark, set()).add(measured["back"])
    assert backs == {False: {"rgb(255, 255, 255)"}, True: {"rgb(20, 23, 27)"}}


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")
def test_the_probe_sees_what_is_wrong(browse):
    broken = (
        "<div style='width:900px'>x</div><svg width=9 height=9></svg><script>console.error('oh')</script>"
    )
    measured, said = browse(broken, 390)
    assert measured["wide"] >= 900 and not measured["drawn"]
    assert len(said) == 1 and "oh" in said[0]


def test_the_command_writes_both_or_says_what_is_wrong(cli, folders, parity_file, tmp_path):
    page, data = tmp_path / "new" / "report.html", tmp_path / "report.json"
    done = cli("report", *folders.values(), "--parity", parity_file, "-o", page, "--json", data)
    assert (done.returncode, done.stdout.strip()) == (0, str(page)), done.stderr
    assert page.read_text("utf-8").startswith("<!doctype html>")
    assert json.loads(data.read_bytes())["format"] == "mobile-export-report"
    done = cli("report", folders["android"], "--parity", parity_file, "-o", tmp_path / "no.html")
    assert done.returncode == 2 and not (tmp_path / "no.html").exists()
    assert done.stderr.splitlines()[-1].startswith("error: 'ios.json' is of none of these bundles")
