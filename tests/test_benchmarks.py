"""Tests `benchmarks/` without measuring: its commands, and which contenders get a time."""

import argparse
import importlib
import importlib.util
import os
import re
import shlex
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pycocotools.mask
import pytest

from sam_jax.ops import attention

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def commands():
    """The modules and arguments of the commands in README and gpu.sh."""
    readme = (ROOT / "benchmarks" / "README.md").read_text()
    found = re.findall(r"`python -m (benchmarks\.\w+)([^`]*)`", readme)
    script = (ROOT / "benchmarks" / "gpu.sh").read_text().replace("\\\n", " ")
    found += re.findall(r'^ +try "\$python" -m (benchmarks\.(?!run)\w+)(.*)$', script, re.MULTILINE)
    fixed = re.search(r'-m (benchmarks\.run .*) "\$@"', script)[1].removeprefix("benchmarks.run ")
    ours = re.findall(r"^ +benchmark (.*)$", script, re.MULTILINE)
    return found + [("benchmarks.run", f"{fixed} {arguments}") for arguments in ours]


class Parsed(Exception):
    """Ends a benchmark after it has parsed its arguments."""


@pytest.fixture(scope="module", autouse=True)
def imported():
    """Imports all modules, and undoes the settings that they change on import."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        patch.setenv("JAX_PLATFORMS", "cpu")
        patch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
        patch.setattr(attention, "_IMPLEMENTATIONS", {**attention._IMPLEMENTATIONS})
        for path in (ROOT / "benchmarks").glob("*.py"):
            importlib.import_module(f"benchmarks.{path.stem}")
        yield


@pytest.fixture(autouse=True)
def results(monkeypatch, tmp_path):
    """Redirects the results to a temporary folder, since the real one is committed."""
    common = importlib.import_module("benchmarks.common")
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    return common.RESULTS


def test_documented_commands_are_valid(monkeypatch):
    parse = argparse.ArgumentParser.parse_args
    assert len(commands()) > 20
    for name, text in commands():
        module = importlib.import_module(name)

        def stop(self, arguments=shlex.split(text)):  # noqa: B008
            parse(self, arguments)
            raise Parsed

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Parsed):
            module.main()


@pytest.fixture
def run():
    return importlib.import_module("benchmarks.run")


def test_wrong_and_failing_contenders_get_no_time(run):
    expected = np.arange(6.0)
    left = iter([expected])

    def ends():
        return next(left)  # works once, and fails when it is timed

    contenders = {
        "first": lambda: expected,
        "fails": lambda: 1 / 0,
        "wrong": lambda: 1.001 * expected,
        "ends": ends,
        "ours": lambda: expected.reshape(2, 3),
    }
    raced = run.race("decoder", contenders, "float32", 3)
    rows = {who: raced.row(who) for who in contenders}
    assert set(raced.times) == {"first", "ours"} == set(raced.peaks)
    assert rows["first"]["Difference"] == rows["ours"]["Difference"] == "0e+00"
    assert "Ours is faster by" in rows["first"]
    assert rows["wrong"] == {"Difference": "1e-03", "Time": "differs"}
    assert rows["fails"] == {"Difference": "ZeroDivisionError: division by zero", "Time": "none"}
    assert rows["ends"]["Time"] == "none"


def test_scores_are_compared_like_masks(run):
    masks, scores = np.ones(1000), np.ones(2)
    contenders = {"first": lambda: (masks, scores), "ours": lambda: (masks, 1.01 * scores)}
    raced = run.race("decoder", contenders, "float32", 1)
    assert raced.row("ours") == {"Difference": "1e-02", "Time": "differs"}


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("run", ["--repeat", "0"], "--repeat is 0, expected at least 1"),
        ("run", ["--parts", "windows"], "windows: only ViTs have this; omit mobile_sam"),
        ("everything", ["--photos", "lanscape"], "--photos is lanscape, but photos are: landscape"),
        ("accuracy", ["--photos", "small", "b"], "--photos is b, but photos are: landscape"),
    ],
)
def test_bad_arguments(name, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [name, *arguments])
    with pytest.raises(SystemExit):
        importlib.import_module(f"benchmarks.{name}").main()
    assert message in capsys.readouterr().err


def test_tables_are_printed_and_kept(results, monkeypatch, capsys):
    common = importlib.import_module("benchmarks.common")
    monkeypatch.setattr("sys.argv", ["/x/benchmarks/run.py", "--photos", "two words"])
    machine, slug = common.machine_line(("jax",), 2e11), common.machine_slug()
    assert re.fullmatch(r"\d+ cores, .+; Python 3\.\S+, jax \S+; 200 GFLOP/s", machine)
    assert re.fullmatch(r"\d+-core-\w+", slug)
    empty = common.Table("Nothing", ["What"], machine)
    assert not empty.path.exists()
    for heading in ("First", "Second"):
        table = common.Table(heading, ["What", "Time", "Peak"], machine)
        table.add(["encoder", "1 s", 2])
        table.add({"What": "decoder", "Peak": "3"})
    (path,) = results.iterdir()
    assert re.fullmatch(rf"\d{{4}}-\d\d-\d\d-{slug}\.md", path.name)
    text = path.read_text()
    rows = "| What | Time | Peak |\n|---|---:|---:|\n| encoder | 1 s | 2 |\n| decoder |  | 3 |\n"
    assert text.count(rows) == 2
    assert (
        f"\n## Second\n\n`python -m benchmarks.run --photos 'two words'`, {path.name[:10]}" in text
    )
    assert machine in text
    assert text.endswith(capsys.readouterr().out.split("## First")[1])


def test_a_gpu_names_its_results():
    class Device:
        platform, device_kind = "gpu", "NVIDIA H100 80GB HBM3"

    slug = importlib.import_module("benchmarks.common").machine_slug(Device)
    assert slug == "nvidia-h100-80gb-hbm3"


def test_the_page_and_readme_show_the_newest_results():
    """`benchmarks.plot` makes the table of `docs/performance.md` and README, and the figure."""
    plot = importlib.import_module("benchmarks.plot")
    _, found = plot.newest(ROOT / "benchmarks" / "results")
    rows = plot.table(found).splitlines()[2:]
    for page in ("docs/performance.md", "README.md"):
        text = (ROOT / page).read_text()
        assert [row for row in rows if row not in text] == [], page
    figure = (ROOT / "docs" / "performance.svg").read_text()
    for seconds in re.findall(r"\| [*]*([\d.]+)[*]* (?=\|)", "\n".join(rows)):
        assert f"<!-- {seconds} s -->" in figure


def test_a_crash_does_not_affect_the_next_process(run):
    with pytest.raises(BrokenProcessPool):
        run.alone(os._exit, 1)
    assert run.alone(abs, -1) == 1


# Arrays of 1, 4, 1 and 1 GB; arrays inside a fusion and bitcasts do not count as traffic.
HLO = """HloModule jit_f

