"""Write the pictures of README: the memory map and the sharing matrix, of the page of `weightd web` on a real daemon.

It makes small checkpoints, random but shared as real ones are: a base, an adapter merged into it, a full fine-tune, and
two pipelines with one text encoder. It needs the extra `dev` and Chromium: `.venv/bin/python tools/draw_page.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from playwright.sync_api import sync_playwright
from safetensors.numpy import save_file

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
CHROMIUM = "/usr/bin/chromium"
MIB = 1 << 20
WEIGHTD = (sys.executable, "-m", "weightd")


Tensors = dict[str, np.ndarray]


def random_tensors(seed: str, count: int, mebibytes: int) -> Tensors:
    """Return random tensors, which depend on the seed alone."""
    random = np.random.Generator(np.random.PCG64(list(seed.encode())))
    return {f"layers.{at}.weight": np.frombuffer(random.bytes(mebibytes * MIB), dtype=np.uint8) for at in range(count)}


def write_family(folder: Path) -> dict[str, Path]:
    """Write the checkpoints; returns their files and folders by name."""
    base = random_tensors("base", 24, 2)
    adapted = dict(list(random_tensors("merged-adapter", 24, 2).items())[14:])
    tuned = dict(list(random_tensors("fine-tune", 24, 2).items())[1:])
    plain = {
        "base": base,
        "draft": random_tensors("draft", 5, 2),
        "merged-adapter": base | adapted,
        "fine-tune": base | tuned,
    }
    found = {name: folder / f"{name}.safetensors" for name in plain}
    for name, content in plain.items():
        save_file(content, found[name])
    encoder = random_tensors("encoder", 12, 3)
    for name, count in {"pipeline-large": 20, "pipeline-small": 8}.items():
        found[name] = folder / name
        for part, content in {"text_encoder": encoder, "unet": random_tensors(name, count, 2)}.items():
            (found[name] / part).mkdir(parents=True)
            save_file(content, found[name] / part / "model.safetensors")
        parts = {"text_encoder": ["transformers", "T5EncoderModel"], "unet": ["transformers", "Model"]}
        (found[name] / "model_index.json").write_text(json.dumps({"_class_name": "DiffusionPipeline", **parts}))
    return found


@contextmanager
def running(*arguments: str, environment: Mapping[str, str]) -> Iterator[str]:
    """Run a command until the block ends; the value is its first line."""
    with subprocess.Popen([*WEIGHTD, *arguments], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline()
        finally:
            process.terminate()


def draw(address: str) -> None:
    """Take the two pictures of the page."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 900, "height": 900}, device_scale_factor=1.5, color_scheme="light")
        page.goto(address)
        page.locator(".sharing .cell").first.wait_for()
        page.locator("canvas.map").wait_for()
        page.locator("section", has=page.locator("canvas.map")).screenshot(path=IMAGES / "memory-map.png")
        page.locator(".sharing").screenshot(path=IMAGES / "sharing-matrix.png")
        browser.close()


def main() -> None:
    """Fill a daemon, and draw."""
    with tempfile.TemporaryDirectory(prefix="weightd-") as name:
        folder = Path(name)
        environment = os.environ | {"WEIGHTD_SOCKET": str(folder / "w.sock"), "XDG_CONFIG_HOME": str(folder)}
        paths = write_family(folder)
        serve = ("serve", "--budget=384MiB", f"--state-dir={folder / 'state'}", "--log-level=warning")
        with running(*serve, environment=environment):
            for name, path in paths.items():
                pin = ["--pin"] if name == "base" else []
                command = [*WEIGHTD, "load", str(path), "--name", name, "--quiet", *pin]
                subprocess.run(command, env=environment, check=True)
            subprocess.run([*WEIGHTD, "rm", "draft"], env=environment, check=True)
            time.sleep(1)  # memory on its way back
            with running("web", "--no-open", environment=environment) as line:
                draw(line.split()[1])


if __name__ == "__main__":
    main()
