"""The run report against a fake three-stage run whose every number is known."""

import base64
import html
import html.parser
import json
import math
import random
import re
import struct
import sys
import zlib

import pytest

from clipa_t5x import errors, report, report_page, report_plots, run_history

HOSTILE = "<script>alert('x')</script> & \"quoted\" <img src=x onerror=alert(1)>"
STAGES = (
    # name, pixels, kept, tokens, text, batch, steps, samples/s, first and last loss, top-1
    ("stage1", 32, 8, 16, 8, 64, 1000, 1450.0, (4.2, 1.4), (0.08, 0.71)),
    ("stage2", 48, 36, 36, 16, 64, 240, 620.0, (1.6, 1.1), (0.70, 0.83)),
    ("stage3", 64, 64, 64, 32, 64, 60, 260.0, (1.2, 0.98), (0.83, 0.872)),
)


def png(red, green, blue, size=48):
    """Returns a base64 PNG of one shaded colour."""
    rows = b"".join(
        b"\0" + b"".join(bytes((red, green, (blue + 3 * x + y) % 256)) for x in range(size))
        for y in range(size)
    )

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0))
    content = header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + content).decode()


def metric_lines(stage, rng, start):
    """Returns the lines of one stage's metrics.jsonl, as dicts."""
    _, _, _, _, _, batch, steps, speed, (loss0, loss1), (top0, top1) = stage
    lines = []
    for step in range(10, steps + 1, 10):
        done = step / steps
        loss = loss1 + (loss0 - loss1) * math.exp(-4 * done) + rng.gauss(0, 0.05)
        values = {
            "loss": loss,
            "accuracy": 1 / (1 + loss),
            "logit_scale": 14.3 + 20 * (1 - math.exp(-done)),
            "learning_rate": 1e-3 * min(done * 10, 1) * (1 + math.cos(math.pi * done)) / 2,
            "grad_norm": 1.5 * math.exp(-done) + abs(rng.gauss(0, 0.2)),
            "param_norm": 80 + done,
            "update_norm": 0.01,
            "samples_per_second": speed / 9 if step == 10 else speed + rng.gauss(0, speed / 40),
            "data_wait_share": abs(rng.gauss(0.03, 0.02)),
            "samples": step * batch,
        }
        lines.append({"step": step, "group": "train", "time": start + step, "values": values})
    for step in range(steps // 6, steps + 1, steps // 6):
        done = 1 - math.exp(-4 * step / steps)
        accuracy = top0 + (top1 - top0) * done
        for group, values in (
            ("training_eval/digits", {"loss": loss1 + (loss0 - loss1) * (1 - done) + 0.1}),
            ("inference_eval/combination", {"accuracy": accuracy, "num_examples": 1000}),
            ("inference_eval/digits", {"accuracy": accuracy * 0.8 + 0.1, "num_examples": 360}),
        ):
            lines.append({"step": step, "group": group, "time": start + step, "values": values})
    return sorted(lines, key=lambda line: (line["step"], line["group"]))


def write_run(folder, stage=STAGES[0], start=1.7e9, gallery=False):
    """Writes a run as the trainer does and returns its metric lines."""
    _, pixels, kept, tokens, text, batch, steps, speed, _, _ = stage
    folder.mkdir(parents=True)
    lines = metric_lines(stage, random.Random(stage[0]), start)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    info = {
        "model": "ClipModel",
        "num_params": 5_412_353,
        "image_size": pixels,
        "patch_size": 8,
        "num_image_tokens": tokens,
        "num_image_tokens_kept": kept,
        "text_length": text,
        "batch_size": batch,
        "total_steps": steps,
        "devices": "2 x cpu",
        "initial_checkpoint": None,
        "completed": True,
    }
    (folder / "stage.json").write_text(json.dumps(info))
    (folder / "config.gin").write_text(f"train.total_steps = {steps}\nNOTE = '<b>&'\n")
    (folder / "model-info.txt").write_text("image/patch/kernel  (8, 8, 3, 192)  data,model\n" * 12)
    if gallery:
        captions = (HOSTILE, "a photo of a large red circle above a small blue square")
        results = [
            {
                "image": png(60 * i, 200 - 40 * i, 90),
                "mime": "image/png",
                "score": 0.41 - 0.04 * i,
                "caption": HOSTILE if i == 4 else f"a photo of shape {i}",
                "match": i in (0, 2),
            }
            for i in range(5)
        ]
        items = [{"caption": caption, "results": results} for caption in captions]
        (folder / "gallery.json").write_text(json.dumps({"items": items}))
    return lines


def write_schedule(folder):
    """Writes a schedule of three runs, the last with a gallery."""
    folder.mkdir()
    names = [stage[0] for stage in STAGES]
    (folder / "schedule.json").write_text(json.dumps({"stages": names}))
    for index, stage in enumerate(STAGES):
        write_run(folder / stage[0], stage, 1.7e9 + 2000 * index, gallery=index == 2)


class Document(html.parser.HTMLParser):
    """Collects text, attributes and identifiers, and demands that tags balance."""

    VOID = {"meta", "link", "img", "br", "hr"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.cells = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("th", "td"):
            self.cells[-1].append(data)
        self.text.append(data)

    def attributes(self, tag, name):
        return [attrs[name] for t, attrs in self.tags if t == tag and name in attrs]

    @property
    def identifiers(self):
        return [attrs["id"] for _, attrs in self.tags if "id" in attrs]


@pytest.fixture(scope="module")
def schedule(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "inverse scaling"
    write_schedule(folder)
    assert report.main([f"--model_dir={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def text(schedule):
    return (schedule / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def document(text):
    return Document(text)


def last(folder, group, value):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["values"][value] for line in lines if line["group"] == group][-1]


def test_table_shows_what_the_metrics_say(schedule, document):
    header, *rows = document.cells
    assert header[-3:] == ["top-1 combination", "top-1 digits", "training time"]
    for stage, row in zip(STAGES, rows, strict=True):
        name, pixels, kept, tokens, text_tokens, batch, steps, speed, _, _ = stage
        counts = [str(pixels), f"{kept} of {tokens}", str(text_tokens), f"{steps * batch:,}"]
        assert row[:5] == [name, *counts]
        assert float(row[5].replace(",", "")) == pytest.approx(speed, rel=0.03)
        for cell, evaluator in zip(row[6:8], ("combination", "digits"), strict=True):
            top1 = last(schedule / name, f"inference_eval/{evaluator}", "accuracy")
            assert cell == f"{top1:.1%}"


def test_captions_name_the_last_values(schedule, document):
    words = "".join(document.text)
    loss = last(schedule / "stage3", "train", "loss")
    assert f"last: train {loss:.4g}, eval digits" in words
    assert f"last: {last(schedule / 'stage3', 'train', 'grad_norm'):.4g}" in words


def test_drawn_curve_has_the_logged_shape(schedule, text):
    """The vertices of the zero-shot curve are the metrics, up to the axes' scales."""
    drawing = text[
        text.index('id="accuracy-x0-figure') : text.index("</svg>", text.index('"speed-'))
    ]
    color = re.escape(report_plots.COLORS["series-1"][0])
    path = re.search(rf'<path d="([^"]*)"[^>]*stroke: var\(--series-1, {color}\)', drawing)
    assert path is not None
    numbers = [float(number) for number in re.findall(r"-?\d+\.?\d*", path[1])]
    drawn = list(zip(numbers[::2], numbers[1::2], strict=True))
    history = run_history.load(schedule)
    curve = sum(history.curve("inference_eval/combination", "accuracy", "samples"), [])
    assert len(drawn) == len(curve) == 18
    for axis in (0, 1):
        shown, logged = [p[axis] for p in drawn], [p[axis] for p in curve]
        scale = (shown[-1] - shown[0]) / (logged[-1] - logged[0])
        expected = [shown[0] + scale * (value - logged[0]) for value in logged]
        assert shown == pytest.approx(expected, abs=0.01)


def test_stages_are_labelled_and_plots_described(text, document):
    for label in ("stage1 32 px / 8 tokens", "stage2 48 px / 36 tokens", "stage3 64 px / 64"):
        assert text.count(f">{label}") == 4
    described = [attrs for tag, attrs in document.tags if attrs.get("class") == "plot"]
    assert len(described) == 10
    assert all(a["role"] == "img" and "from" in a["aria-label"] for a in described)
    assert len(set(document.identifiers)) == len(document.identifiers)
    targets = document.attributes("use", "href") + re.findall(r"url\((#[^)]*)\)", text)
    assert targets and all(target[1:] in document.identifiers for target in targets)


def test_nothing_is_fetched(text, document):
    assert "//" not in re.sub(r'src="data:[^"]*"', "", text)
    assert "@import" not in text and text.count("url(") == text.count("url(#")
    assert all(source.startswith("data:image/png;base64,") for _, source in sources(document))
    assert not {tag for tag, _ in document.tags} & {"script", "iframe", "object", "embed"}
    assert "default-src 'none'" in document.attributes("meta", "content")[0]
    assert document.attributes("link", "href") == ["data:,"]


def sources(document):
    return [(tag, attrs["src"]) for tag, attrs in document.tags if "src" in attrs]


def test_captions_are_text(text, document):
    assert "<script" not in text and "onerror" not in {n for _, a in document.tags for n in a}
    assert f"“{HOSTILE}”" in "".join(document.text)
    assert f"Rank 5, miss: {HOSTILE}" in document.attributes("img", "alt")
    assert len(document.attributes("img", "alt")) == 10
    assert document.attributes("li", "class") == ["match", "miss", "match", "miss", "miss"] * 2
    assert "NOTE = '<b>&'" in "".join(document.text)


def test_equal_histories_give_equal_reports(schedule, text):
    assert report.render(run_history.load(schedule)) == text


def test_lone_run_with_defects(tmp_path):
    run = tmp_path / "<b>run"
    write_run(run)
    (run / "stage.json").write_text("{}")
    (run / "config.gin").unlink()
    (run / "model-info.txt").unlink()
    (run / "gallery.json").write_text(
        json.dumps({"items": [{"caption": "x", "results": [{"image": '"><script>', "mime": "a"}]}]})
    )
    names = ["_hidden", "a$x^2$b", "<script>alert(1)</script>", "\x1b[2J", "日本", "y" * 90]
    with (run / "metrics.jsonl").open("a") as metrics:
        for step, value in ((400, math.nan), (410, math.inf), (420, -math.inf)):
            values = {"loss": value, "samples": step * 64, "grad_norm": value}
            line = {"step": step, "group": "train", "time": 0, "values": values}
            metrics.write(json.dumps(line) + "\n")
        for name in names:
            values = {"accuracy": math.nan}
            line = {"step": 500, "group": f"inference_eval/{name}", "time": 0, "values": values}
            metrics.write(json.dumps(line) + "\n")
        metrics.write('garbage\n{"step": 2000, "gro')
    text = report.write_report(run).read_text(encoding="utf-8")
    document = Document(text)
    assert document.cells[1][:4] == ["<b>run", "-", "-", "-"]
    assert "<script" not in text and "\x1b" not in text
    words = " ".join(document.text)
    assert "3 not finite, not drawn" in words and "1 line was unreadable" in words
    assert "no image" in words and "Configuration and parameters" not in words
    assert all(f"</svg>{name} nan%" in text for name in ("_hidden", "a$x^2$b", "日本"))


def test_dozens_of_evaluations_have_a_table_of_their_own(tmp_path):
    """As many as clip_benchmark's data sets neither fill a line of facts nor columns."""
    lines = [
        {"step": step, "group": f"inference_eval/set{i}", "time": 0, "values": {"accuracy": i / 50}}
        for i in range(38)
        for step in (500, 1000)
    ]
    write_run(tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as metrics:
        metrics.writelines(json.dumps(line) + "\n" for line in lines)
    document = Document(report.write_report(tmp_path / "run").read_text(encoding="utf-8"))
    headings = document.cells.index(["zero-shot top-1", "run"])
    summary, evaluations = document.cells[:headings], document.cells[headings + 1 :]
    assert [len(row) for row in summary] == [7, 7]
    assert len(evaluations) == 38 + 2  # The run has two of its own.
    assert ["set37", "74.0%"] in evaluations
    assert not [text for text in document.text if text.startswith("Zero-shot top-1, ")]
    assert "Zero-shot top-1 (7 of 7)" in document.text


def test_sections_without_content_are_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    document = Document(report.write_report(tmp_path).read_text())
    headings = [attrs.get("id") for tag, attrs in document.tags if tag == "h2"]
    assert headings == ["summary"]


def test_output_is_written_whole_or_not(tmp_path, schedule, monkeypatch):
    target = tmp_path / "out.html"
    target.write_text("old")
    assert report.write_report(schedule, target) == target
    assert target.read_text().endswith("</html>\n")
    target.write_text("old")

    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report_page.os, "replace", broken)
    with pytest.raises(errors.UserError, match="No space left"):
        report.write_report(schedule, target)
    assert [path.name for path in tmp_path.iterdir()] == ["out.html"]
    assert target.read_text() == "old"


def test_user_mistakes_are_one_line(tmp_path, capsys, schedule):
    for arguments in (
        [f"--model_dir={tmp_path / 'none'}"],
        [f"--model_dir={tmp_path}"],
        [f"--model_dir={schedule}", f"--output={tmp_path / 'no' / 'report.html'}"],
    ):
        assert report.main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1


def test_missing_matplotlib_is_told(schedule, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(errors.UserError, match=r"pip install 'clipa_t5x\[report\]'"):
        report.render(run_history.load(schedule))