%fused (x: bf16[500000000]) -> f32[1000000000] {
  ROOT %y = f32[1000000000]{0} convert(%x)
}

ENTRY %main (p: bf16[500000000]) -> f32[250000000] {
  %p = bf16[500000000]{0} parameter(0)
  %logits = f32[1000000000]{0} fusion(%p), kind=kLoop, calls=%fused
  %t = f32[1000,1000000]{1,0} bitcast(%logits)
  %flash = (bf16[500000000], u8[0]) custom-call(%p, %t), custom_call_target="__cudnn$fmhaSoftmax"
  %first = bf16[500000000]{0} get-tuple-element(%flash), index=0
  ROOT %sum = f32[250000000]{0} fusion(%first), kind=kInput, calls=%summed
}
"""


def test_traffic_and_arrays_of_a_program():
    compiled = importlib.import_module("benchmarks.compiled")
    found = compiled.analyze(HLO, logits=10**9)
    assert found == {
        "Traffic": f"{(1 + 4) + (1 + 4 + 1) + (1 + 1):.1f} GB",
        "Flash": "1, 0",
        "N x N": "1",
    }
    backward = HLO.replace("fmhaSoftmax", "fmhaScaleBiasSoftmaxBackward")
    assert compiled.analyze(backward, logits=10**10) == found | {"Flash": "0, 1", "N x N": "0"}
    ours = HLO.replace(
        '"__cudnn$fmhaSoftmax"', '"triton", metadata={op_name="jit(f)/flash_attention/pallas_call"}'
    )
    assert compiled.analyze(ours, logits=10**9) == found
    backward = ours.replace("attention/", "attention_backward_keys/")
    assert compiled.analyze(backward, logits=10**9) == found | {"Flash": "0, 1"}


def test_share_of_missing_masks(run):
    def record(rows):
        mask = np.zeros((20, 20), np.uint8, order="F")
        mask[rows] = 1
        return {"segmentation": pycocotools.mask.encode(mask)}

    two = [record(slice(0, 10)), record(slice(10, 20))]
    assert run.missing(two[::-1], two, 0.99) == 0
    assert run.missing(two[:1], two, 0.99) == 0.5
    smaller = [record(slice(0, 9)), two[1]]
    assert [run.missing(smaller, two, iou) for iou in (0.91, 0.89)] == [0.5, 0]
    assert run.missing([], two, 0.99) == 1
    assert run.missing([], [], 0.99) == 0
