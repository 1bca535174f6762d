"""`weightd plan --html` of real files, in a browser: the page says what the report does."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from support import checkpoints
from support.pages import OpenPage
from weightd._sizes import size
from weightd.cli import main
from weightd.cli.plan_page import write_report
from weightd_daemon import planning

MIB = 1 << 20


@pytest.mark.parametrize("headers", [False, True])
def test_the_page_of_a_real_plan(tmp_path: Path, open_page: OpenPage, headers: bool) -> None:
    base = {f"layers.{i}.weight": np.full(MIB // 4, i, np.float32) for i in range(4)}
    tuned = base | {"layers.3.weight": base["layers.3.weight"] + np.float32(1e-6)}
    models = tmp_path / "models"
    checkpoints.write(models / "base" / "model.safetensors", base)
    checkpoints.write(models / "tuned" / "model.safetensors", tuned)
    checkpoints.write(models / "pipe" / "encoder" / "model.safetensors", base)
    checkpoints.write(models / "pipe" / "unet" / "model.safetensors", {"w": np.ones(MIB, np.float32)})
    checkpoints.describe_pipeline(models / "pipe")
    (models / "old.bin").write_bytes(b"pickle")
    report = planning.plan(planning.Question([str(models)], scan=True, headers=headers, budget=7 * MIB))
    write_report(tmp_path / "r.html", asdict(report), ["a note"])
    page = open_page((tmp_path / "r.html").as_uri())
    text = page.locator("main").inner_text()
    most = "at most " if headers else ""
    assert f"{most}{size(report.saved_bytes)}" in text
    assert f"Names are below {models}/" in text
    names = [str(Path(found.name).relative_to(models)) for found in report.checkpoints]
    assert sorted(names) == ["base", "pipe", "tuned"]
    assert all(name in text for name in names)
    assert report.skipped[0].reason in text
    assert "a note" in text
    page.get_by_label("Compare").select_option("base")
    page.locator("select").nth(1).select_option("pipe")
    text = page.locator("main").inner_text()
    assert f"They share {most}4.00 MiB: 100 % of base, 50 % of pipe." in text
    assert ("1 tensor only in" in text) != headers
    assert ("none of this is saved by weightd today" in text) != headers
    assert report.budget is not None
    (last,) = (step for step in report.budget.order if not step.fits)
    removed = ", ".join(str(Path(name).relative_to(models)) for name in last.remove)
    assert f"no; without {removed} it would" in text if removed else "no" in text


def test_the_page_of_a_plan_of_nodes(tmp_path: Path, open_page: OpenPage) -> None:
    names = ("base", "tuned", "other")
    for number, name in enumerate(names):
        values = [-1, -2, -3, -4] if name == "other" else [1, 2, 3, 100 + number]
        tensors = {f"layers.{i}.weight": np.full(MIB // 4, value, np.float32) for i, value in enumerate(values)}
        checkpoints.write(tmp_path / "models" / name / "model.safetensors", tensors)
    command = ["fleet", "plan", "--nodes=3", "--budget=6MiB", f"--html={tmp_path}/r.html", f"--state-dir={tmp_path}/s"]
    assert main([*command, "--quiet", *(str(tmp_path / "models" / name) for name in names)]) == 0
    page = open_page((tmp_path / "r.html").as_uri(), width=900)
    section = page.get_by_role("region", name="What each node holds")
    text = section.inner_text()
    assert "base, tuned: 5.01 MiB of 6.00 MiB" in text
    assert "other: 4.00 MiB of 6.00 MiB" in text
    assert "Empty: 6.00 MiB" in text
    legends = [" ".join(one.inner_text().split()) for one in section.get_by_role("list").all()]
    assert sorted(legends) == [
        "free 6.00 MiB",
        "of one checkpoint 2.00 MiB shared there 3.01 MiB free 0.992 MiB",
        "of one checkpoint 4.00 MiB free 2.00 MiB",
    ]
