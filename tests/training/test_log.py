import json
import shutil

import jax
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2

from sam_jax.training import MetricsLog, read_metrics, summarize_metrics


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write(folder, steps):
    log = MetricsLog(folder, steps[0])
    for step in steps:
        log.write(step, {"loss": step / 3})
    return log


def events(folder):
    """TensorBoard's events of a run that was started once."""
    (file,) = (folder / "tensorboard").iterdir()
    data = file.read_bytes()
    while data:  # length, its checksum, an event, its checksum
        size = int.from_bytes(data[:8], "little")
        yield event_pb2.Event.FromString(data[12 : 12 + size])
        data = data[16 + size :]


def test_a_line_is_on_disk_at_once(tmp_path):
    log = write(tmp_path, [1, 2])
    assert lines(tmp_path) == [{"step": 1, "loss": 1 / 3}, {"step": 2, "loss": 2 / 3}]
    log.close()


def test_repeated_steps_have_one_line(tmp_path):
    """A run that was killed after step 5 and half a line resumes from its checkpoint at step 3."""
    write(tmp_path, range(6)).close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    shutil.rmtree(tmp_path / "tensorboard")
    write(tmp_path, range(4, 8)).close()
    assert lines(tmp_path) == [{"step": i, "loss": i / 3} for i in range(8)]
    # TensorBoard is told to drop them, too.
    starts = [e.step for e in events(tmp_path) if e.session_log.status == e.session_log.START]
    assert starts == [4]


def test_every_line_is_json(tmp_path):
    """Even with values that JSON lacks, and after a power failure has left other bytes."""
    log = write(tmp_path, [1])
    infinite = jax.numpy.float32("-inf")  # as a training step returns it
    log.write(2, {"loss": float("nan"), "grad_norm": infinite, "iou": None, "objects": 3})
    log.write(3, {"loss": jax.numpy.float32(0.5)})
    log.close()
    none = {"loss": None, "grad_norm": None, "iou": None}
    expected = [{"step": 1, "loss": 1 / 3}, {"step": 2, **none, "objects": 3}]
    expected.append({"step": 3, "loss": 0.5})
    assert lines(tmp_path) == expected
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'[1]\n{"loss": 1}\nNaN\n\xff\0\0\n{"step": "3"}\n{"step": 3, "lo')
    assert read_metrics(str(tmp_path / "metrics.jsonl")) == expected
    MetricsLog(tmp_path, 5).close()
    assert lines(tmp_path) == expected


def test_a_new_run_begins_empty(tmp_path):
    write(tmp_path, range(3)).close()
    MetricsLog(tmp_path, 0).close()
    assert lines(tmp_path) == []


def test_images(tmp_path):
    log = write(tmp_path, [1])
    log.log_image(12, Image.new("RGB", (5, 3), "red"))
    log.close()
    with Image.open(tmp_path / "images" / "000012.png") as image:
        assert image.size == (5, 3)
        assert image.getpixel((0, 0)) == (255, 0, 0)


def test_only_the_first_host_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    log = write(tmp_path, [1])
    log.log_image(1, Image.new("RGB", (5, 3)))
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_has_the_same_values(tmp_path):
    write(tmp_path, [1, 2, 3]).close()
    values = {e.step: v.simple_value for e in events(tmp_path) for v in e.summary.value}
    assert values == {step: pytest.approx(step / 3) for step in (1, 2, 3)}


def test_summary_of_a_run():
    """Before and after are means of a tenth of the training steps or, if any, of evaluations."""
    steps = [
        {"step": i, "loss": 20.0 - i, "iou_last": i / 20, "objects_used": 2, "objects_dropped": 1}
        for i in range(1, 21)
    ]
    idle = {"step": 21, "loss": None, "iou_last": None, "objects_used": 0, "objects_dropped": 3}
    assert summarize_metrics([*steps, idle]) == {
        "objects_used": 40,
        "objects_dropped": 23,
        "before": {"loss": 18.5, "iou_last": pytest.approx(0.075)},
        "after": {"loss": 0.5, "iou_last": pytest.approx(0.975)},
    }
    first = {"step": 0, "miou@1": 0.5, "miou@box": 0.75}
    last = steps[-1] | {"miou@1": 0.625, "miou@box": 0.875}
    assert summarize_metrics([first, *steps[:-1], last]) == {
        "objects_used": 40,
        "objects_dropped": 20,
        "before": {"miou@1": 0.5, "miou@box": 0.75},
        "after": {"miou@1": 0.625, "miou@box": 0.875},
    }
