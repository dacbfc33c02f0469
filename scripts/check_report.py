#!/usr/bin/env python3
"""The report page in a real browser: of a run under way, killed, resumed and finished.

A tiny model is trained on texts that a careless page would take for markup. Looked at: no complaint
in the console, nothing loaded from elsewhere, every text as it was written, the curves in step with
metrics.jsonl and going on after the resume, hovering, dark colours, a narrow window.

usage: check_report.py RERANKER BROWSER [--screenshots DIRECTORY]
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from browser import Browser

ROOT = Path(__file__).resolve().parent.parent
EPOCHS = 120
NASTY = [
    "</script><script>window.harmed = 1</script>",
    '<img src=x onerror="window.harmed = 2">',
    "<!-- what about <b>this</b> & \"that\" &amp; 'those' \\u003c ${1} `x`",
    "怎样给一本旧书换封面？\u2028第二行 🍵 /*data*/",
]
CONFIG = f"""model_name_or_path: {ROOT}/tests/golden/bert_tiny
model_type: bert_encoder
train_dataset: train.jsonl
val_dataset: validation.jsonl
output_dir: out
max_len: 32
epochs: {EPOCHS}
lr: 1e-4
batch_size: 4
eval_steps: 80
save_steps: 50
log_interval: 1
"""


def write_data(directory: Path) -> None:
    """Pairs, and queries of six hits whose relevant one is nothing that can be learned."""
    with (directory / "train.jsonl").open("w") as file:
        for i in range(64):
            pair = {"query": f"how to boil water {i}", "content": "water " * (i % 30 + 1)}
            file.write(json.dumps(pair | {"label": i % 2}) + "\n")
    with (directory / "validation.jsonl").open("w") as file:
        for i in range(24):
            query = f"{NASTY[i]}" if i < len(NASTY) else f"which cup of tea {i}"
            text = NASTY[i % len(NASTY)]
            hits = [{"content": f"{text} {'tea ' * j}", "label": int(j == i % 6)} for j in range(6)]
            file.write(json.dumps({"query": query, "hits": hits}, ensure_ascii=False) + "\n")


def data_of(page: Path) -> dict:
    """The JSON object in a page."""
    text = page.read_text()
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)
    return json.loads(found[1])


def expect(condition: object, message: str) -> None:
    """Ends the check with a message unless the condition holds."""
    if not condition:
        sys.exit(f"check_report: {message}")


def kill_under_way(reranker: str, directory: Path, browser: Browser) -> int:
    """Starts the run, looks at its page while it trains, kills it; the step that its page told."""
    page = directory / "out/runs/report.html"
    command = [reranker, "train", "--device", "cpu", "--config", "t.yaml"]
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=directory, stderr=log)
        while True:
            expect(process.poll() is None, f"the run ended: {(directory / 'log').read_text()}")
            if page.exists() and data_of(page)["run"]["totals"]["step"] > 60:
                break
            time.sleep(0.02)
        look(browser, page, "training")
        expect(process.poll() is None, "the run ended while its page was looked at")
        process.send_signal(signal.SIGKILL)
        process.wait()
        # A page under way loads itself again from time to time.
        browser.open("about:blank")
    return data_of(page)["run"]["totals"]["step"]


def look(browser: Browser, page: Path, status: str) -> None:
    """Opens a page and checks what every page has to be."""
    browser.open(page.as_uri())
    expect(status in browser.evaluate("document.querySelector('.chip').textContent"), f"no {status}")
    expect(browser.evaluate("document.querySelectorAll('.chart').length") >= 6, "charts are missing")
    harmed = browser.evaluate("typeof window.harmed")
    expect(harmed == "undefined", "a text was run as a program")
    expect(not browser.complaints(), f"the console says {browser.complaints()}")
    elsewhere = [url for url in browser.requests() if not url.startswith(("file:", "data:"))]
    expect(not elsewhere, f"the page loads {elsewhere}")
    expect(len(browser.requests()) == 1, f"the page loads {browser.requests()}")


def check_texts(browser: Browser) -> None:
    """Every query and document of the worst ones stands there as it was written."""
    queries = browser.evaluate("[...document.querySelectorAll('.query')].map((q) => q.textContent)")
    documents = browser.evaluate("[...document.querySelectorAll('.document')].map((d) => d.textContent)")
    expect(queries and documents, "no queries are shown")
    for text in NASTY:
        expect(any(text in document for document in documents), f"no document holds {text!r}")
    known = {*NASTY, *(f"which cup of tea {i}" for i in range(24))}
    expect(set(queries) <= known, f"other queries than there are: {set(queries) - known}")


def check_hovering(browser: Browser, steps: int) -> None:
    """The mouse over the middle of a chart tells the values of the nearest step."""
    browser.evaluate("scrollTo(0, 0)")
    spot = browser.evaluate(
        "(() => { const box = document.querySelector('.chart svg').getBoundingClientRect();"
        " return [box.left + box.width / 2, box.top + box.height / 2]; })()"
    )
    browser.hover(*spot)
    told = browser.evaluate("document.getElementById('tip').innerText")
    step = int(re.search(r"step ([\d,]+)", told)[1].replace(",", ""))
    expect(abs(step - steps / 2) < steps / 8, f"the middle of {steps} steps is step {step}")
    expect("training" in told, f"hovering says {told!r}")
    cursors = browser.evaluate("document.querySelectorAll('line.cursor').length")
    expect(cursors >= 4, f"{cursors} charts show the step")
    browser.hover(1, 1)
    expect(browser.evaluate("getComputedStyle(document.getElementById('tip')).display") == "none", "tip")


def check_finished(browser: Browser, page: Path, metrics: list[dict]) -> None:
    """The curves are the metrics, in one piece over the resume."""
    run = data_of(page)["run"]
    train = [line for line in metrics if line["type"] == "train"]
    curve = run["curves"]["train/loss"]
    expect(curve[-1][0] == train[-1]["step"], "the loss does not reach the last step")
    mean = sum(point[1] for point in curve) / len(curve)
    exact = sum(line["loss"] for line in train) / len(train)
    expect(abs(mean / exact - 1) < 0.02, f"the mean loss is {mean} on the page, {exact} in metrics")
    validations = [line for line in metrics if line["type"] == "validation"]
    ndcg = [[line["step"], line["ndcg@10"]] for line in validations]
    shown = [point[:2] for point in run["curves"]["validation/ndcg@10"]]
    close = (a[0] == b[0] and abs(a[1] - b[1]) < 1e-5 for a, b in zip(ndcg, shown, strict=True))
    expect(all(close), f"nDCG is {shown} on the page, {ndcg} in metrics")
    resumed = run["totals"]["resumed_after"]
    expect(len(resumed) == 1 and resumed[0] % 50 == 0, f"resumed after {resumed}")
    expect(browser.evaluate("document.querySelectorAll('line.resume').length") > 0, "no resume mark")
    expect(run["totals"]["pairs"] == 64 * EPOCHS, f"{run['totals']['pairs']} pairs over both starts")


def check_appearance(browser: Browser, page: Path, pictures: Path | None) -> None:
    """Light, dark and narrow, each as a picture where one is asked for."""
    shades = {}
    for scheme, width in (("light", 1280), ("dark", 1280), ("light", 420)):
        browser.scheme(scheme)
        browser.size(width, 900)
        shades[scheme] = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        wide = browser.evaluate("document.documentElement.scrollWidth")
        expect(wide <= width, f"the page is {wide} pixels wide in a window of {width}")
        # Letters of one size in every chart, and a query that is not a column of letters.
        scales = browser.evaluate(
            "[...document.querySelectorAll('.chart svg')].map((chart) =>"
            " chart.getBoundingClientRect().width / chart.viewBox.baseVal.width)"
        )
        expect(all(abs(scale - 1) < 0.02 for scale in scales), f"charts are drawn at scales {scales}")
        query = browser.evaluate("document.querySelector('.query').getBoundingClientRect().width")
        expect(query > width / 4, f"a query is {query} pixels wide in a window of {width}")
        if pictures:
            pictures.mkdir(parents=True, exist_ok=True)
            browser.screenshot(pictures / f"{page.parent.parent.name}-{scheme}-{width}.png")
    expect(shades["light"] != shades["dark"], "dark colours are the light ones")


def main() -> None:
    """Makes the run and looks at its page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("reranker", type=Path)
    parser.add_argument("browser")
    parser.add_argument("--screenshots", type=Path)
    arguments = parser.parse_args()
    reranker = str(arguments.reranker.resolve())
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name, Browser(arguments.browser) as browser:
        directory = Path(name)
        write_data(directory)
        (directory / "t.yaml").write_text(CONFIG)
        browser.size(1280, 900)
        told = kill_under_way(reranker, directory, browser)
        command = [reranker, "train", "--device", "cpu", "--config", "t.yaml"]
        log = subprocess.run(command, cwd=directory, stderr=subprocess.PIPE, text=True, check=False)
        expect(log.returncode == 0, f"the resumed run failed: {log.stderr}")
        page = directory / "out/runs/report.html"
        metrics = [json.loads(line) for line in (page.parent / "metrics.jsonl").open()]
        look(browser, page, "finished")
        check_texts(browser)
        check_hovering(browser, 16 * EPOCHS)
        check_finished(browser, page, metrics)
        check_appearance(browser, page, arguments.screenshots)
        size = page.stat().st_size
        expect(not browser.complaints(), f"the console says {browser.complaints()}")
    print(
        f"report page: live at step {told}, finished at {metrics[-2]['step']}; "
        f"{size // 1000} kB, nothing loaded, nothing in the console"
    )


if __name__ == "__main__":
    main()
