"""`examples/finetune.py` and `sam-jax evaluate`, from end to end on a small model."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from cores import all_cores
from finetuning import (
    STEPS,
    arguments,
    config_of,
    finetune,
    model_fixture,  # noqa: F401
)
from PIL import Image
from reference import SHALLOW

from sam_jax import cli, from_pretrained
from sam_jax.checkpoints.params import flat_params
from sam_jax.evaluation.clicks import evaluate
from sam_jax.runs import lock_folder
from sam_jax.training.checkpointing import open_checkpoints
from sam_jax.training.datasets import open_annotations
from sam_jax.training.log import MetricsLog
from sam_jax.training.lora import load_lora
from sam_jax.training.rules import EVERYTHING, OptimizerConfig

pytestmark = pytest.mark.slow

EXAMPLES = Path(finetune.__file__).parent

# Runs a script that kills itself once it has logged step 7 and saved the checkpoint of step 4.
KILLED = """
import os, runpy, signal, sys, time
from pathlib import Path

from sam_jax.training.log import MetricsLog

script, output = sys.argv[1:3]
write = MetricsLog.write

def write_then_die(log, step, *args, **options):
    write(log, step, *args, **options)
    if step == 7:
        while not Path(output, "checkpoints", "4").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

MetricsLog.write = write_then_die
sys.argv = [script, *sys.argv[3:]]
runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "cells"
    command = [
        sys.executable,
        EXAMPLES / "cells.py",
        "--output",
        path,
        "--train",
        "5",
        "--test",
        "2",
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return path


def start(cells, model, output, *options, killed=False):
    command = [sys.executable, EXAMPLES / "finetune.py"]
    if killed:
        command = [sys.executable, "-c", KILLED, EXAMPLES / "finetune.py", output]
    return subprocess.Popen(
        [*map(str, command), *arguments(cells, model, output, *options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    printed, errors = process.communicate(timeout=300)
    return process.returncode, printed, errors


def evaluated(printed):
    """The steps whose evaluations were printed."""
    return [json.loads(line)["step"] for line in printed.splitlines() if line.startswith("{")]


def lines(output):
    path = output / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def saved(output, step, part):
    """A checkpoint's trained parameters, or their moving average, by name."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with open_checkpoints(output / "checkpoints") as checkpoints:
        shapes = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
            for name, x in checkpoints.metadata(step).metadata.items()
        }
        arrays = checkpoints.load(step, shapes)
    found = {}
    for name, array in arrays.items():
        if f" .{part}[" in name:
            keys = re.findall(r"\['?(\w+)'?\]", name)
            found[".".join(keys)] = np.asarray(array)
    return found


# Everything random: the drawn prompts, the order, and mirrored images.
RANDOM = ["--train", "everything", "--flip", "0.5", "--ema-decay", "0.9"]


@pytest.fixture(scope="module")
def whole(cells, model, tmp_path_factory):
    """An uninterrupted run."""
    output = tmp_path_factory.mktemp("run") / "run"
    code, printed, errors = finish(start(cells, model, output, *RANDOM))
    assert code == 0, errors
    assert evaluated(printed) == [4, 8, 12, 14]
    assert printed.splitlines()[-1] == str(output / "model")
    return output


def test_outputs_of_a_run(whole, model):
    found = lines(whole)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    assert all(np.isfinite(line["loss"]) for line in found)
    assert np.mean([x["loss"] for x in found[-4:]]) < np.mean([x["loss"] for x in found[:4]])
    _, rate = OptimizerConfig(learning_rate=1e-3).build(EVERYTHING, STEPS)
    expected = [rate(step) for step in range(STEPS)]
    np.testing.assert_allclose([x["learning_rate"] for x in found], expected, rtol=1e-6)
    assert list((whole / "tensorboard").iterdir())
    tuned, before = (
        flat_params(from_pretrained(whole / "model")),
        flat_params(from_pretrained(model)),
    )
    assert tuned.keys() == before.keys()
    assert any(not np.array_equal(tuned[name], before[name]) for name in tuned)
    # The saved model is the moving average.
    average, last = (saved(whole, STEPS, part) for part in ("ema", "params"))
    buffer = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
    assert average.keys() == tuned.keys() - {buffer}
    for name, value in average.items():
        np.testing.assert_array_equal(tuned[name], value)
    assert any(not np.array_equal(last[name], average[name]) for name in average)


def test_a_killed_run_resumes_bit_for_bit(whole, cells, model, tmp_path):
    output = tmp_path / "run"
    code, _, errors = finish(start(cells, model, output, *RANDOM, killed=True))
    assert code == -signal.SIGKILL, errors
    assert lines(output) == lines(whole)[:7]
    assert not (output / "model").exists()
    code, printed, errors = finish(start(cells, model, output, *RANDOM))
    assert code == 0, errors
    assert evaluated(printed) == [8, 12, 14]
    assert lines(output) == lines(whole)
    expected = flat_params(from_pretrained(whole / "model"))
    for name, value in flat_params(from_pretrained(output / "model")).items():
        np.testing.assert_array_equal(value, expected[name])


def test_a_finished_run_does_not_change(whole, cells, model):
    before = (whole / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"settings: seed was '0', now '1'\. Choose another"):
        finetune.main(config_of(cells, model, whole, *RANDOM, "--seed", "1"))
    annotations = cells / "train.json"
    content = annotations.read_text()
    annotations.write_text(content + "\n")
    with pytest.raises(ValueError, match=r"different settings: data was '\w{64}', now '\w{64}'\. "):
        finetune.main(config_of(cells, model, whole, *RANDOM))
    annotations.write_text(content)
    # Relative and absolute paths count as the same setting.
    near = [Path(os.path.relpath(path)) for path in (cells, model)]
    finetune.main(config_of(*near, whole, *RANDOM))
    assert (whole / "metrics.jsonl").read_bytes() == before


def stop_at(monkeypatch, step, number):
    """Sends a signal while the step runs, as soon as the previous step is logged."""
    write = MetricsLog.write

    def write_and_signal(log, at, *args, **options):
        write(log, at, *args, **options)
        if at == step - 1:
            signal.raise_signal(number)

    monkeypatch.setattr(MetricsLog, "write", write_and_signal)


def test_stopped_and_extended_runs_match(cells, model, tmp_path, monkeypatch, capfd):
    """Ctrl-C and SIGTERM stop one run, each after saving its step; more steps extend the other."""
    options = "--schedule", "constant", "--num-rounds", "1", "--eval-every", "100"
    stopped, extended = tmp_path / "stopped", tmp_path / "extended"
    config = config_of(cells, model, stopped, *options)
    for step, number in ((3, signal.SIGINT), (7, signal.SIGTERM)):
        with monkeypatch.context() as patch:
            stop_at(patch, step, number)
            assert finetune.main(config) == 128 + number
        assert lines(stopped)[-1]["step"] == step
        errors = capfd.readouterr().err
        assert f"stopped after step {step}, saved in {stopped / 'checkpoints' / str(step)}; " in (
            errors
        )
        assert f"to resume from step {step}\n" in errors
    assert not (stopped / "model").exists()
    assert finetune.main(config) == 0
    assert "finetune: resuming from step 7 of 14\n" in capfd.readouterr().err

    for steps in (5, STEPS):
        assert finetune.main(config_of(cells, model, extended, *options, "--steps", steps)) == 0
        printed = capfd.readouterr().out.splitlines()
        assert re.fullmatch(r"objects: \d+ used, 0 dropped", printed[-4])
        assert re.fullmatch(r"loss: \d\.\d{3} -> \d\.\d{3}", printed[-3])
        assert printed[-1] == str(extended / "model")
    assert lines(extended) == lines(stopped)
    assert json.loads((extended / "summary.json").read_text())["steps"] == STEPS
    expected = flat_params(from_pretrained(stopped / "model"))
    for name, value in flat_params(from_pretrained(extended / "model")).items():
        np.testing.assert_array_equal(value, expected[name])
    with pytest.raises(ValueError, match=r"--steps is 9, but .*extended is already at step 14"):
        finetune.main(config_of(cells, model, extended, *options, "--steps", 9))
    with pytest.raises(ValueError, match=r"schedule was 'constant', now 'cosine'.*--model .*mod"):
        finetune.main(config_of(cells, model, extended, *options, "--schedule", "cosine"))


def test_a_stopped_script_prints_no_traceback(cells, model, tmp_path):
    """Signals the reading processes, too, as a scheduler does."""
    script = KILLED.replace("os.kill(os.getpid(), signal.SIGKILL)", "os.killpg(0, signal.SIGTERM)")
    script = script.replace("step == 7", "step == 5")
    command = [sys.executable, "-c", script, EXAMPLES / "finetune.py", tmp_path / "run"]
    command = [*command, *arguments(cells, model, tmp_path / "run", "--workers", "1")]
    command = [*map(str, command)]
    found = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
    assert found.returncode == 143, found.stderr
    assert "Traceback" not in found.stderr
    # The line of step 5 is written while step 6 runs.
    assert "rerun the same command to resume from step 6\n" in found.stderr


def test_one_run_in_a_folder(cells, model, tmp_path):
    config = config_of(cells, model, tmp_path)
    with (
        lock_folder(tmp_path),
        pytest.raises(ValueError, match=rf"in {tmp_path} \(process {os.getpid()} on .*, since "),
    ):
        finetune.main(config)
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match="model exists already without its run; choose anoth"):
        finetune.main(config)


def write_squares(folder, *sides):
    """Writes a COCO file of images 4 times the model's input, each with a square of this side."""
    size = 4 * SHALLOW.image_size
    images, annotations = [], []
    for k, side in enumerate(sides):
        Image.new("RGB", (size, size), (k, 50, 90)).save(folder / f"{k}.png")
        images.append({"id": k, "file_name": f"{k}.png", "height": size, "width": size})
        corners = [160, 160, 160 + side, 160, 160 + side, 160 + side, 160, 160 + side]
        annotations.append({"id": k, "image_id": k, "iscrowd": 0, "segmentation": [corners]})
    content = {"images": images, "annotations": annotations, "categories": []}
    (folder / "squares.json").write_text(json.dumps(content))
    return ["--annotations", folder / "squares.json", "--images", folder, "--batch-size", "1"]


def test_objects_that_are_too_small(model, tmp_path, capfd):
    """A cell of the target grid is 2 pixels of the model's input, 8 of the images."""
    run, options = tmp_path / "run", write_squares(tmp_path, 4, 4)
    with pytest.raises(ValueError, match=r"no object in the 2 images .*; compare masks at --full-"):
        finetune.main(config_of(tmp_path, model, run, *options))
    assert not (run / "metrics.jsonl").exists()
    assert not (run / "embeddings").exists()

    # One object is large enough, but the first step does not use it.
    options = write_squares(tmp_path, 80, *[4] * 6)
    with pytest.raises(
        ValueError, match=r"none of the 1 steps had an object .*no model is written"
    ):
        finetune.main(config_of(tmp_path, model, tmp_path / "short", *options, "--steps", "1"))
    assert not (tmp_path / "short" / "model").exists()

    capfd.readouterr()
    options = [*options, "--num-rounds", "1", "--ema-decay", "0.5"]
    assert finetune.main(config_of(tmp_path, model, run, *options)) == 0
    found, captured = lines(run), capfd.readouterr()
    assert [x["objects_used"] + x["objects_dropped"] for x in found] == [1] * STEPS
    useful = [line for line in found if line["objects_used"]]
    assert len(useful) == 2  # one in each of two epochs
    assert all(np.isfinite(line["loss"]) for line in useful)
    assert all(x["loss"] is x["learning_rate"] is None for x in found if x["objects_dropped"])
    # The schedule counts only the steps that updated the model.
    _, rate = OptimizerConfig(learning_rate=1e-3).build(EVERYTHING, STEPS)
    assert [x["learning_rate"] for x in useful] == pytest.approx([float(rate(k)) for k in (0, 1)])
    assert captured.err.count("warning: 5 of ") == 1
    assert "--full-resolution" in captured.err
    assert "objects: 2 used, 12 dropped, because they fill less than half" in captured.out


def test_adapters_and_evaluation(cells, model, tmp_path, monkeypatch, capsys):
    held_out = ["--eval-annotations", cells / "test.json", "--eval-images", cells / "images"]
    output = tmp_path / "run"
    assert finetune.main(config_of(cells, model, output, "--train", "lora", *held_out)) == 0
    printed = capsys.readouterr().out
    ends = [line for line in lines(output) if "miou@1" in line]
    ends = " -> ".join(f"{ends[k]['miou@1']:.3f}" for k in (0, -1))
    assert f"mean IoU by clicks, 1: {ends}" in printed.splitlines()
    assert from_pretrained(output / "best").config == from_pretrained(model).config
    before, *found = (line for line in lines(output) if "miou@1" in line)
    assert [line["step"] for line in found] == [4, 8, 12, 14]
    assert {p.name for p in (output / "images").iterdir()} == {
        f"{step:06}.png" for step in (0, 4, 8, 12, 14)
    }
    # The evaluation before the first step is of the given model.
    expected = evaluate(
        from_pretrained(model), open_annotations(cells / "test.json", cells / "images")
    )
    assert before == pytest.approx({"step": 0, **expected}, abs=1e-3)
    best = max(found, key=lambda line: line["miou@1"])["step"]
    parameters = flat_params(from_pretrained(output / "best"))
    decoder = {k: v for k, v in saved(output, best, "params").items() if "lora" not in k}
    assert all(name.startswith("mask_decoder.") for name in decoder)
    assert len(decoder) > 50
    for name, value in decoder.items():
        np.testing.assert_array_equal(parameters[name], value)
    # The adapters alone can be loaded into the original model; they also need the new decoder.
    adapted = flat_params(load_lora(from_pretrained(model), output / "model.adapters.safetensors"))
    assert sum(name.endswith("lora_a") for name in adapted) == 2
    tuned = flat_params(from_pretrained(output / "model"))
    assert not np.array_equal(
        *(m["image_encoder.blocks.0.attn.qkv.kernel"] for m in (tuned, adapted))
    )
    command = ["evaluate", cells / "test.json", "--images", cells / "images"]
    command += ["--model", output / "model"]
    monkeypatch.setattr(sys, "argv", ["sam-jax", *map(str, command)])
    cli.main()
    printed = json.loads(capsys.readouterr().out)
    for name in ("miou@1", "miou@2", "miou@3", "miou@5", "miou@box"):
        assert printed[name] == pytest.approx(found[-1][name], abs=1e-3)


def test_two_hosts_then_one(whole, cells, model, tmp_path):
    """Runs the script on two hosts, kills both, and resumes the run on one host."""
    output, hosts = tmp_path / "run", []
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    for i in range(2):
        options = *RANDOM, "--parallelism", "fsdp", "--hosts", address, "2", str(i)
        with all_cores():
            hosts.append(start(cells, model, output, *options, killed=True))
    for host in hosts:
        host.communicate(timeout=300)
    assert len(lines(output)) == 7
    code, printed, errors = finish(start(cells, model, output, *RANDOM))
    assert code == 0, errors
    assert evaluated(printed) == [8, 12, 14]
    for line, expected in zip(lines(output), lines(whole), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], abs=1e-5), line["step"]


def test_nan_loss_stops_the_run(cells, model, tmp_path):
    code, _, errors = finish(start(cells, model, tmp_path / "run", "--learning-rate", "1e30"))
    assert code == 1
    message = errors.splitlines()[-1]
    assert re.search(r"finetune: at step \d+ .*, loss is nan.* for the images \d, \d; ", message)
    assert "checkpoint" in message
    assert "Traceback" not in errors
    assert not (tmp_path / "run" / "model").exists()


def test_bad_input(cells, model, tmp_path):
    with pytest.raises(FileNotFoundError, match="none"):
        finetune.main(config_of(cells, tmp_path / "none", tmp_path / "run"))
    content = json.loads((cells / "train.json").read_text())
    content["annotations"][0]["segmentation"] = []
    (tmp_path / "bad.json").write_text(json.dumps(content))
    options = "--annotations", tmp_path / "bad.json"
    with pytest.raises(ValueError, match="image 0: annotation 1: its segmentation is empty"):
        finetune.main(config_of(cells, model, tmp_path / "run", *options))


@pytest.mark.parametrize(
    ("options", "cached"),
    [
        ("", [5, 2]),
        ("--train hq", [5, 2]),
        ("--no-cache", []),
        ("--train lora", []),  # the encoder changes
        # Each training image is read only once, or is augmented differently each time.
        ("--steps 2", [2]),
        ("--flip 0.5", [2]),
        ("--scale-range 0.5 1", [2]),
    ],
)
def test_repeated_images_are_encoded_once(cells, model, monkeypatch, options, cached):
    made = []
    monkeypatch.setattr(finetune, "CachedEmbeddings", lambda s, *_, **__: made.append(len(s)) or s)
    held_out = "--eval-annotations", cells / "test.json", "--eval-images", cells / "images"
    config = config_of(cells, model, Path("run"), *held_out, *options.split())
    opened = finetune.open_datasets(config)
    assert [len(dataset) for dataset in finetune.with_embeddings(*opened, None, config)] == [5, 2]
    assert made == cached
